"""Tests whether hard texts, hard tokens and rare tokens get more experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

ENOUGH = 10  # fewest pairs for a rank correlation
OFTEN = 5  # minimum occurrences of a token
COMPLEXITY = (
    "task",
    "against",
    "layer",  # of the experts; null for the mean over all
    "unit",
    "n",
    "spearman",
    "low",
    "high",
    "p_value",
    "reason",
)
OF_TOKEN = "loss of the token"


def spearman(first: Any, second: Any, confidence: float = 0.95) -> dict[str, Any]:
    """Return the rank correlation of pairs, its interval and its p-value.

    The interval is Fisher's, with the variance ``(1 + r² / 2) / (n - 3)``.

    Returns
    -------
    dict
        ``n, spearman, low, high, p_value, reason``; without a correlation, ``reason`` says
        why and the numbers are None.

    References
    ----------
    Bonett and Wright 2000, Psychometrika 65:23.
    """
    from scipy import stats

    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    found: dict[str, Any] = dict.fromkeys(("n", "spearman", "low", "high", "p_value", "reason"))
    found["n"] = n = len(x)
    if n < ENOUGH:
        return found | {"reason": f"fewer than {ENOUGH} to correlate"}
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return found | {"reason": "one of the two does not vary"}
    r, p = map(float, stats.spearmanr(x, y))
    return found | _interval(r, n, confidence) | {"p_value": p}


def spearman_of_table(table: Any, confidence: float = 0.95) -> dict[str, Any]:
    """Return the result of :func:`spearman` for counted pairs.

    Parameters
    ----------
    table : int [first, second]
        Number of pairs with each combination of two ordered values.
    confidence : float
        Confidence of the interval.
    """
    from scipy import stats

    counts = np.asarray(table, dtype=np.float64)
    rows, columns = counts.sum(1), counts.sum(0)
    n = int(counts.sum())
    found: dict[str, Any] = dict.fromkeys(("spearman", "low", "high", "p_value", "reason"))
    found["n"] = n
    if n < ENOUGH:
        return found | {"reason": f"fewer than {ENOUGH} to correlate"}
    if (rows > 0).sum() < 2 or (columns > 0).sum() < 2:
        return found | {"reason": "one of the two does not vary"}
    # Ties get their mean rank, here relative to the middle.
    x, y = (of.cumsum() - of / 2 - n / 2 for of in (rows, columns))
    r = float(x @ counts @ y / math.sqrt((rows @ x**2) * (columns @ y**2)))
    r = min(max(r, -1.0), 1.0)
    t = r * math.sqrt((n - 2) / max(1 - r * r, 1e-300))
    p = float(2 * stats.t.sf(abs(t), n - 2))
    return found | _interval(r, n, confidence) | {"p_value": p}


def _interval(r: float, n: int, confidence: float) -> dict[str, float]:
    from scipy import stats

    low = high = r
    if abs(r) <= 1 - 1e-12:
        width = stats.norm.ppf((1 + confidence) / 2) * math.sqrt((1 + r * r / 2) / (n - 3))
        low, high = map(float, np.tanh(np.arctanh(r) + np.array([-width, width])))
    return {"spearman": r, "low": low, "high": high}


def complexity(
    documents: pd.DataFrame, tokens: pd.DataFrame, losses: Mapping[tuple[str, int], Any]
) -> pd.DataFrame:
    """Correlate experts with the loss of documents and tokens, and with token frequency.

    Parameters
    ----------
    documents : DataFrame
        ``task, mean_experts, loss, loss_unit``, one row per document; loss is NaN where unknown.
    tokens : DataFrame
        ``occurrences, mean_experts``, one row per token id. Those below :data:`OFTEN` do not count.

    losses : mapping
        (task, layer) -> number of tokens by loss and number of experts, see
        :meth:`~lm_eval_bh.analysis.patterns.log_counts.Counts.loss_tables`.

    Returns
    -------
    DataFrame
        With the columns :data:`COMPLEXITY`; a positive correlation means more experts for larger
        values.
    """
    rows = []
    for task, some in documents.groupby("task", sort=True):
        known = some.dropna(subset="loss")
        found = spearman(known["loss"], known["mean_experts"])
        if not len(known):
            found["reason"] = "no loss was logged: run with log_samples=N or --log_samples"
        unit = known["loss_unit"].iloc[0] if len(known) else None
        rows.append(found | {"task": task, "against": "loss of the document", "unit": unit})
        tables = {layer: table for (of, layer), table in losses.items() if of == task}
        for layer, table in tables.items():
            found = spearman_of_table(table)
            rows.append(found | {"task": task, "against": OF_TOKEN, "layer": layer, "unit": "nats"})
        if not tables:
            reason = "no run logged the loss of tokens: run with log_routing=full"
            rows.append({"task": task, "against": OF_TOKEN, "n": 0, "reason": reason})
    often = tokens[tokens["occurrences"] >= OFTEN]
    found = spearman(often["occurrences"], often["mean_experts"])
    rows.append(found | {"task": "all", "against": "frequency of the token", "unit": "occurrences"})
    table = pd.DataFrame(rows, columns=list(COMPLEXITY))
    return table.astype({"layer": "Int64"})
