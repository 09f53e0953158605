"""Percentile bootstrap over documents, fast enough for a whole table of comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
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

    The draws and the interval are those of :func:`scipy.stats.bootstrap` with ``paired=True`` and
    ``method="percentile"``. But the means of a resample need only how many times each document was
    drawn: they are one matrix product for all samples.

    Parameters
    ----------
    statistic : callable
        Of as many arrays ``[resamples]`` as there are samples, the means of each resample; it may
        return several numbers, stacked in front.
    *samples : float64 [documents]
        The same documents in all, which are drawn together.
    confidence : float
        Between 0 and 1.
    resamples, seed : int
        How many times the documents are drawn with replacement, and from where.

    References
    ----------
    Efron 1979, Ann. Stat. 7:1.
    """
    values = np.stack(samples, axis=1)
    size = len(values)
    drawn = _kept if resamples * size <= DRAWS_AT_ONCE else _drawn
    means = [times @ values / size for times in drawn(size, resamples, seed)]
    found = statistic(*np.concatenate(means).T)
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2], axis=-1)
    return low, high


def _drawn(size: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield how many times each document is drawn in each resample, [some resamples, documents]."""
    rng = np.random.default_rng(seed)
    batch = max(1, DRAWS_AT_ONCE // size)
    for start in range(0, resamples, batch):
        drawn = rng.integers(0, size, (min(batch, resamples - start), size))
        cells = drawn + size * np.arange(len(drawn))[:, None]
        times = np.bincount(cells.ravel(), minlength=drawn.size)
        yield times.reshape(drawn.shape).astype(np.float64)


@lru_cache(maxsize=1)
def _kept(size: int, resamples: int, seed: int) -> tuple[Floats, ...]:
    """Keep the draws: those of all comparisons over as many documents are the same."""
    return tuple(_drawn(size, resamples, seed))
