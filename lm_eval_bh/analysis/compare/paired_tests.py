"""Tests of paired differences; each loads statsmodels on use, because tables need none of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def t_test(differences: Floats) -> float:
    """Return the two-sided p-value of a mean of 0; without variance it is 1 or 0."""
    if not np.ptp(differences):
        return float(differences[0] == 0)
    from statsmodels.stats.weightstats import DescrStatsW

    return float(DescrStatsW(differences).ttest_mean(0)[1])


def tost(differences: Floats, low: float, high: float) -> float:
    """Return the p-value of a mean outside ``(low, high)``: small means equivalent.

    The larger of two one-sided t tests; without variance it is 0 inside and 1 outside.
    """
    if not np.ptp(differences):
        return float(not low < differences[0] < high)
    from statsmodels.stats.weightstats import DescrStatsW

    return float(DescrStatsW(differences).ttost_mean(low, high)[0])


def mcnemar_exact(better: int, worse: int) -> float:
    """Return the two-sided p-value of flips being as likely in either direction."""
    from statsmodels.stats.contingency_tables import mcnemar

    return min(1.0, float(mcnemar([[0, better], [worse, 0]], exact=True).pvalue))
