"""The parameters of routing, checked in one place."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.routing.nulls.null_header import check_kind
from lm_eval_bh.routing.rules.registry import RULES

MODES = ("patch", "analyze")


@dataclass(frozen=True)
class RoutingConfig:
    """How the experts of a token are selected; every value is checked when the object is made.

    Attributes
    ----------
    alpha : float
        The rule's one parameter, in (0, 1): the level of a multiple-testing procedure; for
        ``top_p`` the share of the weight to hold, for ``min_p`` the share of the largest weight to
        reach. One name for all, so that sweeps, logs and tables have one column for it.
    rule : str
        Name of a selection rule, see :data:`lm_eval_bh.routing.rules.registry.RULES`.
    min_k, max_k : int
        Fewest and most experts of a token; ``1 <= min_k <= max_k``.
    temperature : float
        Divides the router logits before the softmax of the weights; it never touches p-values.
    renormalize : "auto" or bool
        Whether the selected weights are rescaled to sum to one; "auto" follows the model.
    mode : "patch" or "analyze"
        Whether the selection replaces the model's own or is only counted beside it.
    layers : str
        Which MoE layers: "all", "last4", "first2", "0-7", "3", or a "+"-joined list of these.
    statistic : "logit" or "contribution"
        What is tested, shared out and ranked: router logits, or the log of softmax weight times the
        expert's calibrated output norm.
    null : "pooled" or "expert"
        Whether all experts of a layer share one null distribution, or each has its own; then the
        experts with the smallest p-values serve, which need not be those with the largest logits.
    trim : int or None
        How many of each token's largest and smallest statistics the null model leaves out; None
        takes any null model that is given, and 0 where one is looked for.
    seed : int
        Of the rule ``random_k``.
    target_experts : float or None
        The mean number of experts a token, for which alpha is then solved on calibration text.
    budget : "model" or "layer"
        Whether the target is met by one alpha on the mean over layers, or in every layer by its
        own.

    Raises
    ------
    ParameterError
        If a value is out of range or of the wrong type.
    """

    alpha: float = 0.05
    rule: str = "bh"
    min_k: int = 1
    max_k: int = 8
    temperature: float = 1.0
    renormalize: Literal["auto"] | bool = "auto"
    mode: str = "patch"
    layers: str = "all"
    statistic: str = "logit"
    null: str = "pooled"
    trim: int | None = None
    seed: int = 0
    target_experts: float | None = None
    budget: str = "model"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ParameterError(
                f"rule={self.rule!r} is not a selection rule: choose one of {', '.join(RULES)}"
                f"{did_you_mean(str(self.rule), RULES)}."
            )
        if self.mode not in MODES:
            raise ParameterError(f"mode={self.mode!r} is unknown: choose 'patch' or 'analyze'.")
        if not _is_number(self.alpha) or not 0 < self.alpha < 1:
            raise ParameterError(
                f"alpha={self.alpha!r} is not a level: give a number strictly between 0 and 1."
            )
        for name in ("min_k", "max_k"):
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise ParameterError(
                    f"{name}={value!r} is not a number of experts: give an integer of at least 1."
                )
        if self.max_k < self.min_k:
            raise ParameterError(
                f"max_k={self.max_k} is less than min_k={self.min_k}: raise max_k or lower min_k."
            )
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise ParameterError(
                f"temperature={self.temperature!r} is not a temperature: give a positive number."
            )
        if self.renormalize != "auto" and not isinstance(self.renormalize, bool):
            raise ParameterError(
                f"renormalize={self.renormalize!r} is unknown: choose 'auto', True or False."
            )
        part = r"(all|(first|last)[1-9]\d*|\d+(-\d+)?)"
        if not re.fullmatch(rf"{part}(\+{part})*", str(self.layers)):
            raise ParameterError(
                f"layers={self.layers!r} names no layers: write all, last4, first2, 0-7, 3, "
                "or several of these joined by '+'."
            )
        self._check_statistic()
        self._check_target()

    def _check_statistic(self) -> None:
        check_kind(self.statistic, self.null)
        for name in ("trim", "seed"):
            value = getattr(self, name)
            if value is not None and not (_is_integer(value) and 0 <= value < 2**32):
                raise ParameterError(
                    f"{name}={value!r} is out of range: give an integer from 0 to {2**32 - 1}."
                )
        rule = RULES[self.rule]
        for name, meaningless, why in (
            ("null", self.null != "pooled" and not rule.tests, "which tests nothing"),
            ("trim", self.trim is not None and not rule.tests, "which tests nothing"),
            ("statistic", self.statistic != "logit" and rule.random, "which draws experts"),
            ("seed", self.seed != 0 and not rule.random, "which draws nothing"),
        ):
            if meaningless:
                raise ParameterError(
                    f"{name}={getattr(self, name)!r} has no meaning with rule={self.rule}, {why}: "
                    "leave it out."
                )

    def _check_target(self) -> None:
        if self.budget not in ("model", "layer"):
            raise ParameterError(f"budget={self.budget!r} is unknown: choose 'model' or 'layer'.")
        target = self.target_experts
        if target is None:
            if self.budget == "layer":
                raise ParameterError(
                    "budget='layer' has no meaning without target_experts: "
                    "give the mean number of experts that every layer shall have."
                )
            return
        if not self.adaptive:
            raise ParameterError(
                f"target_experts={target!r} has no meaning with rule={self.rule}, which always "
                "takes max_k experts: give max_k instead."
            )
        if not _is_number(target) or not self.min_k < target < self.max_k:
            raise ParameterError(
                f"target_experts={target!r} is no mean number of experts between "
                f"min_k={self.min_k} and max_k={self.max_k}: give one that is."
            )

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
        return RULES[self.rule].tests or self.statistic != "logit"

    @property
    def ranks_by_logit(self) -> bool:
        """Whether the experts that serve are those with the largest router logits."""
        return self.statistic == "logit" and self.null == "pooled" and not RULES[self.rule].random

    @property
    def needs_softmax(self) -> bool:
        """Whether it is only defined for routers whose weights are a softmax of the logits."""
        rule = RULES[self.rule]
        return not self.ranks_by_logit or not (rule.fixed_count or rule.tests)

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
        return sorted(chosen)

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, as it is written to results."""
        return dataclasses.asdict(self)


def grid_of(
    rules: Iterable[str], alphas: Iterable[float], max_ks: Iterable[int], **others: Any
) -> list[RoutingConfig]:
    """Return every combination, each with what has a meaning for its rule.

    Rules without a parameter take neither alpha nor ``others``; rules without a test take no
    ``null`` and no ``trim``.

    Raises
    ------
    ParameterError
        If a value is out of range, or there is no combination.
    """
    alphas, max_ks = list(alphas), list(max_ks)
    configs = []
    for name in rules:
        adaptive = RoutingConfig(rule=name).adaptive
        foreign = () if RULES[name].tests else ("null", "trim")
        fitting = {key: value for key, value in others.items() if key not in foreign}
        if not adaptive:
            configs += [RoutingConfig(rule=name, max_k=max_k) for max_k in max_ks]
            continue
        for alpha, max_k in itertools.product(alphas, max_ks):
            configs.append(RoutingConfig(alpha=alpha, rule=name, max_k=max_k, **fitting))
    if not configs:
        raise ParameterError("The grid is empty: give at least one rule, level and max_k.")
    return configs


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_layer(layer: int, num_layers: int, pattern: str) -> None:
    if not 0 <= layer < num_layers:
        raise ParameterError(
            f"layers={pattern!r} reaches beyond the model's {num_layers} MoE layers: "
            f"the first is 0, the last {num_layers - 1}."
        )
