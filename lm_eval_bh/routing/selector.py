"""A rule made ready for one layer: router logits in, how many experts and which come first out.

For one token with statistics s (its router logits, say) and null distribution F, the p-value of
expert i is ``1 - F(s_i)``. F does not decrease, so comparing the k-th smallest p-value with the
k-th critical value is comparing the k-th largest *statistic* with a threshold that depends only on
the layer. The thresholds are computed once, in float64; what remains for a batch is one sort and
one comparison. Only where every expert has a null distribution of its own are p-values computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.rules.random_k import random_experts
from lm_eval_bh.routing.rules.registry import RULES, Evidence, Ordered, Rule

if TYPE_CHECKING:
    from lm_eval_bh.routing.nulls.null_model import NullModel


class Ranking(Ordered):
    """The statistics of one layer's tokens, sorted; all rules with this null model share it.

    Parameters
    ----------
    router_logits : Tensor
        float ``[tokens, N]``.
    null : NullModel or None
        What the statistic is; None for the logits.
    layer : int
        The layer.
    kind : "pooled" or "expert"
        Whether p-values rank the experts, each under its own distribution, or the statistic does.

    Attributes
    ----------
    ascending : Tensor
        float ``[tokens, N]``, see :class:`~lm_eval_bh.routing.rules.registry.Ordered`.
    order : Tensor or None
        int64 ``[tokens, N]``, the experts in that order; None where it is the order of the logits.
    """

    def __init__(
        self, router_logits: Tensor, null: NullModel | None, layer: int, kind: str = "pooled"
    ) -> None:
        logits = router_logits.detach()
        self.order: Tensor | None = None
        if null is None or null.header.statistic == "logit":
            statistic = logits.to(torch.promote_types(logits.dtype, torch.float32))
        else:
            statistic = null.statistic(layer, logits)
        if null is not None and kind == "expert":
            by_logit = statistic.argsort(dim=-1, descending=True, stable=True)  # for equal p-values
            p_values = null.p_values(layer, logits).gather(-1, by_logit)
            ascending, by_p = p_values.sort(dim=-1, stable=True)
            self.order = by_logit.gather(-1, by_p)
        elif null is not None and null.header.statistic != "logit":
            largest, self.order = statistic.sort(dim=-1, descending=True, stable=True)
            ascending = -largest
        elif logits.device.type == "cpu" and not torch.compiler.is_compiling():
            # Rows of 64 in a 50th of the time that torch.sort takes. It knows ascending order only.
            ascending = torch.from_numpy(np.sort(-statistic.numpy(), axis=-1))
        else:
            ascending = (-statistic).sort(dim=-1).values
        super().__init__(ascending)


class Selector:
    """One layer's rule.

    Parameters
    ----------
    config : RoutingConfig
        The rule, its bounds and its parameter.
    null : NullModel or None
        What p-values are taken from, and what statistic they are of.
    layer, num_experts : int
        The layer, and how many experts it has.
    alpha : float, optional
        The rule's parameter in this layer, in place of the configuration's.
    limits : Tensor, optional
        What :func:`limits_of` says of this rule, if it is known already.

    Raises
    ------
    ParameterError
        If a test is asked for without a null model.
    """

    def __init__(
        self,
        config: RoutingConfig,
        null: NullModel | None,
        layer: int,
        num_experts: int,
        alpha: float | None = None,
        limits: Tensor | None = None,
    ) -> None:
        self.config = config
        self.rule = RULES[config.rule]
        self.alpha = config.alpha if alpha is None else alpha
        self.layer = layer
        self._null = null
        if limits is None:
            [limits] = limits_of([(self.rule, self.alpha)], null, layer, num_experts)
        self._exact = limits
        self._ready: Tensor | None = None

    def __call__(self, router_logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Say how many experts each token gets, and which come first.

        Parameters
        ----------
        router_logits : Tensor
            float ``[tokens, experts]``, finite.

        Returns
        -------
        counts : Tensor
            int64 ``[tokens]``, from ``min_k`` to ``max_k``.
        order : Tensor or None
            int64 ``[tokens, max_k]``, the first experts; None where they are those with the largest
            logits.
        """
        config = self.config
        if self.rule.random:
            return self._full(router_logits), self.draw(router_logits, config.max_k)
        fixed = not self.rule.adaptive or config.min_k == config.max_k
        if fixed and config.ranks_by_logit:
            return self._full(router_logits), None
        ranking = Ranking(router_logits, self._null, self.layer, config.null)
        order = None if ranking.order is None else ranking.order[:, : config.max_k]
        if fixed:
            return self._full(router_logits), order
        return self.rejections(ranking).clamp_(config.min_k, config.max_k), order

    def draw(self, router_logits: Tensor, k: int) -> Tensor:
        """Draw ``k`` experts for every token at random: int64 ``[tokens, k]``."""
        return random_experts(router_logits, k, self.config.seed, self.layer)

    def rejections(self, ranking: Ranking) -> Tensor:
        """Return how many experts the rule calls for, whatever the bounds: int64 ``[tokens]``."""
        assert self.rule.count is not None
        limits = self._limits_for(ranking.ascending)
        return self.rule.count(Evidence(self.alpha, ranking, limits))

    def _full(self, router_logits: Tensor) -> Tensor:
        return torch.full(
            router_logits.shape[:-1],
            self.config.max_k,
            dtype=torch.int64,
            device=router_logits.device,
        )

    def _limits_for(self, ascending: Tensor) -> Tensor | None:
        if self._exact is None:
            return None
        ready = self._ready
        if ready is None or (ready.device, ready.dtype) != (ascending.device, ascending.dtype):
            ready = round_down(self._exact, ascending.dtype).to(ascending.device)
            self._ready = ready
        return ready


