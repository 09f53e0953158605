"""Reads all scores of single documents, for any task, metric and filter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_bh.analysis.read.documents import (
    ACCURACIES,
    CONTENT,
    check_complete,
    content_digest,
    hashes_of,
    read_samples,
)

# Metrics that are not means of the documents' scores, and the divisors of their losses. The first
# one that a task has is used: the others are the same losses in other units.
LOSSES = {"word_perplexity": "words", "perplexity": "targets", "byte_perplexity": "bytes"}
OTHER_UNITS = (*LOSSES, "bits_per_byte")


Scores = dict[str, tuple[float, float]]  # metric -> value and size


@dataclass(frozen=True)
class SampleScores:
    """The logged scores of one run on one task.

    Attributes
    ----------
    hashes : DataFrame
        ``doc, prompt, target``, indexed by ``doc_id``; see
        :func:`~lm_eval_bh.analysis.read.documents.hashes_of`.
    scores : dict of (str, str) to DataFrame
        (metric, filter) -> ``value`` and ``size``, indexed by ``doc_id``. For perplexities, the
        loglikelihood in nats and its divisor; for others the size is NaN.
    notes : list of str
        Assumptions and omissions, each without a subject.
    """

    hashes: pd.DataFrame
    scores: dict[tuple[str, str], pd.DataFrame]
    notes: list[str] = field(default_factory=list)

    @property
    def has_hashes(self) -> bool:
        """Whether lm-eval hashed the documents, rather than this package."""
        return not self.hashes["doc"].astype(str).str.startswith(CONTENT).any()


def read_scores(
    path: Path,
    expected: int | None = None,
    *,
    keys: Iterable[tuple[str, str]] = (),
    by_content: bool = False,
) -> SampleScores:
    """Read everything that lm-eval logged for each document.

    Parameters
    ----------
    path : Path
        ``samples_<task>_<time>.jsonl``.
    expected : int, optional
        Number of documents that the file must contain.
    keys : iterable of (str, str)
        The task's metrics and filters in the order of results.json: earlier releases named neither
        in samples, and wrote one line per filter.
    by_content : bool
        Whether to identify documents by content even if lm-eval has hashed them, to match a run
        without hashes.

    Raises
    ------
    DataError
        If a line is damaged or a document is missing.
    """
    hashes: dict[int, dict[str, str | None]] = {}
    found: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    unnamed: dict[int, list[Scores]] = {}
    repeated: set[int] = set()
    notes: list[str] = []
    keys = list(keys)
    filters = list(dict.fromkeys(name for _, name in keys))
    metrics = list(dict.fromkeys([*(name for name, _ in keys), *OTHER_UNITS, *ACCURACIES]))

    def keep(doc_id: int, filter_name: str, scores: Scores) -> None:
        for metric, pair in scores.items():
            if not _alike(
                found.setdefault((metric, filter_name), {}).setdefault(doc_id, pair), pair
            ):
                repeated.add(doc_id)

    for doc_id, sample in read_samples(path, lambda line: _taken(line, metrics, by_content)):
        of_document, filter_name, scores = sample
        hashes.setdefault(doc_id, of_document)
        if filter_name is None:
            unnamed.setdefault(doc_id, []).append(scores)
        else:
            keep(doc_id, filter_name, scores)
    for doc_id, name, scores in _named(unnamed, filters, notes):
        keep(doc_id, name, scores)
    check_complete(path, len(hashes), expected)
    if repeated:
        notes.append(
            f"documents logged more than once with different scores: {len(repeated)}, of "
            "which the first line is compared"
        )
    return SampleScores(
        pd.DataFrame.from_dict(hashes, orient="index").sort_index(),
        {
            key: pd.DataFrame.from_dict(rows, orient="index", columns=["value", "size"])
            for key, rows in found.items()
        },
        notes,
    )


def _named(
    unnamed: Mapping[int, Sequence[Scores]], filters: Sequence[str], notes: list[str]
) -> Iterator[tuple[int, str, Scores]]:
    """Yield lines without a filter under the names that results.json gives, in its order."""
    most = max(map(len, unnamed.values()), default=0)
    names = list(filters) or ["none"]
    if most > 1 and {len(lines) for lines in unnamed.values()} == {len(names)}:
        notes.append(
            "the samples do not name their filters: the lines of each document are assumed to be "
            f"{', '.join(names)}, in the order of results.json"
        )
    elif most > 1:
        del names[1:]
        notes.append(
            f"the samples have up to {most} lines per document and do not name their filters: only "
            f"the first line of each is compared, as that of {names[0]}"
        )
    for doc_id, lines in unnamed.items():
        for name, scores in zip(names, lines, strict=False):
            yield doc_id, name, scores


def _alike(first: tuple[float, float], second: tuple[float, float]) -> bool:
    return repr(first) == repr(second)  # so that NaN equals NaN


def _taken(
    sample: Mapping[str, Any], metrics: Sequence[str], by_content: bool
) -> tuple[dict[str, str | None], str | None, Scores]:
    """Return a sample's hashes, its filter, and its scores by metric."""
    named = sample.get("metrics")  # missing in earlier releases
    names = named if isinstance(named, list) else metrics
    scores = {}
    for name in map(str, names):
        if (pair := _score(name, sample.get(name))) is not None:
            scores[name] = pair
    first = next((name for name in LOSSES if name in scores), None)
    for name in OTHER_UNITS:
        if name != first:
            scores.pop(name, None)
    hashes = hashes_of(sample)
    if by_content:
        hashes = {part: content_digest(sample, part) for part in hashes}
    of_filter = sample.get("filter")
    return hashes, None if of_filter is None else str(of_filter), scores


def _score(name: str, value: Any) -> tuple[float, float] | None:
    """Return value and size, or None for values of whole tasks only, such as BLEU's counts."""
    if name in LOSSES:
        if isinstance(value, list):
            loglikelihood, size = map(float, value)
            return loglikelihood, size
        if name == "perplexity" and isinstance(value, (int, float)):
            return float(value), 1.0
        return None
    return (float(value), math.nan) if isinstance(value, (bool, int, float)) else None
