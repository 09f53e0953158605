"""Parameter names: aliases, unknown names, and messages for invalid values."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.routing.methods.declare import Parameter, integer

# Earlier or shorter names, and the current ones.
ALIASES = {
    "null": "null_scope",
    "kde": "null_model",
    "experts": "experts_implementation",
}

P = ParamSpec("P")
R = TypeVar("R")


def checked(parameter: Parameter, name: str, value: Any) -> Any:
    """Return the value to store.

    Raises
    ------
    ParameterError
        If it is not allowed.
    """
    try:
        return parameter.checked(name, value)
    except ValueError as error:
        raise ParameterError(str(error)) from None


def checked_integer(name: str, value: Any, must: str, least: int, most: int = 2**31) -> int:
    """Return an integer from ``least`` to ``most``.

    Raises
    ------
    ParameterError
        If it is anything else; the message says what it ``must`` be.
    """
    found: int = checked(Parameter(None, "", *integer(must, least, most)), name, value)
    return found


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
    """Let a function accept aliases of its keyword arguments, and refuse unknown ones.

    Raises
    ------
    ParameterError
        When the function is called with an unknown name.
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