def limits_of(
    rules: Sequence[tuple[Rule, float]], null: NullModel | None, layer: int, num_experts: int
) -> list[Tensor | None]:
    """Return what each rule compares sorted statistics, or p-values, with.

    The thresholds of all rules are found together, which takes little longer than those of one.

    Parameters
    ----------
    rules : sequence of (Rule, float)
        Rules and their levels.
    null : NullModel or None
        Where an expert has its own distribution, the critical values themselves are returned.
    layer, num_experts : int
        The layer, and how many experts it has.

    Returns
    -------
    list of (Tensor or None)
        float64 ``[rows, experts]`` on the CPU; None for a rule that tests nothing.

    Raises
    ------
    ParameterError
        If a test is asked for without a null model, or there is no such layer.
    """
    critical = [
        None if rule.critical_values is None else rule.critical_values(alpha, num_experts)
        for rule, alpha in rules
    ]
    tests = [values for values in critical if values is not None]
    if not tests:
        return [None] * len(rules)
    if null is None:
        name = next(rule.name for rule, _ in rules if rule.tests)
        raise ParameterError(
            f"rule={name!r} needs a null model: give one as kde=, or use rule='topk'."
        )
    if null.header.null == "expert":
        null.cdf(layer)  # says so if there is no such layer
    else:
        ends = np.cumsum([values.size for values in tests])
        flat = -null.thresholds(layer, np.concatenate([values.ravel() for values in tests]))
        tests = [
            own.reshape(values.shape)
            for own, values in zip(np.split(flat, ends[:-1]), tests, strict=True)
        ]
    found = iter(tests)
    return [None if values is None else torch.from_numpy(next(found)) for values in critical]


def round_down(limits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 limits down to what a comparison in ``dtype``, at least float32, needs.

    Every float32 (bfloat16, float16) value v satisfies ``v <= limit`` exactly if it satisfies
    ``v <= limit rounded down to float32``, so no decision is lost by comparing in float32.
    """
    if dtype == torch.float64:
        return limits
    rounded = limits.float()
    return torch.where(
        rounded.double() > limits, torch.nextafter(rounded, torch.tensor(-torch.inf)), rounded
    )
