"""Adaptive rules without a test: what the multiple-testing rules are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_eval_bh.routing.rules.sorted_scores import SortedScores


def top_p(scores: SortedScores, alpha: float, thresholds: Tensor | None) -> Tensor:
    """Take the fewest experts whose weights add up to ``alpha``."""
    cumulative = scores.cumulative_weights
    wanted = cumulative.new_full((len(cumulative), 1), alpha)
    return 1 + torch.searchsorted(cumulative, wanted).squeeze(-1)


def min_p(scores: SortedScores, alpha: float, thresholds: Tensor | None) -> Tensor:
    """Take the experts whose weight is at least ``alpha`` times the largest."""
    return (scores.weights >= alpha * scores.weights[..., :1]).sum(-1)
