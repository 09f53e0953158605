"""Reads single documents: lm-eval's samples, and their numbers of scored tokens."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from lm_eval_bh.analysis.read.harness_format import HarnessSample
from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import Sample
from lm_eval_bh.validation import mismatch

# lm-eval's accuracies, the preferred one first: acc_norm allows for the endings' lengths.
ACCURACIES = ("acc_norm", "acc", "exact_match")
CONTENT = "content:"
DIFFER = "the documents differ"
# Parts that lm-eval hashes, and their keys in samples.
_CONTENTS = {"doc": "doc", "prompt": "arguments", "target": "target"}
REMEDY = "run the evaluation again with --log_samples"
Taken = TypeVar("Taken")


def read_documents(path: Path, expected: int | None = None) -> pd.DataFrame:
    """Read what lm-eval logged for each document, see :meth:`Loaded.documents`.

    Parameters
    ----------
    path : Path
        ``samples_<task>_<time>.jsonl``.
    expected : int, optional
        Number of documents that the file must contain.

    Raises
    ------
    DataError
        If a line is damaged or a document is missing.
    """
    rows: dict[int, dict[str, Any]] = {}
    for doc_id, document in read_samples(path, _document):
        # A task with several filters has a line for each; the first filter counts.
        rows.setdefault(doc_id, document)
    check_complete(path, len(rows), expected)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("doc_id").sort_index()


def read_samples(
    path: Path, take: Callable[[Mapping[str, Any]], Taken]
) -> Iterator[tuple[int, Taken]]:
    """Yield the document's id and the result of ``take`` for each line of a samples file.

    Parameters
    ----------
    path : Path
        ``samples_<task>_<time>.jsonl``.
    take : callable
        Called with a :class:`~lm_eval_bh.analysis.read.harness_format.HarnessSample`; a ValueError
        marks the line as damaged.

    Raises
    ------
    DataError
        If the file cannot be read, or a line is damaged.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    sample = json.loads(line)
                    if (reason := mismatch(sample, HarnessSample, "the sample")) is None:
                        taken = take(sample)
                except (ValueError, RecursionError) as error:
                    reason = str(error)
                if reason is not None:
                    raise DataError(f"Line {number} of {path} is damaged: {reason}; {REMEDY}.")
                yield sample["doc_id"], taken
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} could not be read: {error}; {REMEDY}.") from error


def check_complete(path: Path, documents: int, expected: int | None) -> None:
    """Raise :class:`DataError` if a file of samples lacks documents."""
    if expected is not None and documents != expected:
        raise DataError(f"{path} is incomplete: {documents} of {expected} documents; {REMEDY}.")


def hashes_of(sample: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the hashes of a sample's document, prompt and target.

    Earlier releases of lm-eval wrote no hashes: a digest of the content is used then, which starts
    with :data:`CONTENT`. None if the sample has neither.
    """
    found: dict[str, str | None] = {}
    for part in _CONTENTS:
        known = sample.get(f"{part}_hash")
        found[part] = content_digest(sample, part) if known is None else known
        (found[part] or "").encode()  # half a surrogate pair raises ValueError
    return found


def content_digest(sample: Mapping[str, Any], part: str) -> str | None:
    """Return a digest of a sample's document, prompt or target; None if it has none."""
    content = sample.get(_CONTENTS[part])
    if content is None:
        return None
    return CONTENT + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def different(ours: pd.Series, theirs: pd.Series) -> str | None:
    """Return why hashes of the same documents disagree; None if they agree.

    A missing hash agrees with nothing, and lm-eval's hashes never with content digests.
    """
    if ours.isna().any() or theirs.isna().any():
        return "the samples do not identify their documents"
    if any(ours.str.startswith(CONTENT) != theirs.str.startswith(CONTENT)):
        return "only one of the two has hashes of its documents"
    return DIFFER if (ours != theirs).any() else None


def _document(sample: Mapping[str, Any]) -> dict[str, Any]:
    hashes = hashes_of(sample)
    told = hashes["doc"] is not None and hashes["prompt"] is not None
    row: dict[str, Any] = {
        "hash": "-".join(map(str, hashes.values())) if told else None,
        "output": json.dumps(sample["resps"]),
        "choices": len(sample["resps"]),
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
    """Return the number of scored tokens per document, from an internal routing log.

    It is a document's loglikelihood divided by its loss per scored token.

    Parameters
    ----------
    samples : iterable of Sample
        Samples of the log.
    documents : DataFrame
        Documents of the same run, see :func:`read_documents`.

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
    """Yield the samples of a log with the document's id in the task.

    A log has a document's place among those evaluated. That is its id, unless ``--samples`` chose
    documents: then only the document's hash identifies it.
    """
    in_order = list(documents.index) == list(range(len(documents)))
    known = documents["hash"].dropna()
    id_of = {hashes.split("-")[0]: int(index) for index, hashes in known.items()}
    for sample in samples:
        place = sample["sample_id"] if in_order else id_of.get(sample.get("doc_hash", ""))
        if place is not None:
            yield place, sample
