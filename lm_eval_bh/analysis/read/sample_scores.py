"""Every score that lm-eval logged for single documents, of any task, metric and filter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_bh.analysis.read.documents import (
    ACCURACIES,
    check_complete,
    hashes_of,
    read_samples,
)

# Metrics that are no mean of the documents' scores, and what their losses are divided by. The first
# that a task has is taken: the others are the same losses in other units.
LOSSES = {"word_perplexity": "words", "perplexity": "targets", "byte_perplexity": "bytes"}
OTHER_UNITS = (*LOSSES, "bits_per_byte")


@dataclass(frozen=True)
class SampleScores:
    """What one run logged of one task.

    Attributes
    ----------
    hashes : DataFrame
        ``doc, prompt, target``, indexed by ``doc_id``.
    scores : dict of (str, str) to DataFrame
        (metric, filter) -> ``value`` and ``size``, indexed by ``doc_id``. Of perplexities the value
        is the loglikelihood in nats, and the size what it is divided by; of others the size is NaN.
    """

    hashes: pd.DataFrame
    scores: dict[tuple[str, str], pd.DataFrame]


def read_scores(path: Path, expected: int | None = None) -> SampleScores:
    """Read all that lm-eval logged for each document.

    Parameters
    ----------
    path : Path
        ``samples_<task>_<time>.jsonl``.
    expected : int, optional
        How many documents the file must contain.

    Raises
    ------
    DataError
        If a line is damaged or a document is missing.
    """
    hashes: dict[int, dict[str, str]] = {}
    found: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    for doc_id, (of_document, filter_name, scores) in read_samples(path, _taken):
        hashes.setdefault(doc_id, of_document)
        for metric, pair in scores.items():
            found.setdefault((metric, filter_name), {}).setdefault(doc_id, pair)
    check_complete(path, len(hashes), expected)
    return SampleScores(
        pd.DataFrame.from_dict(hashes, orient="index").sort_index(),
        {
            key: pd.DataFrame.from_dict(rows, orient="index", columns=["value", "size"])
            for key, rows in found.items()
        },
    )


def _taken(
    sample: Mapping[str, Any],
) -> tuple[dict[str, str], str, dict[str, tuple[float, float]]]:
    """Return a sample's hashes, its filter, and its scores by metric."""
    named = sample.get("metrics")  # earlier releases do not name them
    names = named if isinstance(named, list) else [*OTHER_UNITS, *ACCURACIES]
    scores = {}
    for name in map(str, names):
        if (pair := _score(name, sample.get(name))) is not None:
            scores[name] = pair
    first = next((name for name in LOSSES if name in scores), None)
    for name in OTHER_UNITS:
        if name != first:
            scores.pop(name, None)
    return hashes_of(sample), str(sample.get("filter", "none")), scores


def _score(name: str, value: Any) -> tuple[float, float] | None:
    """Return value and size, or None of what only a whole task has, such as BLEU's counts."""
    if name in LOSSES:
        if isinstance(value, list):
            loglikelihood, size = map(float, value)
            return loglikelihood, size
        if name == "perplexity" and isinstance(value, (int, float)):
            return float(value), 1.0
        return None
    return (float(value), math.nan) if isinstance(value, (bool, int, float)) else None
