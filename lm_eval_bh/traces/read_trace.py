"""Finds out which engine wrote a trace, and reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lm_eval_bh.errors import DataError, ParameterError, did_you_mean
from lm_eval_bh.traces.csv_trace import read_csv
from lm_eval_bh.traces.megatron_trace import read_megatron
from lm_eval_bh.traces.sglang_trace import read_sglang
from lm_eval_bh.traces.trace_document import TraceDocument
from lm_eval_bh.traces.vllm_trace import read_vllm

Reader = Callable[[Path, int, list[str]], Iterator[TraceDocument]]
READERS: dict[str, Reader] = {
    "vllm": lambda file, first, notes: read_vllm(file, first),
    "sglang": read_sglang,
    "megatron": read_megatron,
    "csv": lambda file, first, notes: read_csv(file, first),
}
SUFFIXES = {".npy": "vllm", ".json": "vllm", ".pt": "sglang", ".csv": "csv"}
LINES = ".jsonl"  # of vLLM or of Megatron


def trace_files(sources: Iterable[Path]) -> list[Path]:
    """Return the files of traces: those given, and those that lie in folders that were given.

    Raises
    ------
    DataError
        If one does not exist, or a folder holds none.
    """
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            known = (*SUFFIXES, LINES)
            found = sorted(file for file in source.iterdir() if file.suffix in known)
            if not found:
                raise DataError(f"{source} holds no trace: its files end in {', '.join(known)}.")
            files += found
        elif source.is_file():
            files.append(source)
        else:
            raise DataError(f"There is no trace {source}: give a file or a folder of them.")
    return files


def format_of(file: Path) -> str:
    """Return the format of a trace: vllm, sglang, megatron or csv.

    Raises
    ------
    ParameterError
        If neither the name nor the first line tells.
    """
    if file.suffix in SUFFIXES:
        return SUFFIXES[file.suffix]
    if file.suffix == LINES:
        try:
            with file.open(encoding="utf-8") as lines:
                first = json.loads(lines.readline())
        except (ValueError, RecursionError):
            first = None
        if isinstance(first, dict) and "top_indices" in first:
            return "megatron"
        if isinstance(first, dict) and "choices" in first:
            return "vllm"
    raise ParameterError(f"Nobody knows what wrote {file}: say --format {' or '.join(READERS)}.")


def read_traces(
    files: Iterable[Path], name: str | None, notes: list[str]
) -> Iterator[TraceDocument]:
    """Yield the documents of some files, numbered through.

    Parameters
    ----------
    files : iterable of Path
        See :func:`trace_files`.
    name : str, optional
        Of the format; by default of each file its own, see :func:`format_of`.
    notes : list of str
        Filled with what was left out.

    Raises
    ------
    ParameterError
        If there is no such format, or a file does not tell its own.
    DataError
        If a file is damaged.
    """
    if name is not None and name not in READERS:
        raise ParameterError(
            f"format must be {', '.join(READERS)}, not {name!r}{did_you_mean(name, READERS)}."
        )
    first = 0
    for file in files:
        for document in READERS[name or format_of(file)](file, first, notes):
            yield document
            first = document.document + 1
