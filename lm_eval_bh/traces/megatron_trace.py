"""Reads Megatron-LM's router trace, written with ``--moe-routing-trace-path``.

``router_trace_rank<rank>.jsonl``: one file per rank with a line per step and layer: ``step, layer,
rank, num_tokens, topk`` and ``top_indices`` ``[tokens][topk]``. Later releases add ``stage`` and
``block``, which is ``mtp`` for layers of multi-token prediction. A rank of a pipeline has only the
layers of its stage, and the file of a rank without routers is empty. The same folder may hold
``router_state_rank<rank>.pt`` and the ``.bin`` files of hidden states and logits.

Source: NVIDIA/Megatron-LM, megatron/core/transformer/moe/router_trace.py (pull request 5220).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import UNUSED
from lm_eval_bh.traces.integers import of_lists
from lm_eval_bh.traces.notes import Notes, layers_of, numbers
from lm_eval_bh.traces.trace_document import MOST_EXPERTS, Experts, TraceDocument
from lm_eval_bh.validation import mismatch

TRACE = re.compile(r"router_trace_rank\d+\.jsonl$")
BESIDE = re.compile(r"(router_state|hidden_states|logits)_rank\d+\.(pt|bin)$")


class _MayHave(TypedDict, total=False):
    block: str | None
    stage: str | None
    num_tokens: int | None
    topk: int | None


class Record(_MayHave):
    """A line of the trace."""

    step: int
    layer: int
    rank: int
    top_indices: list[list[int]]


Layers = dict[int, list[Experts]]  # layer -> its passes [tokens, topk] in a step
Passes = list[dict[int, Experts]]


def read_megatron(files: Sequence[Path], first: int, notes: Notes) -> Iterator[TraceDocument]:
    """Yield the documents of a trace: one per forward pass, whichever texts its tokens come from.

    Ranks with different layers are the stages of a pipeline, whose layers are joined. Ranks with
    the same layers have different tokens, or, where all choices are equal, the same tokens, which
    are counted once. Everything is held in memory as 16-bit numbers, which are smaller than text.

    Parameters
    ----------
    files : sequence of Path
        The traces of all ranks.
    first : int
        Number of the first document.
    notes : Notes
        Filled with what was left out or joined.

    Raises
    ------
    DataError
        If a line is damaged, or the layers of a pass differ in their number of tokens.
    """
    steps: dict[int, dict[int, Layers]] = defaultdict(dict)  # step -> rank -> layers
    for file in files:
        for step, rank, layer, experts in _records(file, notes):
            of_rank = steps[step].setdefault(rank, defaultdict(list))
            of_rank[layer].append(experts)
    if steps:
        notes.add("a document is one pass of a rank, since Megatron's trace does not mark texts.")
    for step in sorted(steps):
        # A step's data is released as soon as it is read.
        for where, of_layer in _joined(steps.pop(step), f"Step {step}", notes):
            yield _document(of_layer, where, first)
            first += 1


def _joined(
    ranks: dict[int, Layers], where: str, notes: Notes
) -> Iterator[tuple[str, dict[int, Experts]]]:
    """Yield the passes of a step, each with the layers of all stages."""
    stages: dict[tuple[int, ...], list[int]] = defaultdict(list)  # layers -> ranks
    for rank in sorted(ranks):
        stages[tuple(sorted(ranks[rank]))].append(rank)
    layers = [layer for of_stage in stages for layer in of_stage]
    if len(set(layers)) < len(layers):
        raise DataError(
            f"{where} has ranks of different stages that share layers, "
            f"{' and '.join(layers_of(list(found)) for found in stages)}: give the ranks of one "
            "model's pipeline."
        )
    if len({len(of_stage) for of_stage in stages.values()}) > 1:
        found = "; ".join(
            f"{layers_of(list(of_stage))} of ranks {numbers(members)}"
            for of_stage, members in stages.items()
        )
        raise DataError(
            f"{where} has stages of a pipeline with different numbers of ranks ({found}): give the "
            "traces of all ranks, or of one rank of each stage."
        )
    if len(stages) > 1:
        found = " and ".join(layers_of(list(of_stage)) for of_stage in sorted(stages))
        notes.add(f"ranks of different stages of the pipeline are joined: {found}.")
    seen: dict[bytes, int] = {}
    read: set[int] = set()
    # Megatron numbers the ranks of a stage one after the other, so stages pair up in that order.
    for members in zip(*(stages[of_stage] for of_stage in sorted(stages)), strict=True):
        name = f"{where} of rank{'s' if len(members) > 1 else ''} {numbers(list(members))}"
        parts = [_passes(ranks[member], f"{where} of rank {member}") for member in members]
        for of_stages in zip_longest(*parts):
            if None in of_stages:
                raise DataError(
                    f"{name} is incomplete: the stages of the pipeline have different numbers of "
                    "passes; record the trace again."
                )
            of_layer = {k: v for part in of_stages for k, v in sorted(part.items())}
            before = seen.setdefault(_digest(of_layer), members[0])
            if before != members[0]:
                notes.count(
                    len(next(iter(of_layer.values()))),
                    f"tokens of rank {members[0]}",
                    f"have the same choices as rank {before} in the same step, as with "
                    "tensor parallelism: they are counted once.",
                )
                continue
            read.add(members[0])
            yield name, of_layer
    if len(read) > 1:
        notes.add(
            f"ranks {numbers(sorted(read))} have the same layers and count as different tokens, "
            "as with data parallelism. Pipeline stages that count their layers from 0 look the "
            "same: if these are such stages, import one rank at a time."
        )


def _records(file: Path, notes: Notes) -> Iterator[tuple[int, int, int, Experts]]:
    """Yield (step, rank, layer, experts [tokens, topk]) of the lines with tokens."""
    empty = True
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                empty = False
                where = f"Line {number} of {file}"
                try:
                    record = json.loads(line)
                    reason = mismatch(record, Record, "the record")
                except (ValueError, RecursionError) as error:
                    reason = str(error)
                if reason is not None:
                    raise DataError(f"{where} is damaged: {reason}; record the trace again.")
                stage, block = record.get("stage"), record.get("block")
                if block == "mtp":
                    notes.count(1, "lines of multi-token prediction", "are left out.")
                elif block not in (None, "decoder"):
                    notes.count(1, f"lines of the block {block} in {file}", "are left out.")
                elif stage not in (None, "pre_dispatch"):
                    notes.count(1, f"lines of the stage {stage} in {file}", "are left out.")
                else:
                    experts = _experts(record, where)
                    if len(experts):
                        yield record["step"], record["rank"], record["layer"], experts
                    else:
                        notes.count(
                            1, f"lines of {file}", "have no tokens: the rank had none in that step."
                        )
    except UnicodeDecodeError as error:
        raise DataError(f"{file} could not be read: {error}; record the trace again.") from error
    if empty:
        notes.name(str(file), "it has no lines: the rank has no router, or recorded no step.")


def _experts(record: Any, where: str) -> Experts:
    rows = record["top_indices"]
    try:
        experts: NDArray[Any] = of_lists(rows, 2)
    except ValueError as error:
        raise DataError(
            f"{where} is damaged: its tokens differ in their number of experts ({error}); record "
            "the trace again."
        ) from error
    shape = experts.shape if len(experts) else (0, record.get("topk"))
    for name, found in zip(("num_tokens", "topk"), shape, strict=True):
        said = record.get(name)
        if said is not None and said != found:
            raise DataError(
                f"{where} is damaged: its {name} is {said}, and its top_indices have {found}; "
                "record the trace again."
            )
    wrong = experts[(experts < UNUSED) | (experts >= MOST_EXPERTS)]
    if len(wrong):
        raise DataError(
            f"{where} is damaged: found expert {wrong[0]}, which is out of range; record the trace "
            "again."
        )
    return experts.astype(np.int16)


def _passes(layers: Layers, where: str) -> Passes:
    """Return the passes of a step: in every layer, micro-batches follow one another."""
    times = {len(passes) for passes in layers.values()}
    if len(times) > 1:
        raise DataError(
            f"{where} is incomplete: its layers have {min(times)} to {max(times)} passes; "
            "record the trace again."
        )
    return [{layer: passes[i] for layer, passes in layers.items()} for i in range(max(times))]


def _digest(of_layer: dict[int, Experts]) -> bytes:
    digest = hashlib.sha256()
    for layer, experts in of_layer.items():
        digest.update(f"{layer} {experts.shape}".encode())
        digest.update(experts.tobytes())
    return digest.digest()


def _document(of_layer: dict[int, Experts], where: str, document: int) -> TraceDocument:
    if len({experts.shape for experts in of_layer.values()}) > 1:
        raise DataError(
            f"{where} is damaged: its layers differ in their number of tokens or experts; record "
            "the trace again."
        )
    layers = sorted(of_layer)
    experts = np.stack([of_layer[layer] for layer in layers], axis=1)  # [tokens, layers, topk]
    return TraceDocument.of(where, document, experts, layers=layers)
