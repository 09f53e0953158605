"""``lm-eval-bh aggregate``: finished runs as one table, compared and drawn."""

from __future__ import annotations

from typing import Annotated

import typer

from lm_eval_bh.cli.options import (
    AccuracyMargin,
    BaselineName,
    Confidence,
    Folders,
    KeepGroups,
    Margin,
    OutputDir,
    Resamples,
    Seed,
    finish,
    home_of,
    stop_without_runs,
)
from lm_eval_bh.cli.printing import say_written, show
from lm_eval_bh.cli.report_figure import FIGURE, draw_groups
from lm_eval_bh.files import check_output


def aggregate(
    folders: Folders,
    output_dir: OutputDir = None,
    keep_groups: KeepGroups = False,
    baseline: Annotated[
        BaselineName,
        typer.Option(help="Compare with the model's own top-k (native), or with max_k."),
    ] = "native",
    margin: Margin = 0.01,
    accuracy_margin: AccuracyMargin = 0.01,
    confidence: Confidence = 0.95,
    resamples: Resamples = 9999,
    seed: Seed = 0,
    context_length: Annotated[
        int | None,
        typer.Option(
            help="Positions that a token attends to, for FLOPs; default: the run's longest window."
        ),
    ] = None,
    figure: Annotated[bool, typer.Option(help="Draw the nine panels.")] = True,
) -> None:
    """Join finished runs into one table, compare them, and draw them.

    Exit code 3: files were broken or incomplete; the command lists them and aggregates the others.
    If it can read none, it writes nothing.
    """
    from lm_eval_bh.analysis.compare.paired import compare
    from lm_eval_bh.analysis.show.overview import overview
    from lm_eval_bh.analysis.table.experiments import load_experiments
    from lm_eval_bh.analysis.table.table_files import replacing_tables

    folder = output_dir or home_of(folders[0])
    check_output(folder, "--output-dir", folder=True)
    loaded = load_experiments(folders, force=keep_groups, context_length=context_length)
    stop_without_runs(loaded)
    compared = compare(
        loaded,
        baseline=baseline,
        margin=margin,
        accuracy_margin=accuracy_margin,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    with replacing_tables(loaded, compared, folder) as written:
        if figure:
            path = folder / "visualizations" / f"{FIGURE}.png"
            written += draw_groups(loaded.frame, loaded.layers, None, path)
    for table in overview(loaded.frame, compared, 1 - confidence):
        show(table)
    say_written(written)
    finish(loaded.problems, loaded.notes)
