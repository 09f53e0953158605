"""Writes a trace as a run: a results file and a routing log, as hf-bh would have logged it."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.experiment_names import is_file_name
from lm_eval_bh.harness.logs.merge_summaries import merge_summaries
from lm_eval_bh.schema import (
    MANIFEST,
    SCHEMA_VERSION,
    TOKENS,
    UNUSED,
    ImportedRunInfo,
    token_schema,
)
from lm_eval_bh.traces.notes import Notes
from lm_eval_bh.traces.trace_counters import TraceCounters
from lm_eval_bh.traces.trace_document import STEP, TraceDocument

LOGS = "logs"


@dataclass(frozen=True)
class TraceSource:
    """The origin of a trace, and facts that it does not record.

    Attributes
    ----------
    engine : str
        Engine that wrote the trace.
    model : str
        Hub name or folder, for names in tables and for the tokenizer.
    task : str
        Name for its texts.
    num_experts : int, optional
        Experts per layer; by default one more than the highest number that occurs.
    model_config : dict
        The model's configuration, from which FLOPs are counted; empty if unknown.
    """

    engine: str
    model: str
    task: str = "imported"
    num_experts: int | None = None
    model_config: dict[str, Any] | None = None


def write_trace(
    documents: Iterable[TraceDocument],
    source: TraceSource,
    folder: Path,
    notes: Notes,
    *,
    force: bool = False,
) -> TraceCounters:
    """Write a run whose routing ``aggregate`` and ``report`` can read.

    Parameters
    ----------
    documents : iterable of TraceDocument
        Documents of one model.
    source : TraceSource
        Origin of the documents.
    folder : Path
        Written completely or not at all.
    notes : Notes
        What reading the documents left out; the run records it too.
    force : bool
        Replace the folder if an earlier import wrote it.

    Raises
    ------
    ParameterError
        If the folder is not empty, or the task's name cannot be a file name.
    DataError
        If the trace has no tokens, or its documents come from different models.
    """
    if not is_file_name(source.task):
        raise ParameterError(f"task must be a valid file name, not {source.task!r}.")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        ours = folder.is_dir() and {path.name for path in folder.iterdir()} <= {
            LOGS,
            *(path.name for path in folder.glob("results_*.json")),
        }
        if not (force and ours):
            hint = "use --overwrite to replace it" if ours and not force else "name another one"
            raise ParameterError(f"--output-dir {folder} exists and is not empty: {hint}.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        whole = Path(scratch) / "whole"
        counters = _write(documents, source, whole, notes)
        if folder.exists():
            shutil.rmtree(folder)
        whole.rename(folder)
    return counters


def _write(
    documents: Iterable[TraceDocument], source: TraceSource, folder: Path, notes: Notes
) -> TraceCounters:
    run_id = uuid.uuid4().hex
    log = folder / LOGS / run_id
    (log / TOKENS).mkdir(parents=True)
    counters, part = TraceCounters(), f"{TOKENS}/part-0-0.parquet"
    schema = token_schema(with_logits=False, num_experts=0)
    rows = 0
    with pq.ParquetWriter(log / part, schema, compression="zstd") as writer:
        for document in documents:
            counters.add(document)
            if document.document == STEP:
                continue
            table = _rows(document, source.task, schema)
            writer.write_table(table)
            rows += table.num_rows
    if not counters.tokens:
        found = "".join(f" ({sentence.removesuffix('.')})" for sentence in notes)
        raise DataError(f"The trace has no token with experts{found}: record it again.")
    if source.num_experts is None:
        notes.add("the number of experts is taken from the highest one seen: see --num-experts.")
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "files": [part],
        "token_rows": rows,
    }
    (log / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    now = time.strftime("%Y-%m-%dT%H-%M-%S")
    results = _results(counters, source, run_id, list(notes))
    (folder / f"results_{now}.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return counters


def _rows(document: TraceDocument, task: str, schema: pa.Schema) -> pa.Table:
    """Return a document's rows, one per token and layer, ordered by layer."""
    experts = document.experts.swapaxes(0, 1)  # [layers, tokens, k]
    used = experts != UNUSED
    number = experts.shape[0] * experts.shape[1]
    counts = used.sum(-1).ravel()
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    weights: pa.Array = pa.nulls(number, schema.field("weights").type)
    if document.weights is not None:
        of_used = document.weights.swapaxes(0, 1)[used]
        weights = pa.ListArray.from_arrays(offsets, pa.array(of_used, pa.float32()))

    def every_layer(values: Any) -> Any:
        return np.tile(values, len(experts))

    columns: dict[str, Any] = {
        "task": pa.DictionaryArray.from_arrays(np.zeros(number, np.int32), [task]),
        "doc_id": np.full(number, document.document),
        "request": np.zeros(number, np.int16),
        "repeat": np.full(number, document.repeat),
        "layer": np.repeat(document.layers, experts.shape[1]),
        "position": every_layer(document.positions),
        "token_id": pa.nulls(number, pa.int32())
        if document.tokens is None
        else every_layer(document.tokens),
        "count": counts,
        "experts": pa.ListArray.from_arrays(offsets, pa.array(experts[used], pa.int16())),
        "weights": weights,
        "loss": pa.nulls(number, schema.field("loss").type),
    }
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column).cast(schema.field(name).type)
        for name, column in ((name, columns[name]) for name in schema.names)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _results(
    counters: TraceCounters, source: TraceSource, run_id: str, notes: list[str]
) -> dict[str, Any]:
    """Return the results that lm-eval would have written, without metrics."""
    experts, layers = counters.experts(source.num_experts), int(counters.layers[-1]) + 1
    state = {
        "tasks": {source.task: counters.state(layers, experts)},
        "computed_tokens": counters.tokens,
        "padding_tokens": 0,
        "expert_rows": None,
    }
    min_k, max_k = counters.extremes
    fixed = min_k == max_k
    info: ImportedRunInfo = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "config": {
            "rule": "topk" if fixed else "imported",
            "alpha": None,
            "min_k": min_k,
            "max_k": max_k,
            "mode": "patch",
        },
        "rule": {
            "name": "topk" if fixed else "imported",
            "label": "top-k" if fixed else f"as {source.engine} routed",
            "source": f"a trace of {source.engine}",
            "fixed_count": fixed,
            "tests": False,
        },
        "experts": source.engine,
        "log_routing": "full",
        "log_dir": LOGS,
        "routed_layers": counters.layers.tolist(),
        "num_layers": len(counters.layers),
        "num_experts": experts,
        "native_top_k": max_k,
        "model_config": source.model_config or {},
        "null_model": None,
        "summary": merge_summaries([state], counters.layers.tolist(), 0),
        "notes": notes,
    }
    counted = {"original": counters.documents, "effective": counters.documents}
    return {
        "results": {source.task: {"alias": source.task, "sample_len": counters.documents}},
        "configs": {source.task: {"task": source.task}},
        "n-samples": {source.task: counted},
        "config": {
            "model": source.engine,
            "model_args": {"pretrained": source.model},
            "bh": info,
        },
        "model_name": source.model,
        "date": time.time(),
    }
