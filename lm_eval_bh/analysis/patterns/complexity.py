"""Whether hard texts and rare tokens get more experts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

ENOUGH = 10  # fewest pairs for a rank correlation
OFTEN = 5  # fewest occurrences of a token that counts
COMPLEXITY = ("task", "against", "unit", "n", "spearman", "low", "high", "p_value", "reason")


def spearman(first: Any, second: Any, confidence: float = 0.95) -> dict[str, Any]:
    """Return the rank correlation of pairs, its interval and its p-value.

    The interval is Fisher's, with the variance ``(1 + r² / 2) / (n - 3)``.

    Returns
    -------
    dict
        ``n, spearman, low, high, p_value, reason``; where there is no correlation, ``reason`` says
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
    low = high = r
    if abs(r) <= 1 - 1e-12:
        width = stats.norm.ppf((1 + confidence) / 2) * math.sqrt((1 + r * r / 2) / (n - 3))
        low, high = map(float, np.tanh(np.arctanh(r) + np.array([-width, width])))
    return found | {"spearman": r, "low": low, "high": high, "p_value": p}


def complexity(documents: pd.DataFrame, tokens: pd.DataFrame) -> pd.DataFrame:
    """Correlate the experts with the loss of documents, and with the frequency of tokens.

    Parameters
    ----------
    documents : DataFrame
        ``task, mean_experts, loss, loss_unit``, one row per document; loss is NaN where unknown.
        Logs have a loss for each request, not for each token.
    tokens : DataFrame
        ``occurrences, mean_experts``, one row per token id. Those below :data:`OFTEN` do not count.

    Returns
    -------
    DataFrame
        With the columns :data:`COMPLEXITY`; a positive number says that more of the one goes with
        more experts.
    """
    rows = []
    for task, some in documents.groupby("task", sort=True):
        known = some.dropna(subset="loss")
        found = spearman(known["loss"], known["mean_experts"])
        if not len(known):
            found["reason"] = "no loss was logged: run with log_samples=N or --log_samples"
        unit = known["loss_unit"].iloc[0] if len(known) else None
        rows.append(found | {"task": task, "against": "loss of the document", "unit": unit})
    often = tokens[tokens["occurrences"] >= OFTEN]
    found = spearman(often["occurrences"], often["mean_experts"])
    rows.append(found | {"task": "all", "against": "frequency of the token", "unit": "occurrences"})
    return pd.DataFrame(rows, columns=list(COMPLEXITY))
