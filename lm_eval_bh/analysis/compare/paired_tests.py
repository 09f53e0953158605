"""Intervals and tests of paired differences; scipy and statsmodels are loaded on use."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS_AT_ONCE = 2_000_000  # of documents: keeps a bootstrap below 100 MB


def bootstrap_interval(
    statistic: Callable[..., Floats],
    *samples: Floats,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Return a percentile bootstrap interval of a function of means of paired samples.

    Parameters
    ----------
    statistic : callable
        A function of one array ``[resamples]`` per sample, the means of each resample; it may
        return several numbers, stacked along axis 0.
    *samples : float64 [documents]
        Values of the same documents, which are drawn together.
    confidence : float
        Between 0 and 1.
    resamples, seed : int
        Number of draws of all documents with replacement, and their seed.

    References
    ----------
    Efron 1979, Ann. Stat. 7:1.
    """
    from scipy import stats

    def of_means(*drawn: Floats, axis: int) -> Floats:
        return statistic(*(values.mean(axis) for values in drawn))

    low, high = stats.bootstrap(
        samples,
        of_means,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        batch=max(1, DRAWS_AT_ONCE // len(samples[0])),
        confidence_level=confidence,
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return low, high


def t_test(differences: Floats) -> float:
    """Return the two-sided p-value for a mean of 0; without variance it is 1 or 0."""
    if not np.ptp(differences):
        return float(differences[0] == 0)
    from statsmodels.stats.weightstats import DescrStatsW

    return float(DescrStatsW(differences).ttest_mean(0)[1])


def tost(differences: Floats, low: float, high: float) -> float:
    """Return the p-value for a mean outside ``(low, high)``: small means equivalent.

    The larger of two one-sided t tests; without variance it is 0 inside and 1 outside.
    """
    if not np.ptp(differences):
        return float(not low < differences[0] < high)
    from statsmodels.stats.weightstats import DescrStatsW

    return float(DescrStatsW(differences).ttost_mean(low, high)[0])


def mcnemar_exact(better: int, worse: int) -> float:
    """Return the two-sided p-value for flips equally likely in both directions."""
    from statsmodels.stats.contingency_tables import mcnemar

    return min(1.0, float(mcnemar([[0, better], [worse, 0]], exact=True).pvalue))


def adjusted(p_values: pd.Series) -> pd.Series:
    """Return p-values adjusted by Benjamini-Hochberg; missing ones stay missing."""
    from statsmodels.stats.multitest import multipletests

    known = p_values.dropna()
    if len(known):
        known = pd.Series(multipletests(known, method="fdr_bh")[1], known.index)
    return known.reindex(p_values.index)
