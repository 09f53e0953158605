"""Paired comparisons of configurations with their baselines, document by document.

Two runs over the same documents are paired, which removes the documents' own difficulty from the
comparison. scipy and statsmodels are loaded on use: tables need neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.compare.paired_measures import (
    Interval,
    check_settings,
    compare_perplexities,
    compare_scores,
)
from lm_eval_bh.analysis.compare.paired_tests import adjusted, bootstrap_interval
from lm_eval_bh.analysis.read.averages import counted, ratio_confirmed
from lm_eval_bh.analysis.read.documents import ACCURACIES, different
from lm_eval_bh.analysis.read.loaded import Loaded
from lm_eval_bh.analysis.table.columns import typed
from lm_eval_bh.analysis.table.missing import holds, is_missing
from lm_eval_bh.analysis.table.perplexities import PERPLEXITIES
from lm_eval_bh.errors import ParameterError

# The documents and table rows of a configuration's run and of its baseline's.
Sides = tuple[tuple[pd.DataFrame, pd.Series], tuple[pd.DataFrame, pd.Series]]

BASELINES = ("native", "max_k")
COMPARISON: dict[str, str] = {
    "group": "int64",
    "task": "object",
    "metric": "object",
    "run_id": "object",
    "strategy": "object",
    "baseline_run_id": "object",
    "baseline": "object",
    "documents": "Int64",
    "value": "float64",
    "baseline_value": "float64",
    "difference": "float64",  # value - baseline_value
    "difference_low": "float64",
    "difference_high": "float64",
    "ratio": "float64",  # value / baseline_value; of perplexities only
    "ratio_low": "float64",
    "ratio_high": "float64",
    "flips_worse": "Int64",  # documents that only the baseline got right
    "flips_better": "Int64",  # documents that only the configuration got right
    "test": "object",
    "p_value": "float64",  # null hypothesis: no difference
    "p_adjusted": "float64",
    "margin": "float64",
    "equivalence_p": "float64",  # null hypothesis: a difference as large as the margin
    "equivalence_p_adjusted": "float64",
    "equivalent": "object",  # True, False, or None if it could not be tested
    "reason": "object",  # why there is no comparison, or None
}


def compare(
    loaded: Loaded,
    *,
    baseline: str = "native",
    margin: float = 0.01,
    accuracy_margin: float = 0.01,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare every configuration with its baseline on every task, paired by document.

    Perplexity: with the difference d of the loglikelihoods of a document and its size w (tokens,
    words or bytes), the log ratio of perplexities is ``sum d / sum w``. Its interval, and that of
    the difference of perplexities, is a percentile bootstrap over documents; its p-values are t
    tests of the linearised ratio. Accuracy: bootstrap over documents, McNemar's exact test.

    Equivalence: two one-sided t tests (TOST). Their null hypothesis is a difference of at least the
    margin, so a small p-value shows equivalence, which a large p-value of the other test never
    does. Without any flip the t test has no variance; the p-value is then the probability of no
    flip in that many documents if a share of them as large as the margin flipped.

    P-values are adjusted for multiplicity by Benjamini-Hochberg over all comparisons of the table,
    separately for tests of difference and of equivalence.

    Parameters
    ----------
    loaded : Loaded
        Runs with ``--log_samples``. Of repeated runs of a configuration, the first is used.
    baseline : str
        "native": static top-k with the model's own k; "max_k": with the same ``max_k``.
    margin : float
        Largest relative difference of perplexity that counts as equivalent: 0.01 is 1 %.
    accuracy_margin : float
        Largest absolute difference of accuracy that counts as equivalent.
    confidence : float
        Confidence of the intervals; ``1 - confidence`` is the level of ``equivalent``.
    resamples, seed : int
        Resamples and seed of the bootstrap.

    Returns
    -------
    DataFrame
        One row per configuration, task and metric, with the columns :data:`COMPARISON`. If
        a comparison was not possible, ``reason`` says why and the numbers are null.

    Raises
    ------
    ParameterError
        If an argument is out of range.

    References
    ----------
    McNemar 1947, Psychometrika 12:153; Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657;
    Benjamini and Hochberg 1995, J. R. Stat. Soc. B 57:289.
    """
    if baseline not in BASELINES:
        raise ParameterError(f"baseline must be native or max_k, not {baseline!r}.")
    check_settings(margin, accuracy_margin, confidence, resamples, seed)
    interval = partial(bootstrap_interval, confidence=confidence, resamples=resamples, seed=seed)

    found = []
    for row, reference in _pairs(loaded, baseline):
        common = {
            "group": row["group"],
            "task": row["task"],
            "run_id": row["run_id"],
            "strategy": row["strategy"],
            "baseline_run_id": None if reference is None else reference["run_id"],
            "baseline": None if reference is None else reference["strategy"],
        }
        documents = _paired_documents(loaded, row, reference)
        if isinstance(documents, str):
            found.append(common | {"reason": documents})
            continue
        sides, shared = documents
        for metric, unit in PERPLEXITIES.items():
            if all({"loglikelihood", unit} <= set(side) for side, _ in sides):
                found.append(common | _perplexities(sides, shared, metric, margin, interval))
                break
        for name in ACCURACIES:
            if all(name in side for side, _ in sides):
                found.append(common | _accuracies(sides, shared, name, accuracy_margin, interval))
                break
    return _adjusted(found, 1 - confidence)


