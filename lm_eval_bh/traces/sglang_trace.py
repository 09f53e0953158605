"""Reads SGLang's expert distribution record of the mode ``per_token``.

``expert_distribution_recorder_<time>_<rank>.pt``, as ``torch.save`` writes it: ``records``, one a
forward pass, with ``input_ids`` and ``positions`` of its tokens, ``extend_seq_lens`` (tokens of
each sequence, where the pass reads prompts), ``forward_mode`` and ``topk_ids_of_layer``, int32
``[layers, tokens, slots]``, -1 in unused slots and in layers without experts; and
``last_physical_to_logical_map`` ``[layers, physical experts]``: the recorded numbers are those of
physical experts, of which a logical one may have several.

Source: sgl-project/sglang, python/sglang/srt/eplb/expert_distribution.py.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.errors import DataError
from lm_eval_bh.traces.trace_document import MOST_EXPERTS, TraceDocument

Ints = NDArray[np.int64]


def read_sglang(file: Path, first: int, notes: list[str]) -> Iterator[TraceDocument]:
    """Yield the documents of a record: the sequences of the passes that read prompts.

    A record does not say whose tokens a decoding pass continues: those are left out, with a note.

    Parameters
    ----------
    file : Path
        A ``.pt`` file, of which nothing but tensors and plain values is loaded.
    first : int
        Number of the first document.
    notes : list of str
        Filled with what was left out.

    Raises
    ------
    DataError
        If it is damaged, or of another mode.
    """
    content = _load(file)
    records = content.get("records") if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise DataError(
            f"{file} has no records of tokens: record with "
            "--expert-distribution-recorder-mode per_token."
        )
    to_logical, left_out = _logical_experts(content, file), 0
    for number, record in enumerate(records):
        where = f"Record {number + 1} of {file}"
        if not isinstance(record, dict) or "topk_ids_of_layer" not in record:
            raise DataError(
                f"{where} has no topk_ids_of_layer: record with "
                "--expert-distribution-recorder-mode per_token."
            )
        ids = _ints(record, "input_ids", where)
        positions = _ints(record, "positions", where)
        experts = _experts(record["topk_ids_of_layer"], to_logical, len(ids), where)
        lengths = [] if record.get("extend_seq_lens") is None else _lengths(record, where)
        if sum(lengths) != len(ids) or len(positions) != len(ids):
            left_out += len(ids)
            continue
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            start += length
            found = TraceDocument.of(
                where, first, experts[part], positions=positions[part], tokens=ids[part]
            )
            if found is not None:
                yield found
                first += 1
    if left_out:
        notes.append(
            f"{file}: {left_out} tokens of decoding passes are left out, since the record does not "
            "say whose they are."
        )


def _load(file: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what becomes the error below
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DataError(
            f"{file} could not be read as tensors and plain values: it is damaged, or holds what "
            "would be executed; record the trace again."
        ) from error


def _logical_experts(content: dict[str, Any], file: Path) -> Ints | None:
    """Return the logical expert of each physical one, int64 [layers, physical]."""
    found = content.get("last_physical_to_logical_map")
    if found is None:
        return None
    table = np.asarray(found)
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer) or (table < 0).any():
        raise DataError(
            f"{file} is damaged: last_physical_to_logical_map must be experts [layers, experts], "
            f"not {list(table.shape)}; record the trace again."
        )
    return table.astype(np.int64)


def _ints(record: dict[str, Any], name: str, where: str) -> Ints:
    try:
        found = np.asarray(record[name])
        if found.ndim != 1 or not (np.issubdtype(found.dtype, np.integer) or not len(found)):
            raise ValueError(f"found {found.dtype} {list(found.shape)}")
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{where} is damaged: its {name} are no list of integers ({error}); record the trace "
            "again."
        ) from error
    ints: Ints = found.astype(np.int64)
    return ints


def _lengths(record: dict[str, Any], where: str) -> list[int]:
    found: list[int] = _ints(record, "extend_seq_lens", where).tolist()
    if min(found, default=0) < 0:
        raise DataError(
            f"{where} is damaged: its extend_seq_lens are negative; record the trace again."
        )
    return found


def _experts(found: Any, to_logical: Ints | None, tokens: int, where: str) -> Ints:
    """Return logical experts, int64 [tokens, layers, slots], -1 where unused."""
    physical = np.asarray(found)
    if (
        physical.ndim != 3
        or physical.shape[1] != tokens
        or not np.issubdtype(physical.dtype, np.integer)
    ):
        raise DataError(
            f"{where} is damaged: topk_ids_of_layer must be integers [layers, {tokens}, slots], "
            f"not {physical.dtype} {list(physical.shape)}; record the trace again."
        )
    physical = physical.astype(np.int64)
    if to_logical is None:
        to_logical = np.tile(np.arange(MOST_EXPERTS), (len(physical), 1))
    if len(to_logical) != len(physical) or (physical >= to_logical.shape[1]).any():
        raise DataError(
            f"{where} is damaged: its experts are not those of last_physical_to_logical_map, "
            f"{list(to_logical.shape)}; record the trace again."
        )
    layers = np.arange(len(physical))[:, None, None]
    logical = np.where(physical < 0, physical, to_logical[layers, np.maximum(physical, 0)])
    by_token: Ints = logical.swapaxes(0, 1)
    return by_token
