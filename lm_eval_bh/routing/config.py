"""The parameters of routing, declared and checked in one place."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.routing.nulls.null_kind import NULL_FROM, NULL_SCOPES, NullKind
from lm_eval_bh.routing.parameters import (
    Parameter,
    accepts,
    canonical,
    choice,
    integer,
    number,
    or_none,
    parameter,
    parameters_of,
)
from lm_eval_bh.routing.rules.registry import RULES, Rule
from lm_eval_bh.routing.scores.statistic import STATISTICS

_ALPHA = "a number strictly between 0 and 1, or with rule=min_w a positive number"
_LAYERS = r"(all|(first|last)[1-9]\d{0,8}|\d{1,9}(-\d{1,9})?)"
_SEEDS = f"an integer from 0 to {2**32 - 1}"


def _layers(value: Any) -> str:
    if isinstance(value, bool) or not re.fullmatch(rf"{_LAYERS}(\+{_LAYERS})*", str(value)):
        raise ValueError
    return str(value)


def _counts(value: Any) -> str:
    """Return numbers joined by '-'; a list of integers is joined."""
    if isinstance(value, (list, tuple)):
        value = "-".join(str(operator.index(k)) for k in value)
    if isinstance(value, bool) or not re.fullmatch(r"[1-9]\d{0,8}(-[1-9]\d{0,8})*", str(value)):
        raise ValueError
    return str(value)


def _tests(rule: Rule) -> bool:
    return rule.tests


@dataclass(frozen=True)
class RoutingConfig:
    """How the experts of a token are selected; every value is checked when the object is made.

    The help of each field says what it means. Everything that takes parameters of routing (the
    integration, ``hf-bh``, sweeps, the command line) takes these, by these names or by their
    :data:`~lm_eval_bh.routing.parameters.ALIASES`, see :meth:`of`.

    Raises
    ------
    ParameterError
        If a value is out of range or of the wrong type, or has no meaning beside another one.
    """

    alpha: float = parameter(
        0.05,
        "the rule's one parameter: the level of a test; the share of the weight for `top_p`, of "
        "the largest weight for `min_p`; the weight itself for `min_w`",
        number(_ALPHA, lambda value: value > 0),
    )
    rule: str = parameter("bh", "the selection rule, see *Selection rules*", choice(RULES))
    min_k: int = parameter(
        1, "fewest experts of a token", integer("an integer number of experts, 1 or more", 1)
    )
    max_k: int = parameter(
        8,
        "most experts of a token; equal to `min_k` it is exactly the model with that top-k",
        integer("an integer number of experts, 1 or more", 1),
    )
    temperature: float = parameter(
        1.0,
        "divides the router logits in the softmax of the weights; never touches p-values",
        # Below, the logits of a token overflow, and its weights are NaN.
        number("a positive number, at least 1e-30", lambda value: value >= 1e-30),
    )
    renormalize: Literal["auto"] | bool = parameter(
        "auto",
        "whether the selected weights are rescaled to sum to one; `auto` follows the model "
        "(OLMoE: no)",
        choice(["auto", True, False]),
    )
    mode: str = parameter(
        "patch",
        "`patch` routes by the selection; `analyze` leaves the model as it is and only counts",
        choice(["patch", "analyze"]),
    )
    layers: str = parameter(
        "all",
        "which MoE layers: `all`, `last4`, `first2`, `0-7`, `3`, or several joined by `+`",
        (_layers, "all, last4, first2, 0-7, 3, or several of these joined by '+'"),
    )
    statistic: str = parameter(
        "logit",
        "what is tested, shared out and ranked: the router `logit`; the log of the softmax "
        "`weight`; or the log of the weight times the expert's mean output norm (`contribution`), "
        "the root mean square of its effect on the loss (`benefit`), or the norm that the hidden "
        "state predicts (`predicted`)",
        choice(STATISTICS),
        serves=lambda rule: not rule.random,
        why_not="which draws experts",
    )
    null_scope: str = parameter(
        "layer",
        "what one null distribution is fitted to: each `layer`, each `expert` (then the smallest "
        "p-values serve), or the whole `model`",
        choice(NULL_SCOPES, {"pooled": "layer"}),
        serves=_tests,
        why_not="which tests nothing",
    )
    null_from: str = parameter(
        "all",
        "which experts the null distribution is made of: `all`, or those below the native top-k of "
        "each token (`unselected`)",
        choice(NULL_FROM),
        serves=_tests,
        why_not="which tests nothing",
    )
    family: str = parameter(
        "token",
        "which hypotheses are tested together: those of a `token`, or `all` decisions on "
        "calibration text, which gives one fixed threshold",
        choice(["token", "all"]),
        serves=lambda rule: rule.name == "bh",
        why_not="which is not Benjamini-Hochberg",
    )
    k_per_layer: str | None = parameter(
        None,
        "for `topk`, as many experts in each routed layer: `5-3-3-5`",
        or_none((_counts, "numbers of experts joined by '-', such as 5-3-3-5")),
        serves=lambda rule: rule.fixed_count and not rule.random,
        why_not="which does not take a fixed number of the best experts",
    )
    mass: float | None = parameter(
        None,
        "what kept weights are multiplied by: (sum of the native top-k's weights / their sum) to "
        "this power, 0 to 1",
        or_none(number("a number from 0 to 1", lambda value: 0 <= value <= 1)),
    )
    trim: int | None = parameter(
        None,
        "how many of each token's largest, and as many of its smallest, scores the null "
        "distribution leaves out; default: any of a given file, else 0",
        or_none(integer(_SEEDS, 0, 2**32 - 1)),
        serves=_tests,
        why_not="which tests nothing",
    )
    seed: int = parameter(
        0,
        "seed of `random_k`",
        integer(_SEEDS, 0, 2**32 - 1),
        serves=lambda rule: rule.random,
        why_not="which draws nothing",
    )
    target_experts: float | None = parameter(
        None,
        "the mean number of experts of a token that alpha is solved for, on calibration text",
        or_none(number("a number of experts", lambda value: value > 0)),
        serves=lambda rule: not rule.fixed_count,
        why_not="which always takes max_k experts: give max_k instead",
    )
    budget: str = parameter(
        "model",
        "whether `target_experts` is met on the mean over the `model`, or in every `layer` by an "
        "alpha of its own",
        choice(["model", "layer"]),
        serves=lambda rule: not rule.fixed_count,
        why_not="which always takes max_k experts",
    )

    def __post_init__(self) -> None:
        for name, declared in PARAMETERS.items():
            object.__setattr__(self, name, declared.checked(name, getattr(self, name)))
        rule = RULES[self.rule]
        for name, declared in PARAMETERS.items():
            value = getattr(self, name)
            if value != _DEFAULTS[name] and not declared.serves(rule):
                advice = "" if ":" in declared.why_not else ": leave it out"
                raise ParameterError(
                    f"{name}={value!r} has no meaning with rule={self.rule}, "
                    f"{declared.why_not}{advice}."
                )
        if self.alpha >= rule.most:
            raise ParameterError(
                f"alpha must be a number strictly between 0 and 1 with rule={self.rule}: "
                f"found {self.alpha!r}."
            )
        if self.k_per_layer is not None:
            if self.max_k != _DEFAULTS["max_k"] and self.max_k != max(self.counts_per_layer):
                raise ParameterError(
                    f"max_k={self.max_k} contradicts k_per_layer={self.k_per_layer}: leave it out."
                )
            object.__setattr__(self, "max_k", max(self.counts_per_layer))
        if self.mass is not None and self.renormalize != "auto":
            raise ParameterError(
                f"renormalize={self.renormalize} contradicts mass={self.mass}, which rescales "
                "weights its own way (0 not at all, 1 to the native sum): give one of them."
            )
        if self.family == "all" and self.budget == "layer":
            raise ParameterError(
                "budget='layer' contradicts family='all', whose layers share one threshold: "
                "give one of them."
            )
        if self.max_k < self.min_k:
            raise ParameterError(
                f"max_k={self.max_k} is less than min_k={self.min_k}: raise max_k or lower min_k."
            )
        target = self.target_experts
        if target is None and self.budget == "layer":
            raise ParameterError(
                "budget='layer' has no meaning without target_experts: "
                "give the mean number of experts that every layer shall have."
            )
        if target is not None and not self.min_k < target < self.max_k:
            raise ParameterError(
                f"target_experts must lie between min_k={self.min_k} and max_k={self.max_k}: "
                f"found {target!r}."
            )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> RoutingConfig:
        """Return the configuration of some parameters, by their names or aliases.

        Raises
        ------
        ParameterError
            If one is unknown, given twice, or out of range.
        """
        named = canonical(given)
        if unknown := [name for name in named if name not in PARAMETERS]:
            raise ParameterError(unknown_name(unknown[0]))
        return cls(**named)

    @property
    def null_kind(self) -> NullKind:
        """What null model it needs; what may be anything is None."""
        return NullKind(
            self.scored_by,
            self.null_scope if self.tests else None,
            self.trim,
            self.null_from if self.tests else None,
        )

    @property
    def tests(self) -> bool:
        """Whether the rule compares p-values."""
        return RULES[self.rule].tests

    @property
    def at_work(self) -> Rule:
        """The rule that routes: over a family of all decisions a test is one fixed threshold."""
        return RULES["p_value" if self.family == "all" else self.rule]

    @property
    def solves(self) -> bool:
        """Whether a parameter has to be solved on calibration text."""
        return self.target_experts is not None or self.family == "all"

    @property
    def scored_by(self) -> str:
        """The statistic; a rule with a threshold on weights takes the weight for the logit."""
        return "weight" if RULES[self.rule].weighs and self.statistic == "logit" else self.statistic

    @property
    def counts_per_layer(self) -> list[int]:
        """The numbers of ``k_per_layer``."""
        return [int(k) for k in (self.k_per_layer or "").split("-") if k]

    def for_layer(self, layer: int, num_layers: int) -> RoutingConfig:
        """Return the configuration of one of the routed layers, with its own number of experts."""
        if self.k_per_layer is None:
            return self
        k = self.counts_per_layer[self.select_layers(num_layers).index(layer)]
        return dataclasses.replace(self, k_per_layer=None, max_k=k)

    @property
    def adaptive(self) -> bool:
        """Whether the number of experts depends on the token."""
        return not RULES[self.rule].fixed_count

    @property
    def fixed_count(self) -> bool:
        """Whether every token gets ``max_k`` experts: by its rule, or as the bounds are equal."""
        return not self.adaptive or self.min_k == self.max_k

    @property
    def needs_null(self) -> bool:
        """Whether a null model is needed: for p-values, or for output norms."""
        return self.tests or bool(STATISTICS[self.statistic].factors)

    @property
    def ranks_by_logit(self) -> bool:
        """Whether the experts that serve are those with the largest router logits."""
        return (
            self.statistic in ("logit", "weight")
            and self.null_scope != "expert"
            and not RULES[self.rule].random
        )

    @property
    def needs_softmax(self) -> bool:
        """Whether it is only defined for routers whose weights are a softmax of the logits."""
        rule = RULES[self.rule]
        return (
            not self.ranks_by_logit
            or self.statistic != "logit"
            or not (rule.fixed_count or rule.tests)
        )

    def check_experts(self, num_experts: int) -> None:
        """Raise :class:`ParameterError` if a layer has too few experts for ``max_k``."""
        if self.max_k > num_experts:
            raise ParameterError(
                f"max_k={self.max_k} is more than the model's {num_experts} experts: "
                f"give a max_k of at most {num_experts}."
            )

    def select_layers(self, num_layers: int) -> list[int]:
        """Return the sorted positions, among ``num_layers`` MoE layers, that ``layers`` names."""
        chosen: set[int] = set()
        for part in self.layers.split("+"):
            if part == "all":
                chosen.update(range(num_layers))
            elif match := re.fullmatch(r"(first|last)(\d+)", part):
                count = int(match[2])
                _check_layer(count - 1, num_layers, self.layers)
                chosen.update(
                    range(count) if match[1] == "first" else range(num_layers - count, num_layers)
                )
            elif match := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
                first, last = int(match[1]), int(match[2] or match[1])
                _check_layer(max(first, last), num_layers, self.layers)
                chosen.update(range(min(first, last), max(first, last) + 1))
        if self.k_per_layer is not None and len(chosen) != len(self.counts_per_layer):
            raise ParameterError(
                f"k_per_layer={self.k_per_layer} must have a number for each of the {len(chosen)} "
                f"routed layers: found {len(self.counts_per_layer)}."
            )
        return sorted(chosen)

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, as it is written to results."""
        return dataclasses.asdict(self)


PARAMETERS: dict[str, Parameter] = parameters_of(RoutingConfig)
# What a dataclass says of an unknown name is a TypeError.
RoutingConfig.__init__ = accepts({})(RoutingConfig.__init__)  # type: ignore[method-assign]
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(RoutingConfig)}


def unknown_name(name: str) -> str:
    """Return the sentence about a parameter that does not exist."""
    return (
        f"{name!r} is not a parameter of routing{did_you_mean(name, PARAMETERS)}: "
        f"use one of {', '.join(PARAMETERS)}."
    )


def serves(name: str, rule: Rule) -> bool:
    """Return whether a parameter has a meaning for a rule; one that is not of routing has."""
    return name not in PARAMETERS or PARAMETERS[name].serves(rule)


def _check_layer(layer: int, num_layers: int, pattern: str) -> None:
    if not 0 <= layer < num_layers:
        raise ParameterError(
            f"layers={pattern!r} reaches beyond the model's {num_layers} MoE layers: "
            f"the first is 0, the last {num_layers - 1}."
        )
