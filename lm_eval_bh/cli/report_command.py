"""``lm-eval-bh report``: finished runs as one page."""

from __future__ import annotations

from lm_eval_bh.cli.options import (
    AccuracyMargin,
    Confidence,
    Folders,
    Force,
    Margin,
    OutputDir,
    Resamples,
    Seed,
    finish,
    home_of,
    stop_without_runs,
)
from lm_eval_bh.cli.printing import say_written
from lm_eval_bh.files import check_output


def report(
    folders: Folders,
    output_dir: OutputDir = None,
    margin: Margin = 0.01,
    accuracy_margin: AccuracyMargin = 0.01,
    confidence: Confidence = 0.95,
    resamples: Resamples = 9999,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Write a report of finished runs, as Markdown and as one self-contained HTML page.

    Exit code 3: files were broken or incomplete; they are listed, and the others reported.
    """
    from lm_eval_bh.analysis.show.report_page import write_report
    from lm_eval_bh.analysis.table.experiments import load_experiments

    folder = output_dir or home_of(folders[0])
    check_output(folder, "--output-dir", folder=True)
    loaded = load_experiments(folders, force=force)
    stop_without_runs(loaded)
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
    finish(loaded.problems, loaded.notes)
