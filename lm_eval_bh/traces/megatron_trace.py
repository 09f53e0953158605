"""Reads Megatron-LM's router trace, written with ``--moe-routing-trace-path``.

``router_trace_rank<rank>.jsonl``, a line for each step, layer and rank: ``step, layer, rank,
num_tokens, topk`` and ``top_indices`` ``[tokens][topk]``; later releases add ``stage`` and
``block``, which is ``mtp`` for the layers of multi-token prediction.

Source: NVIDIA/Megatron-LM, megatron/core/transformer/moe/router_trace.py (pull request 5220).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from lm_eval_bh.errors import DataError
from lm_eval_bh.traces.trace_document import TraceDocument
from lm_eval_bh.validation import mismatch


class _MayHave(TypedDict, total=False):
    block: str | None


class Record(_MayHave):
    """A line of the trace."""

    step: int
    layer: int
    rank: int
    top_indices: list[list[int]]


def read_megatron(file: Path, first: int, notes: list[str]) -> Iterator[TraceDocument]:
    """Yield the documents of a trace: the tokens of one pass each, whatever texts they are of.

    Parameters
    ----------
    file : Path
        The trace of one rank, which goes on step by step.
    first : int
        Number of the first document.
    notes : list of str
        Filled with what was left out.

    Raises
    ------
    DataError
        If a line is damaged, or the layers of a pass have other numbers of tokens.
    """
    left_out, step = 0, None
    waiting: dict[int, list[list[list[int]]]] = defaultdict(list)  # layer -> its passes in a step
    for number, record in _records(file):
        if record.get("block") == "mtp":
            left_out += 1
            continue
        if record["step"] != step:
            for found in _passes(waiting, f"Step {step} of {file}"):
                yield _document(found, f"Step {step} of {file}", first)
                first += 1
            waiting.clear()
            step = record["step"]
        if not record["top_indices"]:
            raise DataError(
                f"Line {number} of {file} is damaged: it has no tokens; record the trace again."
            )
        waiting[record["layer"]].append(record["top_indices"])
    for found in _passes(waiting, f"Step {step} of {file}"):
        yield _document(found, f"Step {step} of {file}", first)
        first += 1
    notes.append(f"{file}: a document is one pass of a rank, since the trace tells of no texts.")
    if left_out:
        notes.append(f"{file}: {left_out} lines of multi-token prediction are left out.")


def _records(file: Path) -> Iterator[tuple[int, Record]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    reason = mismatch(record, Record, "the record")
                except (ValueError, RecursionError) as error:
                    reason = str(error)
                if reason is not None:
                    raise DataError(
                        f"Line {number} of {file} is damaged: {reason}; record the trace again."
                    )
                yield number, record
    except UnicodeDecodeError as error:
        raise DataError(f"{file} could not be read: {error}; record the trace again.") from error


def _passes(
    waiting: dict[int, list[list[list[int]]]], where: str
) -> list[dict[int, list[list[int]]]]:
    """Return the passes of a step: micro-batches come one after the other in every layer."""
    times = {len(passes) for passes in waiting.values()}
    if len(times) > 1:
        raise DataError(
            f"{where} is incomplete: its layers have {min(times)} to {max(times)} passes; "
            "record the trace again."
        )
    return [
        {layer: passes[i] for layer, passes in sorted(waiting.items())}
        for i in range(max(times, default=0))
    ]


def _document(of_layer: dict[int, list[list[int]]], where: str, document: int) -> TraceDocument:
    try:
        # [layers, tokens, topk] -> [tokens, layers, topk]
        experts: Any = np.array(list(of_layer.values()), dtype=np.int64).swapaxes(0, 1)
    except ValueError as error:
        raise DataError(
            f"{where} is damaged: its layers have other numbers of tokens or experts; record the "
            "trace again."
        ) from error
    found = TraceDocument.of(where, document, experts, layers=list(of_layer))
    if found is None:
        raise DataError(f"{where} is damaged: no token has an expert; record the trace again.")
    return found
