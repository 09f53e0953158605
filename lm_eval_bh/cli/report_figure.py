"""``lm-eval-bh report --figure``: draws finished runs, or a table that was written before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_bh.cli.options import home_of, stop_without_runs
from lm_eval_bh.cli.printing import say_written, warn
from lm_eval_bh.errors import DataError, ParameterError, did_you_mean
from lm_eval_bh.files import check_output, figure_format

if TYPE_CHECKING:
    import pandas as pd

    from lm_eval_bh.analysis.read.results_file import Notices

FIGURE = "bh_comprehensive_comparison"


def report_figure(
    sources: list[Path],
    panel: str | None,
    output: Path | None,
    folder: Path | None,
    tasks: list[str] | None,
) -> tuple[Notices, Notices]:
    """Draw all nine panels, or one; return what was left out, and what a reader should know.

    Runs that cannot be compared get one figure per group.
    """
    home = folder or home_of(sources[0])
    path = output or home / "visualizations" / f"{panel or FIGURE}.png"
    figure_format(path)
    check_output(path, "--output")
    frame, layers, problems, notes = _read(sources)
    if tasks and (unknown := sorted(set(tasks) - set(frame["task"]))):
        known = sorted(map(str, set(frame["task"])))
        raise ParameterError(
            f"No run has the task {unknown[0]!r}: use one of {', '.join(known)}"
            f"{did_you_mean(unknown[0], known)}."
        )
    if tasks:
        frame = frame[frame["task"].isin(tasks)]
    say_written(draw_groups(frame, layers, panel, path))
    return problems, notes


def draw_groups(
    frame: pd.DataFrame, layers: pd.DataFrame | None, panel: str | None, path: Path
) -> list[Path]:
    """Draw every group of a table into a file of its own; return the files.

    A note says how many numbers are infinite, which figures leave out.
    """
    from lm_eval_bh.analysis.show.plots import (
        create_comprehensive_visualization,
        create_single_panel,
    )

    if infinite := int(frame.select_dtypes("number").abs().eq(float("inf")).sum().sum()):
        warn(f"note: {infinite} numbers of the table are infinite and are not drawn.")
    paths = []
    groups = sorted(frame["group"].unique()) if "group" in frame else [None]
    for group in groups:
        one = frame if len(groups) == 1 else frame[frame["group"] == group]
        name = path if len(groups) == 1 else path.with_stem(f"{path.stem}_group{group}")
        if panel is None:
            create_comprehensive_visualization(one, name, layers=layers)
        else:
            create_single_panel(one, panel, name, layers=layers)
        paths.append(name)
    return paths


def _read(sources: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame | None, Notices, Notices]:
    """Return the experiments and layers of folders, or of a table that was written before."""
    from lm_eval_bh.analysis.table.experiments import load_experiments
    from lm_eval_bh.analysis.table.table_files import LAYERS, read_table

    tables = [source for source in sources if source.suffix == ".csv"]
    if not tables:
        loaded = load_experiments(sources, force=True)
        stop_without_runs(loaded)
        return loaded.frame, loaded.layers, loaded.problems, loaded.notes
    if len(sources) > 1:
        raise ParameterError(
            f"{tables[0]} is a table by itself: give one table, or folders of runs."
        )
    beside = tables[0].with_name(f"{LAYERS}.csv")
    frame = read_table(tables[0])
    if not len(frame) or "task" not in frame:
        raise DataError(f"{tables[0]} holds no experiments: use a bh_routing_results.csv.")
    return frame, read_table(beside) if beside.is_file() else None, [], []
