"""A rule made ready for one layer: router logits in, how many experts and which come first out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.host import exact, on_host
from lm_eval_bh.routing.nulls.null_model import NullModel
from lm_eval_bh.routing.rules import stepwise
from lm_eval_bh.routing.rules.random_k import random_experts
from lm_eval_bh.routing.rules.sorted_scores import Array, SortedScores
from lm_eval_bh.routing.rules.thresholds import round_down, thresholds_of
from lm_eval_bh.routing.rules.within_bounds import WithinBounds
from lm_eval_bh.routing.scores.statistic import STATISTICS
from lm_eval_bh.routing.scores.statistic import scores as statistic_scores


def sort_scores(
    router_logits: Tensor,
    null_model: NullModel | None,
    layer: int,
    config: RoutingConfig,
    hidden_states: Tensor | None = None,
) -> SortedScores:
    """Score and sort one layer's tokens.

    All configurations with one statistic, null model and scope can share the result, those whose
    rules decide each expert alone only with the same ``max_k``.

    Parameters
    ----------
    router_logits : Tensor
        float ``[tokens, experts]``.
    null_model : NullModel or None
        What p-values and the factors of weights are taken from.
    layer : int
        The layer.
    config : RoutingConfig
        What is scored. With the scope "expert" p-values rank the experts, each under its own
        distribution; else scores do.
    hidden_states : Tensor, optional
        float ``[tokens, hidden]``, what the router was given; for the statistic "predicted".
    """
    logits = router_logits.detach()
    statistic = STATISTICS[config.scored_by]
    if not statistic.weighs:
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    elif statistic.factors or config.tests:
        assert null_model is not None
        scores = null_model.scores(layer, logits, hidden_states)
    else:
        scores = statistic_scores(logits, statistic.name)
    by_p_value = config.tests and config.null_scope == "expert"
    p_values = None
    if by_p_value:
        assert null_model is not None
        p_values = null_model.p_values(layer, logits, hidden_states)
    if config.at_work.alone:  # only what the router ranks first can serve
        others = ~first_ranked(logits, config.max_k)
        scores = scores.masked_fill(others, -torch.inf)
        p_values = None if p_values is None else p_values.masked_fill(others, torch.inf)
    if p_values is not None:
        by_score = scores.argsort(dim=-1, descending=True, stable=True)  # for equal p-values
        ascending, by_p = p_values.gather(-1, by_score).sort(dim=-1, stable=True)
        return SortedScores(ascending, by_score.gather(-1, by_p))
    if statistic.factors:
        largest, experts = scores.sort(dim=-1, descending=True, stable=True)
        return SortedScores(-largest, experts)
    return by_size(scores)


def by_size(scores: Tensor) -> SortedScores:
    """Sort scores that need no gradient, float ``[tokens, experts]``, the largest first."""
    if on_host(scores):
        ascending = -scores.numpy()
        ascending.sort(axis=-1)
        return SortedScores(ascending)
    return SortedScores((-scores).sort(dim=-1).values)


def first_ranked(router_logits: Tensor, k: int) -> Tensor:
    """Return which experts have the ``k`` largest logits of a token: bool ``[tokens, experts]``."""
    found = torch.zeros_like(router_logits, dtype=torch.bool)
    return found.scatter_(-1, router_logits.topk(k, dim=-1).indices, True)


class Selector:
    """One layer's rule.

    Parameters
    ----------
    config : RoutingConfig
        The rule, its bounds and its parameter.
    null_model : NullModel or None
        What p-values are taken from, and what score they are of.
    layer, num_experts : int
        The layer, and how many experts it has.
    alpha : float, optional
        The rule's parameter in this layer, in place of the configuration's.
    thresholds : Tensor, optional
        What :func:`~lm_eval_bh.routing.rules.thresholds.thresholds_of` says of this rule, if it is
        known already.

    Raises
    ------
    ParameterError
        If a test is asked for without a null model.
    """

    def __init__(
        self,
        config: RoutingConfig,
        null_model: NullModel | None,
        layer: int,
        num_experts: int,
        alpha: float | None = None,
        thresholds: Tensor | None = None,
    ) -> None:
        self.config = config
        self.rule = config.at_work
        self.alpha = config.alpha if alpha is None else alpha
        self.layer = layer
        self.num_experts = num_experts
        self._null_model = null_model
        # Where each expert has its own distribution, the smallest p-values serve: these are sorted.
        own = config.tests and config.null_scope == "expert"
        self.alone = self.rule.alone and not config.fixed_count and not own
        if thresholds is None:
            [thresholds] = thresholds_of([(self.rule, self.alpha)], null_model, layer, num_experts)
        self._exact = thresholds
        self._ready: dict[Any, Any] = {}
        self._within: dict[Any, WithinBounds | None] = {}
        self._clamped = np.arange(num_experts + 1).clip(config.min_k, config.max_k)
        self._fixed, self._by_logit = config.fixed_count, config.ranks_by_logit
        self._sorts_logits = config.scored_by == "logit" and not (own or self.rule.alone)
        # What decides and empties slots at once, where that is the faster way: a FusedStep.
        self.fused: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"fused": None}  # where a copy runs there may be no such kernel

    def __call__(
        self, router_logits: Tensor, hidden_states: Tensor | None = None
    ) -> tuple[Array, Tensor | None]:
        """Say how many experts each token gets, and which come first.

        Parameters
        ----------
        router_logits : Tensor
            float ``[tokens, experts]``, finite.
        hidden_states : Tensor, optional
            float ``[tokens, hidden]``, see :func:`sort_scores`.

        Returns
        -------
        counts : Tensor or ndarray
            int64 ``[tokens]``, an array where NumPy has decided; from ``min_k`` to ``max_k``.
        experts : Tensor or None
            int64 ``[tokens, max_k]``, the first experts; None where they are those with the largest
            logits.
        """
        config = self.config
        if self.rule.random:
            return self._full(router_logits), self.draw(router_logits, config.max_k)
        if self._fixed and self._by_logit:
            return self._full(router_logits), None
        if self._sorts_logits:
            logits = exact(router_logits)
            if on_host(logits):
                array = logits.numpy()
                if (within := self._within_bounds(array.dtype)) is not None:
                    return within(array), None
            scores = by_size(logits)
        else:
            scores = sort_scores(router_logits, self._null_model, self.layer, config, hidden_states)
        experts = None if scores.experts is None else scores.experts[:, : config.max_k]
        if self._fixed:
            return self._full(router_logits), experts
        found = self._count(scores)
        return self._bounded(found), experts

    def among(
        self, router_logits: Tensor, candidates: Tensor, hidden_states: Tensor | None = None
    ) -> tuple[Array, Tensor | None]:
        """Decide each of some candidates by itself, for a rule that is ``alone``: no sort.

        Parameters
        ----------
        router_logits : Tensor
            float ``[tokens, experts]``, finite.
        candidates : Tensor
            int64 ``[tokens, max_k]``, the experts that the router ranks first, by descending logit.
        hidden_states : Tensor, optional
            float ``[tokens, hidden]``, see :func:`sort_scores`.

        Returns
        -------
        counts : Tensor or ndarray
            int64 ``[tokens]``, an array where NumPy has decided; from ``min_k`` to ``max_k``.
        order : Tensor or None
            int64 ``[tokens, max_k]``, the slots by descending score; None where they lie so.
        """
        scores = self._candidate_scores(router_logits.detach(), candidates, hidden_states)
        found = self._count(SortedScores(-scores))
        counts = self._bounded(found)
        if self._by_logit:
            return counts, None
        return counts, scores.argsort(dim=-1, descending=True, stable=True)

    def _candidate_scores(
        self, logits: Tensor, candidates: Tensor, hidden_states: Tensor | None
    ) -> Tensor:
        statistic = STATISTICS[self.config.scored_by]
        if not statistic.weighs:
            return exact(logits).gather(-1, candidates)
        log_weights = statistic_scores(logits, statistic.name).gather(-1, candidates)
        if not statistic.factors:
            return log_weights
        assert self._null_model is not None
        factors = self._null_model.log_factors(
            self.layer, logits.device, log_weights.dtype, hidden_states
        )
        assert factors is not None
        return log_weights + (
            factors[candidates] if factors.ndim == 1 else factors.gather(-1, candidates)
        )

    def step(self) -> tuple[Tensor, bool] | None:
        """Return the thresholds of a rule that steps once through logits, and whether down.

        They are float32 ``[experts]``, for ascending negated logits. None for another rule.
        """
        known = stepwise.step_up, stepwise.step_down
        if self._fixed or not self._sorts_logits or self.rule.count not in known:
            return None
        assert self._exact is not None
        return round_down(self._exact, torch.float32)[0], self.rule.count is stepwise.step_down

    def draw(self, router_logits: Tensor, k: int) -> Tensor:
        """Draw ``k`` experts for every token at random: int64 ``[tokens, k]``."""
        return random_experts(router_logits, k, self.config.seed, self.layer)

    def count(self, scores: SortedScores) -> Tensor:
        """Return how many experts the rule takes, whatever the bounds: int64 ``[tokens]``."""
        return torch.as_tensor(self._count(scores), dtype=torch.int64)

    def _count(self, scores: SortedScores) -> Any:
        """Return what :meth:`count` does, as an array where the scores are one."""
        assert self.rule.count is not None
        return self.rule.count(scores, self.alpha, self._thresholds_for(scores))

    def _within_bounds(self, dtype: np.dtype[Any]) -> WithinBounds | None:
        if dtype not in self._within:
            found = None
            if self._exact is not None:
                kind = torch.float64 if dtype == np.float64 else torch.float32
                thresholds = round_down(self._exact, kind).numpy()
                bounds = self.config.min_k, self.config.max_k
                found = WithinBounds.of(self.rule, thresholds, *bounds)
            self._within[dtype] = found
        return self._within[dtype]

    def _bounded(self, found: Any) -> Array:
        if isinstance(found, np.ndarray):
            bounded: NDArray[np.int64] = self._clamped.take(found)
            return bounded
        return torch.clamp(found, self.config.min_k, self.config.max_k)

    def _full(self, router_logits: Tensor) -> Tensor:
        tokens, k = router_logits.shape[:-1], self.config.max_k
        return torch.full(tokens, k, dtype=torch.int64, device=router_logits.device)

    def _thresholds_for(self, scores: SortedScores) -> Any:
        if self._exact is None:
            return None
        values = scores.values
        key = values.dtype if isinstance(values, np.ndarray) else (values.device, values.dtype)
        if key not in self._ready:
            rounded = round_down(self._exact, scores.ascending.dtype)
            self._ready[key] = scores.alike(rounded)
        return self._ready[key]
