"""Lists on the command line: words joined by commas."""

from __future__ import annotations

from typing import Any

from lm_eval_bh.errors import ParameterError


def words(text: str) -> list[str]:
    """Return the words of a comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(option: str, text: str, kind: type[float] | type[int]) -> list[Any]:
    """Return the numbers of a comma-separated list.

    Raises
    ------
    ParameterError
        If one of them is none; the message names the option.
    """
    try:
        return [kind(word) for word in words(text)]
    except ValueError as error:
        example = "8,16" if kind is int else "0.3,0.4"
        raise ParameterError(
            f"--{option}={text!r} is no list of numbers: join them by commas, as in {example}."
        ) from error
