"""Finds out which engine wrote a trace, and reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from lm_eval_bh.errors import DataError, ParameterError, did_you_mean
from lm_eval_bh.traces.csv_trace import read_csv
from lm_eval_bh.traces.megatron_trace import BESIDE, TRACE, read_megatron
from lm_eval_bh.traces.notes import Notes
from lm_eval_bh.traces.sglang_trace import read_sglang
from lm_eval_bh.traces.trace_document import TraceDocument
from lm_eval_bh.traces.vllm_trace import is_vllm, read_vllm

# A reader gets all files of a format at once, since files of several ranks belong together.
Reader = Callable[[Sequence[Path], int, Notes], Iterator[TraceDocument]]
READERS: dict[str, Reader] = {
    "vllm": read_vllm,
    "sglang": read_sglang,
    "megatron": read_megatron,
    "csv": read_csv,
}
SUFFIXES = {".npy": "vllm", ".json": "vllm", ".pt": "sglang", ".csv": "csv"}
LINES = ".jsonl"  # written by vLLM or Megatron
LOOKED_AT = 100  # lines read to recognise a format


def trace_files(sources: Iterable[Path], notes: Notes) -> list[Path]:
    """Return the trace files among the given files and in the given folders.

    Parameters
    ----------
    sources : iterable of Path
        Files and folders.
    notes : Notes
        Filled with the files that are not traces and those that were given twice.

    Raises
    ------
    DataError
        If a source does not exist, or a folder holds no trace.
    """
    files: dict[Path, Path] = {}  # resolved path -> path as given
    for source in sources:
        found = [source]
        if source.is_dir():
            known = (*SUFFIXES, LINES)
            found = sorted(file for file in source.iterdir() if file.suffix in known)
            for file in filter(_is_beside, found):
                notes.name(str(file), "Megatron writes it beside a trace; left out.")
            found = [file for file in found if file.is_file() and not _is_beside(file)]
            if not found:
                raise DataError(f"{source} holds no trace: its files end in {', '.join(known)}.")
        elif not source.is_file():
            raise DataError(f"There is no trace {source}: give a file or a folder of them.")
        elif _is_beside(source):
            raise DataError(
                f"{source} is not a trace; Megatron writes it beside one: give "
                "router_trace_rank*.jsonl."
            )
        for file in found:
            if file.resolve() in files:
                notes.name(str(file), "it was given twice and is read once.")
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _is_beside(file: Path) -> bool:
    return BESIDE.match(file.name) is not None


def format_of(file: Path) -> str:
    """Return the format of a trace: vllm, sglang, megatron or csv.

    Raises
    ------
    ParameterError
        If neither the name nor the first lines tell.
    """
    if file.suffix in SUFFIXES:
        return SUFFIXES[file.suffix]
    if file.suffix == LINES:
        if TRACE.match(file.name):
            return "megatron"
        for content in _lines(file):
            if isinstance(content, dict) and "top_indices" in content:
                return "megatron"
            if is_vllm(content):
                return "vllm"
    raise ParameterError(f"It is unknown what wrote {file}: add --format {' or '.join(READERS)}.")


def _lines(file: Path) -> Iterator[object]:
    """Yield the JSON values of the first lines: failed requests may come before others."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for line in islice(lines, LOOKED_AT):
                if line.strip():
                    yield json.loads(line)
    except (ValueError, RecursionError):
        return  # the reader reports what cannot be read


def by_format(files: Iterable[Path], name: str | None) -> dict[str, list[Path]]:
    """Return the files by format: the given one, or by default each file's own.

    Raises
    ------
    ParameterError
        If there is no such format, or that of a file cannot be told.
    """
    if name is not None and name not in READERS:
        raise ParameterError(
            f"format must be {', '.join(READERS)}, not {name!r}{did_you_mean(name, READERS)}."
        )
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(name or format_of(file), []).append(file)
    return found


def read_traces(files: dict[str, list[Path]], notes: Notes) -> Iterator[TraceDocument]:
    """Yield the documents of some files as recorded, numbered consecutively, and steps.

    Parameters
    ----------
    files : dict
        See :func:`by_format`.
    notes : Notes
        Filled with what was left out.

    Raises
    ------
    DataError
        If a file is damaged.
    """
    first = 0
    for name, of_format in files.items():
        for document in READERS[name](of_format, first, notes):
            yield document
            first = max(first, document.document + 1)  # a step has no number
