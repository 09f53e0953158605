"""Classes of tokens by their appearance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval_bh.errors import DataError

CLASSES = (
    "word start",
    "continuation",
    "number",
    "punctuation",
    "white space",
    "part of a character",
    "special",
)
UNKNOWN = "unknown"
# How byte-level and SentencePiece tokenizers write the space before a word.
_SPACES = ("Ġ", "▁", " ")


def classify(raw: str, decoded: str, special: bool) -> str:
    r"""Return the class of a token.

    Parameters
    ----------
    raw : str
        The token as in the vocabulary.
    decoded : str
        The token decoded on its own.
    special : bool
        Whether it is a special token, such as the end of a text.

    Examples
    --------
    >>> classify("Ġthe", " the", False), classify("ing", "ing", False), classify("Ċ", "\n", False)
    ('word start', 'continuation', 'white space')
    """
    text = decoded.strip()
    if special:
        return "special"
    if "\ufffd" in decoded:
        return "part of a character"
    if not text:
        return "white space"
    if any(character.isdigit() for character in text):
        return "number"
    if not any(character.isalpha() for character in text):
        return "punctuation"
    return "word start" if raw.startswith(_SPACES) else "continuation"


def vocabulary(tokenizer: Path) -> tuple[list[str], list[str]]:
    """Return text and class of every token of a ``tokenizer.json``, by token id.

    A word starts after a space; the first word of a line counts as a continuation, because its
    token alone does not show it.

    Raises
    ------
    DataError
        If the file cannot be read.
    """
    loaded = _loaded(tokenizer)
    special = {i for i, token in loaded.get_added_tokens_decoder().items() if token.special}
    texts, classes = [], []
    for i in range(loaded.get_vocab_size(with_added_tokens=True)):
        texts.append(loaded.decode([i], skip_special_tokens=False))
        classes.append(classify(loaded.id_to_token(i) or "", texts[-1], i in special))
    return texts, classes


def decoder(tokenizer: Path) -> Callable[[list[int]], str]:
    """Return a decoder of token ids; an unknown id is shown as its number.

    Raises
    ------
    DataError
        If the file cannot be read.
    """
    loaded = _loaded(tokenizer)
    size = loaded.get_vocab_size(with_added_tokens=True)

    def decode(ids: list[int]) -> str:
        if any(not 0 <= token < size for token in ids):
            return "".join(f" {token}" for token in ids)
        return str(loaded.decode(ids, skip_special_tokens=False))

    return decode


def _loaded(tokenizer: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        if tokenizer.exists() and not tokenizer.is_file():  # a pipe would block
            raise OSError("it is not a file")
        loaded = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises nothing more specific
        raise DataError(
            f"The tokenizer {tokenizer} could not be read: {error}; use a tokenizer.json."
        ) from error
    return loaded
