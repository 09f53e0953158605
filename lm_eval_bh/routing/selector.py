"""A rule made ready for one layer: router logits in, how many experts and which come first out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.nulls.null_model import NullModel
from lm_eval_bh.routing.rules.random_k import random_experts
from lm_eval_bh.routing.rules.sorted_scores import SortedScores
from lm_eval_bh.routing.rules.thresholds import round_down, thresholds_of
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
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        # NumPy sorts rows of 64 in a 50th of torch's time. It knows ascending order only.
        return SortedScores(torch.from_numpy(np.sort(-scores.numpy(), axis=-1)))
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
        self._ready: Tensor | None = None

    def __call__(
        self, router_logits: Tensor, hidden_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Say how many experts each token gets, and which come first.

        Parameters
        ----------
        router_logits : Tensor
            float ``[tokens, experts]``, finite.
        hidden_states : Tensor, optional
            float ``[tokens, hidden]``, see :func:`sort_scores`.

        Returns
        -------
        counts : Tensor
            int64 ``[tokens]``, from ``min_k`` to ``max_k``.
        experts : Tensor or None
            int64 ``[tokens, max_k]``, the first experts; None where they are those with the largest
            logits.
        """
        config = self.config
        if self.rule.random:
            return self._full(router_logits), self.draw(router_logits, config.max_k)
        if config.fixed_count and config.ranks_by_logit:
            return self._full(router_logits), None
        scores = sort_scores(router_logits, self._null_model, self.layer, config, hidden_states)
        experts = None if scores.experts is None else scores.experts[:, : config.max_k]
        if config.fixed_count:
            return self._full(router_logits), experts
        return self.count(scores).clamp_(config.min_k, config.max_k), experts

    def among(
        self, router_logits: Tensor, candidates: Tensor, hidden_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
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
        counts : Tensor
            int64 ``[tokens]``, from ``min_k`` to ``max_k``.
        order : Tensor or None
            int64 ``[tokens, max_k]``, the slots by descending score; None where they lie so.
        """
        scores = self._candidate_scores(router_logits.detach(), candidates, hidden_states)
        thresholds = self._thresholds_for(scores)
        assert thresholds is not None
        counts = (-scores <= thresholds[0, 0]).sum(-1)
        counts = counts.clamp_(self.config.min_k, self.config.max_k)
        if self.config.ranks_by_logit:
            return counts, None
        return counts, scores.argsort(dim=-1, descending=True, stable=True)

    def _candidate_scores(
        self, logits: Tensor, candidates: Tensor, hidden_states: Tensor | None
    ) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        exact = logits.to(dtype)
        chosen = exact.gather(-1, candidates)
        statistic = self.config.scored_by
        if not STATISTICS[statistic].weighs:
            return chosen
        log_weights = chosen - exact.logsumexp(-1, keepdim=True)
        if not STATISTICS[statistic].factors:
            return log_weights
        assert self._null_model is not None
        factors = self._null_model.log_factors(self.layer, logits.device, dtype, hidden_states)
        assert factors is not None
        return log_weights + (
            factors[candidates] if factors.ndim == 1 else factors.gather(-1, candidates)
        )

    def draw(self, router_logits: Tensor, k: int) -> Tensor:
        """Draw ``k`` experts for every token at random: int64 ``[tokens, k]``."""
        return random_experts(router_logits, k, self.config.seed, self.layer)

    def count(self, scores: SortedScores) -> Tensor:
        """Return how many experts the rule takes, whatever the bounds: int64 ``[tokens]``."""
        assert self.rule.count is not None
        return self.rule.count(scores, self.alpha, self._thresholds_for(scores.ascending))

    def _full(self, router_logits: Tensor) -> Tensor:
        tokens, k = router_logits.shape[:-1], self.config.max_k
        return torch.full(tokens, k, dtype=torch.int64, device=router_logits.device)

    def _thresholds_for(self, ascending: Tensor) -> Tensor | None:
        if self._exact is None:
            return None
        ready = self._ready
        if ready is None or (ready.device, ready.dtype) != (ascending.device, ascending.dtype):
            ready = round_down(self._exact, ascending.dtype).to(ascending.device)
            self._ready = ready
        return ready
