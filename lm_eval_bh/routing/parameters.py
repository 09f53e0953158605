"""How a parameter is declared: its default, its help, its check, and the rules that it serves.

:class:`~lm_eval_bh.routing.config.RoutingConfig` declares every parameter of routing so, once; the
model arguments of ``hf-bh``, sweeps, the command line and the documentation take it from there.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.routing.rules.registry import Rule

# Earlier or shorter names, and what they stand for.
ALIASES = {
    "null": "null_scope",
    "kde": "null_model",
    "experts": "experts_implementation",
}

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Parameter:
    """What is known of a parameter beside its default.

    Attributes
    ----------
    help : str
        What it means, in a phrase.
    check : callable
        Returns the value as it is kept; raises ValueError or TypeError for one that is not allowed.
    must : str
        What a value must be, to go on after "must be"; empty for one of ``values``.
    values : collection
        What is allowed, where it takes names; it may grow.
    serves : callable
        Whether it has a meaning for a :class:`~lm_eval_bh.routing.rules.registry.Rule`.
    why_not : str
        Why it has none for the others, to go on after the name of the rule.
    """

    help: str
    check: Callable[[Any], Any]
    must: str
    values: Collection[Any] = ()
    serves: Callable[[Rule], bool] = lambda rule: True
    why_not: str = ""

    def checked(self, name: str, value: Any) -> Any:
        """Return the value as it is kept.

        Raises
        ------
        ParameterError
            If it is not allowed.
        """
        try:
            return self.check(value)
        except (ValueError, TypeError, OverflowError):
            names = [str(known) for known in self.values]
            must = self.must or f"{', '.join(names[:-1])} or {names[-1]}"
            hint = did_you_mean(value[:40], names) if isinstance(value, str) else ""
            raise ParameterError(f"{name} must be {must}: found {_shown(value)}{hint}.") from None


def parameter(default: Any, help: str, check: tuple[Any, ...], **meaning: Any) -> Any:
    """Declare a field of a dataclass, from a default, its help and one of the checks below."""
    return dataclasses.field(
        default=default, metadata={"parameter": Parameter(help, *check, **meaning)}
    )


def parameters_of(kind: Any) -> dict[str, Parameter]:
    """Return the parameters that a dataclass declares, by name."""
    return {field.name: field.metadata["parameter"] for field in dataclasses.fields(kind)}


def number(must: str, allowed: Callable[[float], bool]) -> tuple[Any, ...]:
    """Return the check of a finite number; ints and NumPy's scalars are numbers, bools are not."""

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
    """Return the check of an integer; NumPy's are integers, bools are not."""

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
    """Return the check of one of some names; ``renamed`` are earlier ones."""

    def check(value: Any) -> Any:
        found = _scalar(value)
        if isinstance(found, str):
            found = (renamed or {}).get(found, str(found))
        if not any(type(found) is type(known) and found == known for known in values):
            raise ValueError
        return found

    return check, "", values


def or_none(check: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a check that lets None pass."""
    return lambda value: None if value is None else check[0](value), *check[1:]


def canonical(given: Mapping[str, Any], aliases: Mapping[str, str] = ALIASES) -> dict[str, Any]:
    """Return arguments under their own names, aliases replaced.

    Raises
    ------
    ParameterError
        If one parameter is given under two names.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        own = aliases.get(name, name)
        if own in found:
            raise ParameterError(f"{own} is given twice, as {own} and as its alias: give it once.")
        found[own] = value
    return found


def accepts(aliases: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take its keyword arguments under their aliases too, and refuse unknown ones.

    Raises
    ------
    ParameterError
        From the function, if it has no parameter of a name.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = dict(inspect.signature(function).parameters)
        takes = ", ".join(name for name in known if name not in ("self", "cls"))
        owner = function.__qualname__.removesuffix(".__init__")
        takes_any = any(one.kind is one.VAR_KEYWORD for one in known.values())

        @functools.wraps(function)
        def call(*args: P.args, **given: P.kwargs) -> R:
            named = canonical(given, aliases)
            if unknown := [name for name in named if not takes_any and name not in known]:
                raise ParameterError(
                    f"{unknown[0]!r} is not a parameter of {owner}"
                    f"{did_you_mean(unknown[0], known)}: use one of {takes}."
                )
            return function(*args, **named)

        return call

    return decorate


def _scalar(value: Any) -> Any:
    """Return the Python value of a scalar of NumPy or PyTorch, and all else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _shown(value: Any) -> str:
    """Return a value's repr, cut short; numbers too long for one are named as such."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
