"""BH procedures that estimate the number of true null hypotheses, and raise the level by it.

Their critical values have several rows, one for each value that the estimate can take.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.routing.rules.sorted_scores import Array, SortedScores
from lm_eval_bh.routing.rules.stepwise import last_rank

STOREY_LAMBDA = 0.5


def two_stage(scores: SortedScores, alpha: float, thresholds: Array) -> Any:
    """Step up, then step up again in the row of the first number of rejections."""
    first = last_rank(scores.at_most(thresholds[0]))
    return last_rank(scores.at_most(thresholds[first]))


def two_stage_critical_values(alpha: float, n: int) -> NDArray[np.float64]:
    """Return BH's critical values at the second stage's level: row r after r rejections."""
    rejected = np.arange(n + 1)
    null = np.where((rejected == 0) | (rejected == n), n, 1.0 * n - rejected)
    level = np.where(null == n, alpha, alpha * n / null)
    return np.arange(1, n + 1) / float(n) * level[:, None]


def storey(scores: SortedScores, alpha: float, thresholds: Array) -> Any:
    """Step up in the row of the number of p-values above lambda."""
    at_most_lambda = scores.at_most(thresholds[0])
    above = at_most_lambda.shape[-1] - at_most_lambda.sum(-1)
    return last_rank(scores.at_most(thresholds[1 + above]))


def storey_critical_values(alpha: float, n: int) -> NDArray[np.float64]:
    """Return lambda itself, and then BH's critical values for 0 to n p-values above lambda."""
    level = alpha / storey_null_share(np.arange(n + 1), n)
    levels = np.minimum(np.arange(1, n + 1) / float(n) * level[:, None], STOREY_LAMBDA)
    return np.vstack([np.full((1, n), STOREY_LAMBDA), levels])


def storey_null_share(above: NDArray[np.int64] | int, n: int) -> NDArray[np.float64]:
    """Return Storey's estimate of the share of true null hypotheses, at lambda = 1/2.

    It is not capped at 1: only so is the level kept for a finite number of tests.

    Parameters
    ----------
    above : int or ndarray
        How many of the n p-values are greater than lambda.
    n : int
        Number of tests.

    References
    ----------
    Storey, Taylor and Siegmund 2004, J. R. Stat. Soc. B 66:187, equation (4) and theorem 3.
    """
    return np.asarray((np.asarray(above) + 1.0) / (n * (1 - STOREY_LAMBDA)))
