"""How a method declares its parameters: each with its default, its help and its check."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, or of routing.

    Attributes
    ----------
    default : any
        Value if none is given.
    help : str
        Meaning, as a phrase.
    check : callable
        Returns the value to store; raises ValueError or TypeError if it is not allowed.
    must : str
        What a value must be, to complete "must be ..."; empty for one of ``values``.
    values : collection
        Allowed names, if it takes names; the collection may grow.
    tries : tuple or None
        Values that a search tries beside the default; None tries all of ``values``.
    """

    default: Any
    help: str
    check: Callable[[Any], Any]
    must: str
    values: Collection[Any] = ()
    tries: tuple[Any, ...] | None = None

    def checked(self, name: str, value: Any) -> Any:
        """Return the value to store.

        Raises
        ------
        ValueError
            If it is not allowed; the message says what is.
        """
        try:
            return self.check(value)
        except (ValueError, TypeError, OverflowError):
            names = [str(known) for known in self.values]
            must = self.must or f"{', '.join(names[:-1])} or {names[-1]}"
            hint = did_you_mean(value[:40], names) if isinstance(value, str) else ""
            raise ValueError(f"{name} must be {must}: found {_shown(value)}{hint}.") from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint such as ``" (did you mean 'alpha'?)"``, or ``""`` if no name is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def number(must: str, allowed: Callable[[float], bool]) -> tuple[Any, ...]:
    """Return the check of a finite number; ints and NumPy scalars count, bools do not."""

    def check(value: Any) -> Any:
        value = _scalar(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError
        found = value if isinstance(value, int | float) else float(value)
        if not math.isfinite(found) or not allowed(found):
            raise ValueError
        return found

    return check, must


def integer(must: str, least: int, most: int = 2**31) -> tuple[Any, ...]:
    """Return the check of an integer; NumPy integers count, bools do not."""

    def check(value: Any) -> int:
        value = _scalar(value)
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
        if not least <= found <= most:
            raise ValueError
        return found

    return check, must


def choice(values: Collection[Any], renamed: Mapping[str, str] | None = None) -> tuple[Any, ...]:
    """Return the check of a choice among names; ``renamed`` maps earlier names."""

    def check(value: Any) -> Any:
        found = _scalar(value)
        if isinstance(found, str):
            found = (renamed or {}).get(found, str(found))
        if not any(type(found) is type(known) and found == known for known in values):
            raise ValueError
        return found

    return check, "", values


def or_none(check: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a check that also accepts None."""
    return lambda value: None if value is None else check[0](value), *check[1:]


def tried(check: tuple[Any, ...], *values: Any) -> tuple[Any, ...]:
    """Return a check, with the values that a search tries beside the default."""
    return *check, *([()] * (3 - len(check))), values


def counts(value: Any) -> str:
    """Return numbers of experts joined by '-'; a list of integers is joined."""
    if isinstance(value, (list, tuple)):
        value = "-".join(str(operator.index(k)) for k in value)
    if isinstance(value, bool) or not re.fullmatch(r"[1-9]\d{0,8}(-[1-9]\d{0,8})*", str(value)):
        raise ValueError
    return str(value)


def level(meaning: str, default: float = 0.05) -> Parameter:
    """Declare ``alpha``, a number strictly between 0 and 1."""
    must = "a number strictly between 0 and 1"
    return Parameter(default, meaning, *number(must, lambda value: 0 < value < 1))


def _scalar(value: Any) -> Any:
    """Return the Python value of a scalar of NumPy or PyTorch, and anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _shown(value: Any) -> str:
    """Return a shortened repr of a value; integers too long to print are described."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
