"""Reads SGLang's expert distribution record in the mode ``per_token``.

``expert_distribution_recorder_<time>_<rank>.pt``, one ``torch.save`` file per rank. It holds
``records``, one per forward pass, with ``forward_pass_id``, ``rank``, ``input_ids`` and
``positions`` of its tokens, ``forward_mode``, ``extend_seq_lens`` (tokens of each sequence, where
the pass reads prompts) and ``topk_ids_of_layer``, int32 ``[layers, tokens, slots]``, -1 in unused
slots and in layers without experts; and ``last_physical_to_logical_map``
``[layers, physical experts]``. The recorded numbers are those of physical experts; a logical expert
may have several physical copies.

Sources: sgl-project/sglang, python/sglang/srt/eplb/expert_distribution.py; for modes and the order
of sequences in a pass, managers/schedule_batch.py and model_executor/forward_batch_info.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import UNUSED
from lm_eval_bh.traces.integers import Ints, of_lists
from lm_eval_bh.traces.notes import Notes
from lm_eval_bh.traces.torch_file import Tensor, read_torch_file
from lm_eval_bh.traces.trace_document import MOST_EXPERTS, STEP, TraceDocument
from lm_eval_bh.validation import shown

PER_TOKEN = "record with --expert-distribution-recorder-mode per_token"
EXTEND, DECODE, MIXED, IDLE = 1, 2, 3, 4  # forward_mode: others belong to speculation and the like
RANK = re.compile(r"_(\d+)$")


def read_sglang(files: Sequence[Path], first: int, notes: Notes) -> Iterator[TraceDocument]:
    """Yield the documents of the records, the prompts that forward passes read, and their steps.

    A prompt that the engine read in chunks is one document. A record does not say whose tokens a
    decoding or mixed pass continues: a decoding pass is a step of no document, and the tokens of a
    mixed pass are left out. A pass that several ranks recorded is counted once.

    Parameters
    ----------
    files : sequence of Path
        ``.pt`` files, from which only tensors and plain values are read.
    first : int
        Number of the first document.
    notes : Notes
        Filled with what was left out.

    Raises
    ------
    DataError
        If a file is damaged, or was recorded in another mode.
    """
    ranks = _Ranks(notes)
    for file in files:
        waiting: _Sequence | None = None  # last of a pass; the next pass may continue it
        for found in _passes(file, notes):
            if ranks.repeats(found):
                continue
            if found.mode == DECODE and len(found.tokens):
                yield found.step(notes)
                continue
            for number, sequence in enumerate(found.sequences(notes)):
                if waiting is not None and number == 0 and sequence.goes_on_from(waiting):
                    notes.count(1, "chunks", "are joined to the prompts that they continue.")
                    waiting = waiting.joined(sequence)
                    continue
                if waiting is not None:
                    yield waiting.document(first, notes)
                    first += 1
                waiting = sequence
        if waiting is not None:
            yield waiting.document(first, notes)
            first += 1


@dataclass(frozen=True)
class _Sequence:
    """Consecutive tokens of one request."""

    where: str
    positions: Ints
    tokens: Ints
    experts: Ints

    def goes_on_from(self, other: _Sequence) -> bool:
        """Return whether this is the next chunk, which the scheduler puts first in the pass.

        The chunk before it came last in the previous pass and filled it.
        """
        follows = self.positions[0] == other.positions[-1] + 1
        return bool(follows and self.experts.shape[1:] == other.experts.shape[1:])

    def joined(self, other: _Sequence) -> _Sequence:
        return _Sequence(
            self.where,
            np.concatenate([self.positions, other.positions]),
            np.concatenate([self.tokens, other.tokens]),
            np.concatenate([self.experts, other.experts]),
        )

    def document(self, number: int, notes: Notes) -> TraceDocument:
        if self.positions[0]:
            notes.name(
                self.where,
                f"a prompt begins at position {self.positions[0]}: the engine took the beginning "
                "from its cache, or from a pass that is missing.",
            )
        return TraceDocument.of(
            self.where,
            number,
            self.experts,
            layers=np.arange(self.experts.shape[1]),
            positions=self.positions,
            tokens=self.tokens,
        )


@dataclass(frozen=True)
class _Pass:
    """One validated record."""

    where: str
    number: int  # forward_pass_id, or if missing the record's place in the file
    identified: bool
    rank: str
    mode: int
    tokens: Ints
    positions: Ints
    lengths: list[int] | None
    experts: Ints  # logical, [tokens, layers, slots]

    def step(self, notes: Notes) -> TraceDocument:
        """Return a decoding pass: one token of each request that was served."""
        notes.count(
            len(self.tokens),
            "tokens of decoding passes",
            "count for distinct experts alone, since the record does not say whose they are.",
        )
        layers = np.arange(self.experts.shape[1])
        return TraceDocument.of(self.where, STEP, self.experts, layers=layers)

    def sequences(self, notes: Notes) -> Iterator[_Sequence]:
        """Yield the prompts of the pass, or their chunks."""
        lengths = self.lengths
        if self.mode not in (EXTEND, MIXED) or lengths is None:
            idle = self.mode == IDLE
            notes.count(
                len(self.tokens),
                f"tokens of {'idle passes' if idle else f'passes with forward_mode {self.mode}'}",
                "are left out, since the record does not say whose they are.",
            )
            return
        total, prompts = sum(lengths), len(lengths)
        if total != len(self.tokens) and not (self.mode == MIXED and total < len(self.tokens)):
            raise DataError(
                f"{self.where} is damaged: it has {len(self.tokens)} tokens, and its "
                f"extend_seq_lens are {total} together; record it again."
            )
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).tolist()
        if self.mode == MIXED:
            # Decoding requests come last, one token each, which may not be their first.
            while prompts > 1 and lengths[prompts - 1] == 1 and self.positions[starts[prompts - 1]]:
                prompts -= 1
            notes.count(
                len(self.tokens) - starts[prompts],
                "decoded tokens of mixed passes",
                "are left out, since the record does not say whose they are.",
            )
        for start, end in pairwise(starts[: prompts + 1]):
            if start == end:
                continue
            part = slice(start, end)
            if (np.diff(self.positions[part]) != 1).any():
                raise DataError(
                    f"{self.where} is damaged: the positions of a sequence are not consecutive; "
                    "record it again."
                )
            yield _Sequence(self.where, self.positions[part], self.tokens[part], self.experts[part])


class _Ranks:
    """Keeps track of which rank each pass was read from.

    With tensor parallelism, every rank has all tokens; with data parallelism, its own.
    """

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._seen: dict[tuple[int, bytes], tuple[str, bytes]] = {}

    def repeats(self, found: _Pass) -> bool:
        """Return whether another rank recorded the same tokens in the same pass."""
        lengths = np.array(found.lengths or [], dtype=np.int64)
        key = found.number, _digest(found.tokens, found.positions, lengths)
        experts = _digest(found.experts)
        seen = key in self._seen
        rank, before = self._seen.setdefault(key, (found.rank, experts))
        again = experts == before and seen and found.identified
        if not len(found.tokens) or (rank == found.rank and not again):
            return False
        if rank == found.rank:
            self._notes.name(found.where, "the same pass was recorded before; it is counted once.")
            return True
        self._notes.count(
            len(found.tokens),
            f"tokens of rank {found.rank}",
            f"are those of rank {rank} in the same pass, as with tensor parallelism: they are "
            "counted once.",
        )
        if experts != before:
            self._notes.name(
                found.where, f"its experts differ from those of rank {rank}, which are used."
            )
        return True


def _digest(*arrays: Ints) -> bytes:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _passes(file: Path, notes: Notes) -> Iterator[_Pass]:
    content = read_torch_file(file)
    records = content.get("records") if isinstance(content, dict) else None
    if not isinstance(records, list):
        if isinstance(content, dict) and any(
            isinstance(part, dict) and "weight" in part for part in content.values()
        ):
            raise DataError(
                f"{file} holds router weights, which Megatron-LM writes beside a trace: "
                "give router_trace_rank*.jsonl."
            )
        raise DataError(f"{file} has no records of tokens: {PER_TOKEN}.")
    to_logical = _logical_experts(content, file, notes)
    named = RANK.search(file.stem)
    of_file = named[1] if named else str(file)
    for number, record in enumerate(records):
        where = f"Record {number + 1} of {file}"
        if not isinstance(record, dict) or "topk_ids_of_layer" not in record:
            raise DataError(f"{where} has no topk_ids_of_layer: {PER_TOKEN}.")
        tokens = _integers(record, "input_ids", where)
        positions = _integers(record, "positions", where)
        if len(positions) != len(tokens):
            raise DataError(
                f"{where} is damaged: it has {len(tokens)} input_ids and {len(positions)} "
                "positions; record it again."
            )
        lengths = None
        if record.get("extend_seq_lens") is not None:
            lengths = _integers(record, "extend_seq_lens", where).tolist()
            if min(lengths, default=0) < 0:
                raise DataError(
                    f"{where} is damaged: its extend_seq_lens are negative; record it again."
                )
        mode = _whole(record, "forward_mode", where)
        if mode is None:
            mode = DECODE if lengths is None else EXTEND
            notes.add(
                f"{file}: records have no forward_mode; those with extend_seq_lens are assumed to "
                "read prompts."
            )
        if mode in (EXTEND, MIXED) and lengths is None:
            raise DataError(
                f"{where} is damaged: its pass read prompts, but extend_seq_lens is missing; "
                "record it again."
            )
        identity = _whole(record, "forward_pass_id", where)
        rank = _whole(record, "rank", where)
        experts = _experts(record, to_logical, len(tokens), where)
        yield _Pass(
            where,
            number if identity is None else identity,
            identity is not None,
            of_file if rank is None else str(rank),
            mode,
            tokens,
            positions,
            lengths,
            experts,
        )


def _logical_experts(content: dict[str, Any], file: Path, notes: Notes) -> Ints | None:
    """Return the logical expert of each physical one, int64 [layers, physical]."""
    name = "last_physical_to_logical_map"
    if content.get(name) is None:
        notes.add(f"{file}: it has no {name}, so experts keep their recorded numbers.")
        return None
    table = _integers(content, name, str(file), 2)
    if (table < 0).any() or not table.size:
        raise DataError(
            f"{file} is damaged: {name} must be experts [layers, experts], not "
            f"{list(table.shape)} with negative ones; record it again."
        )
    if (table != np.arange(table.shape[1])).any():
        notes.add(
            f"{file}: experts have copies, which are mapped by the {name} at the end of the "
            "recording; if the engine moved experts meanwhile, record again with rebalancing "
            "turned off."
        )
    return table


def _whole(record: dict[str, Any], name: str, where: str) -> int | None:
    value = record.get(name)
    if value is not None and type(value) is not int:
        raise DataError(
            f"{where} is damaged: its {name} must be an integer, not {shown(value)}; record it "
            "again."
        )
    return value


def _integers(record: dict[str, Any], name: str, where: str, depth: int = 1) -> Ints:
    """Return the integers of a field, a tensor or lists."""
    value = record.get(name)
    try:
        found = value.integers() if isinstance(value, Tensor) else of_lists(value, depth)
        if found.ndim != depth:
            raise ValueError(f"found {list(found.shape)}")
    except ValueError as error:
        what = "a list" if depth == 1 else f"an array of {depth} dimensions"
        raise DataError(
            f"{where} is damaged: its {name} must be {what} of integers ({error}); record it again."
        ) from error
    return found


def _experts(record: dict[str, Any], to_logical: Ints | None, tokens: int, where: str) -> Ints:
    """Return logical experts, int64 [tokens, layers, slots], -1 where unused."""
    physical = _integers(record, "topk_ids_of_layer", where, 3)
    if physical.shape[1] != tokens:
        raise DataError(
            f"{where} is damaged: topk_ids_of_layer must be [layers, {tokens} tokens, slots], not "
            f"{list(physical.shape)}; record it again."
        )
    if (physical < UNUSED).any() or (physical >= MOST_EXPERTS).any():
        wrong = physical[(physical < UNUSED) | (physical >= MOST_EXPERTS)][0]
        raise DataError(
            f"{where} is damaged: found expert {wrong}, which is out of range; record it again."
        )
    if to_logical is None:
        return physical.swapaxes(0, 1)
    if len(to_logical) != len(physical) or (physical >= to_logical.shape[1]).any():
        raise DataError(
            f"{where} is damaged: its experts do not match last_physical_to_logical_map, "
            f"{list(to_logical.shape)}; record the trace again."
        )
    layers = np.arange(len(physical))[:, None, None]
    logical = np.where(physical < 0, physical, to_logical[layers, np.maximum(physical, 0)])
    by_token: Ints = logical.swapaxes(0, 1)
    return by_token
