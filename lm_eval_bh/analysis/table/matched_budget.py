"""Static top-k at the same number of experts, for every adaptive row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.table.perplexities import perplexity_column

MATCHED = ("metric", "perplexity", "accuracy", "by", "k_low", "k_high")


def matched_budget(frame: pd.DataFrame, tolerance: float = 0.02) -> pd.DataFrame:
    """Return static top-k at the same number of experts, for every row except baselines.

    An adaptive rule is only worth its cost if it beats the plain top-k that computes as many
    experts. A top-k measured at that mean (within ``tolerance``) is used directly. Otherwise the
    logarithm of the perplexity, and the accuracy, are interpolated linearly in k between the next
    smaller and the next larger measured k. Outside the range of measured k, values are missing.

    Parameters
    ----------
    frame : DataFrame
        One row per experiment; compared within a group and task.
    tolerance : float
        Relative distance allowed between k and the mean number of experts over all layers.

    Returns
    -------
    DataFrame
        With the index of ``frame``: ``matched_metric`` (which perplexity), ``matched_perplexity``,
        ``matched_accuracy``, ``matched_by`` ("measured", "interpolated" or None), ``matched_k_low``
        and ``matched_k_high``, which are equal where it was measured.
    """
    matched: dict[Any, dict[str, Any]] = {}
    for _, rows in frame.groupby(["group", "task"], sort=False):
        metric = perplexity_column(rows)
        static = rows[rows["baseline"] & rows["max_k"].notna()]
        of_k = static.groupby(static["max_k"].astype("int64"))  # averages repeats of a k
        log_perplexity = of_k[metric].apply(lambda p: float(np.log(p).mean())) if metric else None
        accuracy = of_k["accuracy"].mean()
        known = accuracy if log_perplexity is None else log_perplexity
        measured = [int(k) for k in known.index[known.notna()]]
        for index, experts in rows.loc[~rows["baseline"], "avg_experts_model"].dropna().items():
            bounds = _neighbours(measured, float(experts), tolerance)
            if bounds is None:
                continue
            at = min(max(float(experts), bounds[0]), bounds[1])
            matched[index] = {
                "metric": metric,
                "perplexity": None
                if log_perplexity is None
                else math.exp(_between(log_perplexity, bounds, at)),
                "accuracy": _between(accuracy, bounds, at),
                "by": "measured" if bounds[0] == bounds[1] else "interpolated",
                "k_low": bounds[0],
                "k_high": bounds[1],
            }
    table = pd.DataFrame.from_dict(matched, orient="index", columns=list(MATCHED))
    table = table.reindex(frame.index).astype(object)
    return table.where(table.notna(), None).add_prefix("matched_")


def _neighbours(measured: list[int], experts: float, tolerance: float) -> tuple[int, int] | None:
    near = [k for k in measured if abs(k - experts) <= tolerance * experts]
    if near:
        nearest = min(near, key=lambda k: abs(k - experts))
        return nearest, nearest
    below, above = [k for k in measured if k < experts], [k for k in measured if k > experts]
    return (max(below), min(above)) if below and above else None


def _between(values: pd.Series, bounds: tuple[int, int], at: float) -> float:
    return float(np.interp(at, bounds, [values[k] for k in bounds]))
