"""A rule made ready for one layer: router logits in, how many experts and which come first out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.nulls.null_model import NullModel
from lm_eval_bh.routing.rules.random_k import random_experts
from lm_eval_bh.routing.rules.registry import RULES
from lm_eval_bh.routing.rules.sorted_scores import SortedScores
from lm_eval_bh.routing.rules.thresholds import round_down, thresholds_of


def sort_scores(
    router_logits: Tensor,
    null_model: NullModel | None,
    layer: int,
    null_scope: str = "layer",
) -> SortedScores:
    """Score and sort one layer's tokens; all rules with this null model can share the result.

    Parameters
    ----------
    router_logits : Tensor
        float ``[tokens, experts]``.
    null_model : NullModel or None
        What the score is; None for the logits.
    layer : int
        The layer.
    null_scope : str
        With "expert", p-values rank the experts, each under its own distribution; else scores do.
    """
    logits = router_logits.detach()
    if null_model is None or null_model.header.statistic == "logit":
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    else:
        scores = null_model.scores(layer, logits)
    if null_model is not None and null_scope == "expert":
        by_score = scores.argsort(dim=-1, descending=True, stable=True)  # for equal p-values
        p_values = null_model.p_values(layer, logits).gather(-1, by_score)
        ascending, by_p = p_values.sort(dim=-1, stable=True)
        return SortedScores(ascending, by_score.gather(-1, by_p))
    if null_model is not None and null_model.header.statistic != "logit":
        largest, experts = scores.sort(dim=-1, descending=True, stable=True)
        return SortedScores(-largest, experts)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        # NumPy sorts rows of 64 in a 50th of torch's time. It knows ascending order only.
        return SortedScores(torch.from_numpy(np.sort(-scores.numpy(), axis=-1)))
    return SortedScores((-scores).sort(dim=-1).values)


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
        self.rule = RULES[config.rule]
        self.alpha = config.alpha if alpha is None else alpha
        self.layer = layer
        self.num_experts = num_experts
        self._null_model = null_model
        if thresholds is None:
            [thresholds] = thresholds_of([(self.rule, self.alpha)], null_model, layer, num_experts)
        self._exact = thresholds
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
        experts : Tensor or None
            int64 ``[tokens, max_k]``, the first experts; None where they are those with the largest
            logits.
        """
        config = self.config
        if self.rule.random:
            return self._full(router_logits), self.draw(router_logits, config.max_k)
        if config.fixed_count and config.ranks_by_logit:
            return self._full(router_logits), None
        scores = sort_scores(router_logits, self._null_model, self.layer, config.null_scope)
        experts = None if scores.experts is None else scores.experts[:, : config.max_k]
        if config.fixed_count:
            return self._full(router_logits), experts
        return self.count(scores).clamp_(config.min_k, config.max_k), experts

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
