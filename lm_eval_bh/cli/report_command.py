"""``lm-eval-bh report``: finished runs as one page, as a figure, or their logs as patterns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_bh.cli.options import (
    AccuracyMargin,
    Confidence,
    KeepGroups,
    Margin,
    OutputDir,
    PanelName,
    Resamples,
    Seed,
    finish,
    home_of,
    stop_without_runs,
)
from lm_eval_bh.cli.printing import say_written
from lm_eval_bh.cli.report_figure import report_figure
from lm_eval_bh.cli.report_patterns import report_patterns
from lm_eval_bh.cli.word_lists import words_or_none
from lm_eval_bh.files import check_output

if TYPE_CHECKING:
    from lm_eval_bh.analysis.read.results_file import Notices

OF_FIGURE, OF_PATTERNS = "With --figure", "With --patterns"


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Folders that lm_eval --output_path or a sweep wrote to; with --figure also one "
            "bh_routing_results.csv."
        ),
    ],
    output_dir: OutputDir = None,
    margin: Margin = 0.01,
    accuracy_margin: AccuracyMargin = 0.01,
    confidence: Confidence = 0.95,
    resamples: Resamples = 9999,
    seed: Seed = 0,
    keep_groups: KeepGroups = False,
    figure: Annotated[
        bool, typer.Option("--figure", help="Draw the nine panels instead of writing the page.")
    ] = False,
    panel: Annotated[
        PanelName | None,
        typer.Option(help="Draw one panel; default: all nine.", rich_help_panel=OF_FIGURE),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A .png, .pdf or .svg file.", rich_help_panel=OF_FIGURE)
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "--task",
            help="Draw only these tasks, joined by commas; default: all.",
            rich_help_panel=OF_FIGURE,
        ),
    ] = None,
    patterns: Annotated[
        bool,
        typer.Option(
            "--patterns",
            help="Analyze the routing logs instead of writing the page: experts and difficulty, "
            "specialisation, clusters of documents.",
        ),
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A tokenizer.json; default: that of the runs' model, if it is on this machine.",
            rich_help_panel=OF_PATTERNS,
        ),
    ] = None,
) -> None:
    """Write a report of finished runs: a Markdown and HTML page, a figure, or patterns of experts.

    --panel, --output and --tasks imply --figure, and --tokenizer implies --patterns.

    Exit code 3: files were broken or incomplete; the command lists them and reports the others.
    """
    figure = bool(figure or panel or output or tasks)
    patterns = bool(patterns or tokenizer)
    problems: Notices = []
    notes: Notices = []
    if figure:
        problems, notes = report_figure(sources, panel, output, output_dir, words_or_none(tasks))
    if patterns or not figure:
        from lm_eval_bh.analysis.show.report_page import write_report
        from lm_eval_bh.analysis.table.experiments import load_experiments

        folder = output_dir or home_of(sources[0])
        check_output(folder, "--output-dir", folder=True)
        loaded = load_experiments(sources, force=keep_groups)
        stop_without_runs(loaded)
        problems, notes = loaded.problems, loaded.notes
        if patterns:
            report_patterns(loaded, folder, tokenizer, seed)
        else:
            paths = write_report(
                loaded,
                folder,
                margin=margin,
                accuracy_margin=accuracy_margin,
                confidence=confidence,
                resamples=resamples,
                seed=seed,
            )
            say_written(paths)
    finish(problems, notes)
