"""What is tried: families of policies, each with one member for every mean number of experts.

All of them follow from what methods and gains declare, so that a new one is asked like the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.declared import known_to
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.declare import Parameter
from lm_eval_bh.routing.methods.gains import PARAMETERS as GAINS
from lm_eval_bh.routing.methods.scores import STATISTICS
from lm_eval_bh.routing.tables.null_kind import NullKind

MASSES: tuple[float, ...] = GAINS["mass"].tries or ()  # of the compensated static controls
WINNER = "min_w benefit mass 0.2"  # what won on tiny-olmoe at every mean that was tried
# One null distribution for the model makes p-values of absolute scores comparable between layers.
OF_THE_MODEL = {"null_scope": "model", "null_from": "unselected"}

Allocate = Callable[[int], RoutingConfig]


@dataclass(frozen=True)
class Family:
    """Policies that differ in their mean number of experts alone.

    Attributes
    ----------
    name : str
        For tables; :func:`named` reads it.
    options : dict
        Parameters of the RoutingConfig.
    """

    name: str
    options: dict[str, Any]

    @property
    def adaptive(self) -> bool:
        """Whether the number of experts depends on the token."""
        return RoutingConfig(**self.options).adaptive

    @property
    def null_kind(self) -> NullKind | None:
        """What null model serves it: of factors alone, the one that tests of them take too."""
        config = RoutingConfig(**self.options)
        if not config.needs_null:
            return None
        kind = config.null_kind
        return dataclasses.replace(
            kind,
            trim=kind.trim or 0,
            null_scope=kind.null_scope or OF_THE_MODEL["null_scope"],
            null_from=kind.null_from or OF_THE_MODEL["null_from"],
        )

    def at(self, mean: float, native: int) -> RoutingConfig:
        """Return the member with a mean number of experts; a static one takes the nearest.

        Raises
        ------
        ParameterError
            If the method has no parameter that is solved for a mean.
        """
        if not self.adaptive:
            return RoutingConfig(**self.options, max_k=max(1, round(mean)))
        if "target_experts" not in known_to(METHODS[self.options["rule"]]):
            raise ParameterError(
                f"rule={self.options['rule']} is solved for no mean number of experts of a token: "
                "leave it out, or give its own target to hf-bh."
            )
        return RoutingConfig(**self.options, target_experts=mean, max_k=native)


def static(mass: float | None = None) -> Family:
    """Return static top-k, without or with compensation."""
    family = Family("topk", {"rule": "topk"})
    return family if mass is None else gained(family, "mass", mass)


def published() -> list[Family]:
    """Return every method as it declares itself."""
    return [Family(name, {"rule": name}) for name in METHODS]


def adaptive_families() -> list[Family]:
    """Return the families whose number of experts depends on the token, but for gains.

    Every method that a mean is solved for, with every statistic that it takes. Tests of absolute
    scores have one null distribution for all layers: with one for each they lose far more.
    """
    found = []
    for family in published():
        method = METHODS[family.options["rule"]]
        if method.fixed_count or "target_experts" not in known_to(method):
            continue
        found.append(family)
        if "statistic" in method.declared:
            names = [name for name, row in STATISTICS.items() if row.table]
            names = ["weight", *names] if method.tests else names
            found += [with_statistic(family, name) for name in names]
    return found


def with_statistic(family: Family, name: str) -> Family:
    """Return a family on another statistic."""
    tests = METHODS[family.options["rule"]].tests
    options = {"statistic": name} | (OF_THE_MODEL if tests and name != "logit" else {})
    return Family(f"{family.name} {name}", family.options | options)


def gained(family: Family, gain: str, value: Any) -> Family:
    """Return a family whose kept weights get a gain."""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return Family(f"{family.name} {gain} {shown}", family.options | {gain: value})


def gains_of(family: Family) -> list[Family]:
    """Return a family with each gain that is worth a try."""
    return [
        gained(family, gain, value)
        for gain, parameter in GAINS.items()
        if gain not in family.options
        for value in _tries(parameter)
    ]


def _tries(parameter: Parameter) -> tuple[Any, ...]:
    if parameter.tries is not None:
        return parameter.tries
    return tuple(value for value in parameter.values if value != parameter.default)


def winner() -> Family:
    """Return the recipe that a search may be skipped for."""
    return named(WINNER)


def named(name: str) -> Family:
    """Return the family of a name: a method, then its statistic, then parameters with their values.

    Raises
    ------
    ParameterError
        If the method or a word is unknown, or a value is not allowed.

    Examples
    --------
    >>> named("min_w benefit mass 0.2").options
    {'rule': 'min_w', 'statistic': 'benefit', 'mass': 0.2}
    """
    rule, *words = name.split() or [""]
    if rule not in METHODS:
        raise ParameterError(
            f"There is no method {rule!r}{did_you_mean(rule, METHODS)}: use {', '.join(METHODS)}."
        )
    known = known_to(METHODS[rule])
    family = Family(rule, {"rule": rule})
    while words:
        word = words.pop(0)
        if word in STATISTICS and "statistic" in known:
            family = with_statistic(family, word)
        elif word in known and words:
            family = gained(family, word, _value(words.pop(0)))
        else:
            what = "lacks its value" if word in known else "is no statistic or parameter of it"
            hint = did_you_mean(word, [*STATISTICS, *known])
            raise ParameterError(
                f"{word!r} in the method {name!r} {what}{hint}: give names such as {WINNER!r}."
            )
    RoutingConfig(**family.options)
    return family


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(text, text)
