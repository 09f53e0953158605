"""Lists on the command line: words joined by commas, in an option that may be repeated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval_bh.errors import ParameterError

SHOWN = 60  # characters of an option in a message


def words(given: Sequence[str]) -> list[str]:
    """Return the words of comma-separated lists."""
    return [word.strip() for text in given for word in text.split(",") if word.strip()]


def words_or_none(given: Sequence[str] | None) -> list[str] | None:
    """Return the words, or None if the option is not used."""
    return words(given) if given else None


def numbers(option: str, given: Sequence[str], kind: type[float] | type[int]) -> list[Any]:
    """Return the numbers of comma-separated lists.

    Raises
    ------
    ParameterError
        If a word is not a number; the message names the option.
    """
    try:
        return [kind(word) for word in words(given)]
    except ValueError as error:
        what, example = ("integers", "8,16") if kind is int else ("numbers", "0.3,0.4")
        text = ",".join(given)
        found = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        raise ParameterError(
            f"--{option} must be {what} joined by commas, not {found!r}; "
            f"use, for example, --{option} {example}."
        ) from error
