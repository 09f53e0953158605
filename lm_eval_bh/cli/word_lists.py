"""Lists on the command line: words joined by commas."""

from __future__ import annotations

from typing import Any

from lm_eval_bh.errors import ParameterError

SHOWN = 60  # characters of an option in a message


def words(text: str) -> list[str]:
    """Return the words of a comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(option: str, text: str, kind: type[float] | type[int]) -> list[Any]:
    """Return the numbers of a comma-separated list.

    Raises
    ------
    ParameterError
        If a word is not a number; the message names the option.
    """
    try:
        return [kind(word) for word in words(text)]
    except ValueError as error:
        what, example = ("integers", "8,16") if kind is int else ("numbers", "0.3,0.4")
        found = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        raise ParameterError(
            f"--{option} must be {what} joined by commas, not {found!r}; "
            f"use, for example, --{option} {example}."
        ) from error
