"""Number of documents to detect a difference; statsmodels is loaded on use."""

from __future__ import annotations

import math

# Up to this many documents the power is computed for each number: the root finder fails.
FEW = 20


def documents_needed(effect: float, spread: float, level: float, power: float) -> int | None:
    """Return the number of documents that a paired t test needs to detect a difference.

    Parameters
    ----------
    effect, spread : float
        Mean and standard deviation over documents of the difference.
    level, power : float
        Probability of a false positive, and of detecting this difference.

    Returns
    -------
    int or None
        None if no number is enough, because there is no difference.

    References
    ----------
    Cohen 1988, Statistical Power Analysis for the Behavioral Sciences, chapter 2; Card et al. 2020,
    With Little Power Comes Great Responsibility, EMNLP.
    """
    from statsmodels.stats.power import TTestPower

    if not effect or not math.isfinite(effect) or math.isnan(spread):
        return None
    if spread == 0:
        return 2
    size, test = abs(effect) / spread, TTestPower()
    for documents in range(2, FEW + 1):
        if test.power(size, documents, level) >= power:
            return documents
    needed = test.solve_power(effect_size=size, alpha=level, power=power)
    return math.ceil(float(needed)) if math.isfinite(needed) else None


def detectable(spread: float, documents: int, level: float, power: float) -> float | None:
    """Return the smallest difference that a paired t test detects in these documents.

    Parameters
    ----------
    spread : float
        Standard deviation over documents of the difference.
    documents : int
        At least 2.
    level, power : float
        As for :func:`documents_needed`.

    Returns
    -------
    float or None
        None if all documents have the same difference, which says nothing about others.
    """
    if spread == 0:
        return None
    from statsmodels.stats.power import TTestPower

    return float(TTestPower().solve_power(nobs=documents, alpha=level, power=power)) * spread
