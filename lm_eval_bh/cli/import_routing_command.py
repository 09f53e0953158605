"""``lm-eval-bh import-routing``: traces of other engines as a run that tables can read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.model_files import file_of_model
from lm_eval_bh.cli.options import Overwrite, TraceFormat
from lm_eval_bh.cli.printing import say, warn
from lm_eval_bh.files import check_output
from lm_eval_bh.schema import read_json

# How configurations of transformers call the number of experts of a layer.
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def import_routing(
    sources: Annotated[
        list[Path], typer.Argument(help="Traces, or folders of them, all of one model.")
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "--output", help="Folder to write.")],
    engine: Annotated[
        TraceFormat | None,
        typer.Option("--format", help="Format of the traces; default: by the file."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="Name on the hub or folder of the model: its tokenizer and experts."),
    ] = "unknown",
    num_experts: Annotated[
        int | None,
        typer.Option(
            min=1, help="Experts of a layer; default: the model's, else the highest seen."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="Name of the task under which tables list the texts.")
    ] = "imported",
    overwrite: Overwrite = False,
) -> None:
    """Turn expert traces of vLLM, SGLang, Megatron or a CSV into a run for aggregate and report.

    vLLM: responses of its server or of run-batch with routed_experts (.json, .jsonl), or one array
    (.npy). SGLang: its expert distribution record per token (.pt). Megatron: its router trace
    (.jsonl). CSV: the columns document, token, layer, expert, and weight and token_id where known.

    import-routing prints what it skipped, aligned or took for an engine's filler, and keeps this as
    notes of the run.
    """
    with on_interrupt(NOTHING_HALF_WRITTEN):
        from lm_eval_bh.traces.filler import without_filler
        from lm_eval_bh.traces.model_layers import layers_with_router
        from lm_eval_bh.traces.notes import Notes
        from lm_eval_bh.traces.read_trace import by_format, read_traces, trace_files
        from lm_eval_bh.traces.trace_run import TraceSource, write_trace

        check_output(output_dir, "--output-dir", folder=True)
        notes = Notes()
        files = by_format(trace_files(sources, notes), engine)
        config = _config(model)
        if num_experts is None:
            found = (config.get(name) for name in NUM_EXPERTS)
            num_experts = next((n for n in found if type(n) is int and n > 0), None)
        documents = without_filler(partial(read_traces, files), layers_with_router(config), notes)
        source = TraceSource(" and ".join(files), model, task, num_experts, config)
        counters = write_trace(documents, source, output_dir, notes, force=overwrite)
    low, high = counters.extremes
    say(
        f"{counters.documents} documents, {counters.tokens} tokens, {len(counters.layers)} layers, "
        f"{low if low == high else f'{low} to {high}'} of {counters.experts(num_experts)} experts."
    )
    distinct = counters.mean_distinct
    say(
        "Distinct experts are not counted: the trace does not say which tokens were decoded "
        "together."
        if distinct is None
        else f"{distinct:.2f} distinct experts per layer and step, over {len(counters.steps)} "
        f"decoding passes of {min(counters.steps)} to {max(counters.steps)} rows."
    )
    for note in notes:
        warn(f"note: {note}")
    say(f"Written to {output_dir}: aggregate and report read it.")


def _config(model: str) -> dict[str, Any]:
    """Return the model's configuration, if it is local or in the hub's cache."""
    path = file_of_model(model, "config.json")
    return {} if path is None else read_json(path)
