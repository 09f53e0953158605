"""lm-eval's bootstrap of a perplexity, bit for bit and in a hundredth of the time.

The harness draws 100,000 resamples of the documents, one number at a time in Python and in a pool
of processes, which takes seconds per experiment. Here the same numbers are drawn and added in the
same order, a thousand resamples at once.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from lm_eval.api import metrics
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CHUNK = 1000  # resamples per seed in the harness
CHECKED = 3  # resamples compared with the harness's own code


@contextmanager
def exact_bootstrap() -> Iterator[None]:
    """Let the harness use these standard errors within the block."""
    theirs = metrics.bootstrap_stderr

    def stderr(f: Callable[[Sequence[Any]], float], xs: Sequence[Any], iters: int) -> float:
        found = replicates(xs, iters) if f is metrics.perplexity else None
        return float(theirs(f, xs, iters) if found is None else metrics.sample_stddev(found))

    metrics.bootstrap_stderr = stderr
    try:
        yield
    finally:
        metrics.bootstrap_stderr = theirs


def replicates(xs: Sequence[Any], iters: int) -> list[float] | None:
    """Return the perplexities of the harness's resamples of loglikelihoods.

    Parameters
    ----------
    xs : sequence of float
        The loglikelihood of each document, in nats.
    iters : int
        Number of resamples, drawn in chunks of :data:`CHUNK` with the seeds 0, 1, ...

    Returns
    -------
    list of float or None
        None if the harness's own code gives another result or none, as found on the first
        :data:`CHECKED` resamples: another version of Python may draw or add differently.
    """
    size = min(CHUNK, iters)
    if size < 1 or not xs or any(type(x) is not float for x in xs):
        return None
    values = np.array(xs)
    found: list[float] = []
    try:
        for seed in range(iters // size):
            totals = _sums(values, _picks(seed, size, len(xs)))
            found += [math.exp(-(total / len(xs))) for total in totals.tolist()]
    except OverflowError:  # the harness reports it
        return None
    own = random.Random(0)
    first = [metrics.perplexity(own.choices(xs, k=len(xs))) for _ in range(min(CHECKED, size))]
    return found if found[: len(first)] == first else None


def _picks(seed: int, size: int, n: int) -> NDArray[np.intp]:
    """Return ``size`` results of ``random.Random(seed).choices(range(n), k=n)``, ``[size, n]``."""
    *words, position = random.Random(seed).getstate()[1]
    generator = np.random.RandomState()
    state = {"key": np.array(words, dtype=np.uint32), "pos": position}
    generator.set_state({"bit_generator": "MT19937", "state": state})
    return (generator.random_sample((size, n)) * float(n)).astype(np.intp)


def _sums(values: Floats, picks: NDArray[np.intp]) -> Floats:
    """Add the values of each resample in order, like Python's ``sum``."""
    columns = values[picks.T]
    total: Floats = columns[0].copy()
    if sys.version_info < (3, 12):
        for column in columns[1:]:
            total += column
        return total
    lost = np.zeros_like(total)  # Neumaier's sum, since Python 3.12
    for column in columns[1:]:
        added = total + column
        larger = np.abs(total) >= np.abs(column)
        lost += np.where(larger, (total - added) + column, (column - added) + total)
        total = added
    return np.where(np.isfinite(lost), total + lost, total)
