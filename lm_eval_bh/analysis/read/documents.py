"""Reads single documents: lm-eval's samples, and how many of their tokens were scored."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_bh.analysis.read.harness_format import HarnessSample
from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import Sample
from lm_eval_bh.validation import mismatch

# lm-eval's accuracies, the preferred one first: acc_norm allows for the endings' lengths.
ACCURACIES = ("acc_norm", "acc", "exact_match")


def read_documents(path: Path, expected: int | None = None) -> pd.DataFrame:
    """Read what lm-eval logged for each document, see :meth:`Loaded.documents`.

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
    remedy = "run the evaluation again with --log_samples"
    rows: dict[int, dict[str, Any]] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                document, reason = _read_line(line)
                if reason:
                    raise DataError(f"Line {number} of {path} is damaged: {reason}; {remedy}.")
                # A task with several filters has a line for each; lm-eval's first filter counts.
                rows.setdefault(document.pop("doc_id"), document)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} could not be read: {error}; {remedy}.") from error
    if expected is not None and len(rows) != expected:
        raise DataError(f"{path} is incomplete: {len(rows)} of {expected} documents; {remedy}.")
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("doc_id").sort_index()


def _read_line(line: str) -> tuple[dict[str, Any], str | None]:
    """Return the document of a line, or why there is none."""
    try:
        sample = json.loads(line)
        reason = mismatch(sample, HarnessSample, "the sample")
        return ({}, reason) if reason else (_document(sample), None)
    except (ValueError, RecursionError) as error:
        return {}, str(error)


def _document(sample: Mapping[str, Any]) -> dict[str, Any]:
    hashes = "-".join(str(sample.get(f"{part}_hash")) for part in ("doc", "prompt", "target"))
    hashes.encode()  # half a character is a ValueError
    row: dict[str, Any] = {
        "doc_id": sample["doc_id"],
        "hash": hashes,
        "output": json.dumps(sample["resps"]),
    }
    for name, unit in (("word_perplexity", "words"), ("byte_perplexity", "bytes")):
        if isinstance(sample.get(name), list):
            row["loglikelihood"], row[unit] = map(float, sample[name])
    if isinstance(sample.get("perplexity"), (int, float)):
        row |= {"loglikelihood": float(sample["perplexity"]), "targets": 1.0}
    for name in ACCURACIES:
        if isinstance(sample.get(name), (bool, int, float)):
            row[name] = float(sample[name])
    return row


def scored_tokens(samples: Iterable[Sample], documents: pd.DataFrame) -> dict[int, int]:
    """Return how many tokens of each document were scored, by an internal routing log.

    A document's loglikelihood over its loss per scored token is that number.

    Parameters
    ----------
    samples : iterable of Sample
        Those of the log.
    documents : DataFrame
        Of the same run, see :func:`read_documents`.

    Returns
    -------
    dict of int to int
        Document -> scored tokens, for documents of a single request.
    """
    losses: dict[int, list[float | None]] = {}
    for document, sample in _with_ids(samples, documents):
        losses.setdefault(document, []).append(sample["loss"])
    found = {}
    for document, (loss, *others) in losses.items():
        if loss and not others and document in documents.index:
            count = -documents["loglikelihood"][document] / loss
            if math.isfinite(count) and abs(count - round(count)) < 1e-6 * count:
                found[document] = round(count)
    return found


def _with_ids(samples: Iterable[Sample], documents: pd.DataFrame) -> Iterator[tuple[int, Sample]]:
    """Yield the samples of a log, each with the document's id in the task.

    A log has the place of a document among those evaluated. That is its id, unless ``--samples``
    chose documents: then only the document's hash tells which one it is.
    """
    in_order = list(documents.index) == list(range(len(documents)))
    id_of = {hashes.split("-")[0]: int(index) for index, hashes in documents["hash"].items()}
    for sample in samples:
        place = sample["sample_id"] if in_order else id_of.get(sample.get("doc_hash", ""))
        if place is not None:
            yield place, sample