def _pairs(loaded: Loaded, baseline: str) -> Iterator[tuple[pd.Series, pd.Series | None]]:
    """Yield each configuration's run and its baseline's, the first with samples."""
    frame = loaded.frame[loaded.frame["mode"] != "analyze"]  # those ran with the model's own k
    for _, rows in frame.groupby(["group", "task"], sort=False):
        firsts = [
            _first(loaded, repeats) for _, repeats in rows.groupby("configuration", sort=False)
        ]
        for row in firsts:
            k = row["native_top_k" if baseline == "native" else "max_k"]
            if is_missing(k) or (holds(row["baseline"]) and row["max_k"] == k):
                continue
            candidates = rows[rows["baseline"] & (rows["max_k"] == k).fillna(False).astype(bool)]
            yield row, _first(loaded, candidates) if len(candidates) else None


def _first(loaded: Loaded, rows: pd.DataFrame) -> pd.Series:
    """Return the first row with samples, preferring hf-bh to hf; without samples, the first."""
    ordered = rows.iloc[np.argsort(rows["mode"].eq("native").to_numpy(), kind="stable")]
    for _, row in ordered.iterrows():
        if loaded.documents(row["run_id"], row["task"]) is not None:
            return row
    return ordered.iloc[0]


def _paired_documents(
    loaded: Loaded, row: pd.Series, reference: pd.Series | None
) -> tuple[Sides, pd.Index] | str:
    """Return the documents of both runs and their common ids, or why there are none."""
    if reference is None:
        return "its baseline was not run on this task"
    ours, theirs = (loaded.documents(one["run_id"], one["task"]) for one in (row, reference))
    if ours is None or theirs is None:
        which = "configuration" if ours is None else "baseline"
        return f"no samples of the {which}: run it with --log_samples"
    shared = ours.index.intersection(theirs.index).sort_values()
    if len(shared) < 2:
        return "fewer than two documents in common: raise --limit"
    if reason := different(ours.loc[shared, "hash"], theirs.loc[shared, "hash"]):
        return f"{reason}: run both on the same data set with the same release of lm_eval"
    return ((ours, row), (theirs, reference)), shared


def _perplexities(
    sides: Sides, shared: pd.Index, metric: str, margin: float, interval: Interval
) -> dict[str, Any]:
    unit = PERPLEXITIES[metric]
    for documents, row in sides if metric != "perplexity" else ():  # lm-eval has none of tokens
        if reason := ratio_confirmed(documents["loglikelihood"], documents[unit], row[metric]):
            return {"metric": metric, "reason": reason}
    one, other = (-side["loglikelihood"].loc[shared].to_numpy(np.float64) for side, _ in sides)
    sizes = sides[0][0][unit].loc[shared].to_numpy(np.float64)
    return {"metric": metric} | compare_perplexities(one, other, sizes, margin, interval)


def _accuracies(
    sides: Sides, shared: pd.Index, name: str, margin: float, interval: Interval
) -> dict[str, Any]:
    """Compare the documents whose mean is the accuracy in the results."""
    for documents, row in sides:
        of_mean = counted(documents[name], row[name])
        if isinstance(of_mean, str):
            return {"metric": name, "reason": of_mean}
        shared = shared.intersection(of_mean)
    if len(shared) < 2:
        return {"metric": name, "reason": "fewer than two documents in common count for it"}
    one, other = (side[name].loc[shared].to_numpy(np.float64) for side, _ in sides)
    return {"metric": name} | compare_scores(one, other, margin, interval)


def _adjusted(found: list[dict[str, Any]], level: float) -> pd.DataFrame:
    table = typed(found, COMPARISON)
    table["p_adjusted"] = adjusted(table["p_value"])
    table["equivalence_p_adjusted"] = adjusted(table["equivalence_p"])
    tested = table["equivalence_p_adjusted"].notna()
    table.loc[tested, "equivalent"] = table.loc[tested, "equivalence_p_adjusted"] <= level
    return table
