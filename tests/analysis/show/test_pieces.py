"""A character made of several tokens is shown once, at the first of them."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from lm_eval_bh.analysis.patterns.token_classes import decoder
from lm_eval_bh.analysis.show.logged_texts import _words
from lm_eval_bh.analysis.show.view_page import pieces
from lm_eval_bh.resources import tiny_olmoe

TEXTS = {
    "latin": "The tide is high.",
    "accents": "caf\xe9 na\xefve",
    "chinese": "\u4f60\u597d\uff0c\u4e16\u754c",
    "hebrew": "\u05e9\u05dc\u05d5\u05dd",
    "emoji": "a \U0001f600 b\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "itself": "a \ufffd b",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces(text):
    tokenizer = AutoTokenizer.from_pretrained(tiny_olmoe())
    ids = tokenizer.encode(text, add_special_tokens=False)
    for found in (
        pieces(tokenizer.decode, ids),
        _words(ids, decoder(tiny_olmoe() / "tokenizer.json")),
    ):
        assert len(found) == len(ids)
        assert "".join(found) == text
        assert found[0]
        for piece in found:
            assert "\ufffd" not in piece or "\ufffd" in text


def test_a_text_that_ends_within_a_character():
    tokenizer = AutoTokenizer.from_pretrained(tiny_olmoe())
    ids = tokenizer.encode("ab\U0001f600", add_special_tokens=False)[:-1]
    assert pieces(tokenizer.decode, ids)[-1] == "\ufffd"


def test_tokens_that_nobody_knows():
    ids = [None, None, 5, 999_999]
    assert _words(ids, None) == [" ?", " ?", " 5", " 999999"]
    known = _words(ids, decoder(tiny_olmoe() / "tokenizer.json"))
    assert known[:2] == [" ?", " ?"]
    assert known[3] == " 999999"
