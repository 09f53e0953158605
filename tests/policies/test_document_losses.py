"""Losses of documents equal those of transformers, in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lm_eval_bh.errors import DataError
from lm_eval_bh.policies.document_losses import Documents, _share


def test_they_are_those_of_transformers(tiny, tokenizer, paragraphs):
    texts = paragraphs[:5]
    documents = Documents.of(tokenizer, texts, length=4096, batch=3)
    for text, tokens, loss in zip(texts, documents.tokens, documents.losses(tiny), strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            mean = float(tiny(input_ids=ids, labels=ids).loss)
        assert tokens == ids.numel() - 1
        assert loss == pytest.approx(mean * tokens, rel=1e-5)


@pytest.mark.parametrize("length", [7, 16])
def test_windows_score_every_token_once(tiny, tokenizer, paragraphs, length):
    documents = Documents.of(tokenizer, paragraphs[:3], length=length, batch=4)
    ids = [tokenizer.bos_token_id, *tokenizer(paragraphs[0])["input_ids"]]
    expected = 0.0
    for start in range(0, len(ids) - 1, length):
        window = torch.tensor([ids[start : start + length + 1]])
        with torch.no_grad():
            loss = tiny(input_ids=window, labels=window).loss
        expected += float(loss) * (window.numel() - 1)
    assert documents.losses(tiny)[0] == pytest.approx(expected, rel=1e-5)


def test_tokens_per_document_cuts(tokenizer, paragraphs):
    documents = Documents.of(tokenizer, paragraphs[:4], tokens_per_document=9)
    assert np.array_equal(documents.tokens, [9, 9, 9, 9])


def test_a_text_without_tokens_is_refused(tokenizer):
    with pytest.raises(DataError, match="no document to score"):
        Documents.of(tokenizer, ["", ""])


@pytest.mark.parametrize(
    ("sizes", "total", "share"),
    [([5, 5, 5], 100, 5), ([5, 5, 5], 9, 3), ([2, 10, 10], 12, 5), ([1, 1], 1, 1)],
)
def test_a_bounded_text_takes_as_many_tokens_of_each_document(sizes, total, share):
    assert _share(sizes, total) == share


def test_a_bounded_text_has_no_more_tokens(tokenizer, splits):
    found = Documents.of(tokenizer, splits.calibration, most_tokens=700)
    assert found.tokens.sum() <= 700
    assert len(found.tokens) == 10
    assert found.tokens.min() >= 40
