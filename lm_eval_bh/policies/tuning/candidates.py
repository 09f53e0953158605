"""The candidates of a search: families of policies with one member per cost.

They follow from the declarations of methods and gains, so new ones are tried automatically.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.policies.cost import DISTINCT, EXPERTS, Cost
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.declared import known_to
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.declare import Parameter
from lm_eval_bh.routing.methods.gains import PARAMETERS as GAINS
from lm_eval_bh.routing.methods.scores import STATISTICS
from lm_eval_bh.routing.tables.null_kind import NullKind

MASSES: tuple[float, ...] = GAINS["mass"].tries or ()  # of the compensated static controls
WINNER = "min_w benefit mass 0.2"  # won on tiny-olmoe at every mean tried
WINNER_OF_STEPS = "batch_min_w benefit mass 0.2"  # won at every number of distinct experts tried
# One null distribution per model makes p-values of absolute scores comparable across layers.
OF_THE_MODEL = {"null_scope": "model", "null_from": "unselected"}

Allocate = Callable[[int], RoutingConfig]


@dataclass(frozen=True)
class Family:
    """Policies that differ only in cost.

    Attributes
    ----------
    name : str
        Name in tables, which :func:`named` parses.
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
        """The kind of null model that it needs, shared with tests that use the same factors."""
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

    @property
    def rung(self) -> str | None:
        """The integer parameter in which its members differ, if none is solved."""
        method = METHODS[self.options["rule"]]
        if DISTINCT.target in known_to(method):
            return None
        names = ("max_k",) if method.fixed_count else ("step_budget", "k0")
        known = {*method.declared, "max_k"} - self.options.keys()
        return next((name for name in names if name in known), None)

    def at(
        self, amount: float, native: int, cost: Cost = EXPERTS, decode_batch: int | None = None
    ) -> RoutingConfig:
        """Return the member with a cost; static families round their parameter.

        Raises
        ------
        ParameterError
            If the method has no parameter to solve for that cost.
        """
        options = {"max_k": native, "decode_batch": decode_batch} | self.options
        known = known_to(METHODS[self.options["rule"]])
        if cost.target in known:
            return RoutingConfig(**options, **{cost.target: amount})
        if cost is EXPERTS and self.adaptive:
            raise ParameterError(
                f"rule={self.options['rule']} cannot be solved for a mean number of experts per "
                "token: leave it out, or give its own target to hf-bh."
            )
        if self.rung is None:
            return RoutingConfig(**options)  # unchanged
        return RoutingConfig(**options | {self.rung: max(1, round(amount))})


def static(mass: float | None = None) -> Family:
    """Return static top-k, optionally with compensation."""
    family = Family("topk", {"rule": "topk"})
    return family if mass is None else gained(family, "mass", mass)


def published() -> list[Family]:
    """Return every method with its own defaults."""
    return [Family(name, {"rule": name}) for name in METHODS]


def adaptive_families() -> list[Family]:
    """Return the families whose number of experts depends on the token, without gains.

    Every solvable method with each of its statistics. Tests of absolute scores share one null
    distribution for all layers: with one per layer they lose far more. A method that runs experts
    in order to decide saves nothing: it is a bound for the others, and no candidate.
    """
    found = []
    for family in published():
        method = METHODS[family.options["rule"]]
        solvable = not method.fixed_count and "target_experts" in known_to(method)
        if solvable and not method.runs_experts:
            found += _with_statistics(family)
    return found


def step_families() -> list[Family]:
    """Return the families that decide about a step's tokens together, without gains."""
    joint = [family for family in published() if METHODS[family.options["rule"]].joint]
    return [member for family in joint for member in _with_statistics(family)]


def _with_statistics(family: Family) -> list[Family]:
    method = METHODS[family.options["rule"]]
    if "statistic" not in method.declared:
        return [family]
    names = [name for name, row in STATISTICS.items() if row.table]
    names = ["weight", *names] if method.tests else names
    return [family, *(with_statistic(family, name) for name in names)]


def with_statistic(family: Family, name: str) -> Family:
    """Return a family with another statistic."""
    tests = METHODS[family.options["rule"]].tests
    options = {"statistic": name} | (OF_THE_MODEL if tests and name != "logit" else {})
    return Family(f"{family.name} {name}", family.options | options)


def gained(family: Family, gain: str, value: Any) -> Family:
    """Return a family with a gain."""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return Family(f"{family.name} {gain} {shown}", family.options | {gain: value})


def gains_of(family: Family) -> list[Family]:
    """Return a family with each gain to try."""
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


def winner(cost: Cost = EXPERTS) -> Family:
    """Return the recipe that may replace a search."""
    return named(WINNER_OF_STEPS if cost is DISTINCT else WINNER)


def named(name: str) -> Family:
    """Parse a family's name: method, statistic, then parameters with their values.

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
            what = "lacks its value" if word in known else "is not a statistic or parameter of it"
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
