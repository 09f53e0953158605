"""Checks that a task's value is the mean of its documents' scores, by results.json.

A task may aggregate in any way: RULER gives a document -1 for lengths that do not apply, and leaves
those out; F1 of a whole corpus is not a mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

NOT_COUNTED = -1.0  # given by tasks to documents that a metric leaves out
SAME = 1e-7  # relative difference of sums in another order
DECIMALS = range(4, 12)  # digits of rounded values: fewer would confirm too much
NOT_VALUES = ("alias", "sample_len", "sample_count", "name")


def reported(values: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """Return the values of a task in results.json by metric and filter, in order."""
    found = {}
    for key, value in values.items():
        metric, comma, of_filter = key.partition(",")
        if comma and not metric.endswith("_stderr") and metric not in NOT_VALUES:
            found[metric, of_filter] = value
    return found


def counted(scores: pd.Series, value: Any) -> pd.Index | str:
    """Return the documents whose mean is a task's value, or why there are none.

    Parameters
    ----------
    scores : Series of float
        Scores of the documents, NaN if missing.
    value
        The task's value in results.json.

    Returns
    -------
    Index or str
        All documents; or those left after removing missing scores, or the one negative score that
        marks documents left out by a metric without negative scores; or the reason.
    """
    if len(scores) and (scores == NOT_COUNTED).all():
        return "all documents have -1, which marks documents that do not count"
    if _is_number(value):
        for kept in _without_fillers(scores):
            if len(kept) and _same(float(kept.to_numpy().mean()), float(value)):
                return kept.index
    if not np.isfinite(scores).all():
        return "a document has no score, or one that is not finite"
    if not _is_number(value):
        return scores.index  # nothing to check it with; the caller says so
    return _own_way(float(scores.mean()), value)


def ratio_confirmed(loglikelihoods: pd.Series, sizes: pd.Series, value: Any) -> str | None:
    """Return why a task's value is not its documents' perplexity; None if it may be."""
    total = float(sizes.sum())
    if not (_is_number(value) and np.isfinite(loglikelihoods).all() and total > 0):
        return None
    loss = -float(loglikelihoods.sum()) / total
    if value > 0 and math.isclose(loss, math.log(value), rel_tol=SAME, abs_tol=SAME):
        return None
    with np.errstate(over="ignore"):
        found = float(np.exp(loss))
    return None if _same(found, value) else _own_way(found, value)


def is_checkable(value: Any) -> bool:
    """Return whether results.json has a value to check documents with."""
    return _is_number(value)


def _without_fillers(scores: pd.Series) -> Iterator[pd.Series]:
    yield scores
    finite = scores[np.isfinite(scores)]
    yield finite
    negative = finite[finite < 0].unique()
    if len(negative) == 1:
        yield finite[finite >= 0]


def _same(found: float, value: float) -> bool:
    """Return whether two numbers are equal up to rounding, also in writing the second."""
    if not math.isfinite(found):
        return found == value
    rounded = (round(found, decimals) for decimals in DECIMALS)
    return math.isclose(found, value, rel_tol=SAME, abs_tol=1e-9) or value in rounded


def _own_way(found: float, value: float) -> str:
    return (
        "the task aggregates it its own way (its documents give "
        f"{found:.4g}, results.json has {value:.4g})"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value)
