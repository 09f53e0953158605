"""Stepwise multiple-testing procedures: step-up and step-down, and their critical values.

The arithmetic is statsmodels' own where it has the procedure, to the last bit, so that no decision
can differ.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_bh.routing.rules.sorted_scores import Array, SortedScores


def last_rank(rejected: Array) -> Any:
    """Return the last True rank of bool ``[tokens, N]``, 0 if there is none: int ``[tokens]``."""
    # int16 is the fastest to reduce
    if isinstance(rejected, np.ndarray):
        return (rejected * _ranks(rejected.shape[-1])).max(-1)
    rank = torch.arange(1, rejected.shape[-1] + 1, dtype=torch.int16, device=rejected.device)
    return (rejected * rank).amax(-1).long()


@cache
def _ranks(n: int) -> NDArray[np.int16]:
    return np.arange(1, n + 1, dtype=np.int16)


def step_up(scores: SortedScores, alpha: float, thresholds: Array) -> Any:
    """Reject everything up to the last p-value that is at most its critical value."""
    return last_rank(scores.at_most(thresholds[0]))


def step_down(scores: SortedScores, alpha: float, thresholds: Array) -> Any:
    """Reject everything before the first p-value that exceeds its critical value."""
    rejected = scores.at_most(thresholds[0])
    if isinstance(rejected, np.ndarray):
        return np.where(rejected.all(-1), rejected.shape[-1], rejected.argmin(-1))
    rank = torch.arange(rejected.shape[-1] + 1, dtype=torch.int16, device=rejected.device)
    return torch.where(rejected, rank[-1], rank[:-1]).amin(-1).long()


def count_all(scores: SortedScores, alpha: float, thresholds: Array) -> Any:
    """Reject every p-value that is at most the one critical value of all ranks."""
    return scores.at_most(thresholds[0, :1]).sum(-1)


def bh_critical_values(alpha: float, n: int) -> NDArray[np.float64]:
    """Return ``k alpha / n``: float64 ``[1, n]``."""
    return np.arange(1, n + 1)[None] / float(n) * alpha


def by_critical_values(alpha: float, n: int) -> NDArray[np.float64]:
    """Return BH's critical values over the n-th harmonic number: float64 ``[1, n]``."""
    harmonic = np.sum(1.0 / np.arange(1, n + 1))
    return np.arange(1, n + 1)[None] / float(n) / harmonic * alpha


def holm_critical_values(alpha: float, n: int) -> NDArray[np.float64]:
    """Return ``alpha / (n - k + 1)``: float64 ``[1, n]``."""
    return alpha / np.arange(n, 0, -1)[None]


def bonferroni_critical_values(alpha: float, n: int) -> NDArray[np.float64]:
    """Return ``alpha / n`` for every rank: float64 ``[1, n]``."""
    return np.full((1, n), alpha / float(n))


def uncorrected_critical_values(alpha: float, n: int) -> NDArray[np.float64]:
    """Return ``alpha`` for every rank: float64 ``[1, n]``."""
    return np.full((1, n), alpha)
