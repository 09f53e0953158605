"""Paragraphs of text files as documents, without repetitions where they must be unseen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lm_eval_bh.errors import DataError

_BETWEEN = re.compile(r"\n\s*\n")  # a line of spaces counts as empty


def read_paragraphs(path: Path) -> list[str]:
    """Return the paragraphs of a text file, which are its documents.

    Raises
    ------
    DataError
        If it is not a regular file, which might never end, or is not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise DataError(
                f"The text {str(path)!r} could not be read (it is not a file); give a UTF-8 text "
                "file."
            )
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"The text {str(path)!r} could not be read ({reason}); give a UTF-8 text file."
        ) from error
    return split_paragraphs(text)


def split_paragraphs(text: str) -> list[str]:
    """Return the parts of a text between empty lines."""
    parts = _BETWEEN.split(text.removeprefix("\ufeff"))
    return [part.strip("\n") for part in parts if part.strip()]


def unseen(*parts: Sequence[str]) -> tuple[list[list[str]], int]:
    """Return texts without paragraphs that occurred before, and the number left out.

    Paragraphs that differ only in spaces or capitals count as equal.
    """
    seen: set[str] = set()
    kept: list[list[str]] = []
    for part in parts:
        kept.append([])
        for document in part:
            known = " ".join(document.split()).casefold()
            if known not in seen:
                kept[-1].append(document)
            seen.add(known)
    return kept, sum(map(len, parts)) - sum(map(len, kept))
