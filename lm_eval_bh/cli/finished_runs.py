"""The commands that read finished runs: aggregate, plot, report and patterns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.resources import TINY_OLMOE, tiny_olmoe
from lm_eval_bh.schema import read_json

if TYPE_CHECKING:
    import pandas as pd

    from lm_eval_bh.analysis.read.results_file import Notices

INCOMPLETE = 3  # exit code where files were left out
FIGURE = "bh_comprehensive_comparison"

Folders = Annotated[
    list[Path], typer.Argument(help="Folders that lm_eval --output_path or a sweep wrote to.")
]
Output = Annotated[Path | None, typer.Option(help="Where to write; default: the first folder.")]
Force = Annotated[
    bool, typer.Option("--force", help="Keep runs that cannot be compared apart, in groups.")
]
Margin = Annotated[
    float, typer.Option(help="Relative difference of perplexity that does not matter.")
]
AccuracyMargin = Annotated[float, typer.Option(help="Difference of accuracy that does not matter.")]
Confidence = Annotated[float, typer.Option(help="Of the intervals.")]
Resamples = Annotated[int, typer.Option(help="Of the bootstrap.")]
Seed = Annotated[int, typer.Option(help="Of the bootstrap.")]


def aggregate(
    folders: Folders,
    output_dir: Output = None,
    force: Force = False,
    baseline: Annotated[
        str, typer.Option(help="Compare with native (the model's own top-k) or max_k.")
    ] = "native",
    margin: Margin = 0.01,
    accuracy_margin: AccuracyMargin = 0.01,
    confidence: Confidence = 0.95,
    resamples: Resamples = 9999,
    seed: Seed = 0,
    context_length: Annotated[
        int | None, typer.Option(help="Positions a token attends to, for FLOPs; default: longest.")
    ] = None,
    figure: Annotated[bool, typer.Option(help="Draw the nine panels.")] = True,
) -> None:
    """Join finished runs into one table, compare them, draw them.

    Exit code 3: files were broken or incomplete; they are listed, and the others aggregated.
    """
    from lm_eval_bh.analysis.compare.paired import compare
    from lm_eval_bh.analysis.show.overview import overview
    from lm_eval_bh.analysis.table.experiments import load_experiments
    from lm_eval_bh.analysis.table.table_files import (
        COMPARISONS,
        LAYERS,
        write_records,
        write_tables,
    )

    loaded = load_experiments(folders, force=force, context_length=context_length)
    compared = compare(
        loaded,
        baseline=baseline,
        margin=margin,
        accuracy_margin=accuracy_margin,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    folder = output_dir or _home(folders[0])
    written = [
        *write_tables(loaded.frame, folder),
        *write_records(loaded.layers, folder, LAYERS),
        *write_records(compared, folder, COMPARISONS),
    ]
    if figure and len(loaded.frame):
        path = folder / "visualizations" / f"{FIGURE}.png"
        written += _draw(loaded.frame, loaded.layers, None, path)
    for table in overview(loaded.frame, compared, 1 - confidence):
        Console().print(table)
    _say_written(written)
    _tell(loaded.problems, loaded.notes)


def plot(
    sources: Annotated[
        list[Path], typer.Argument(help="Folders of runs, or one bh_routing_results.csv.")
    ],
    panel: Annotated[str | None, typer.Option(help="One panel by its name; default: all.")] = None,
    output: Annotated[Path | None, typer.Option(help="File ending in .png, .pdf or .svg.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Draw this task only; may be given several times.")
    ] = None,
) -> None:
    """Draw all nine panels, or one; of runs that cannot be compared, a figure each group.

    Exit code 3: files were broken or incomplete; they are listed, and the others drawn.
    """
    frame, layers, problems, notes = _read(sources)
    if task and (unknown := sorted(set(task) - set(frame["task"]))):
        known = ", ".join(sorted(set(frame["task"]))) or "none"
        raise ParameterError(f"No run did the task {unknown[0]}: choose among {known}.")
    if task:
        frame = frame[frame["task"].isin(task)]
    path = output or _home(sources[0]) / "visualizations" / f"{panel or FIGURE}.png"
    _say_written(_draw(frame, layers, panel, path))
    _tell(problems, notes)


def report(
    folders: Folders,
    output_dir: Output = None,
    margin: Margin = 0.01,
    accuracy_margin: AccuracyMargin = 0.01,
    confidence: Confidence = 0.95,
    resamples: Resamples = 9999,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Write a report of finished runs, as Markdown and as one self-contained HTML page."""
    from lm_eval_bh.analysis.show.report_page import write_report
    from lm_eval_bh.analysis.table.experiments import load_experiments

    loaded = load_experiments(folders, force=force)
    paths = write_report(
        loaded,
        output_dir or _home(folders[0]),
        margin=margin,
        accuracy_margin=accuracy_margin,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    _say_written(paths)
    _tell(loaded.problems, loaded.notes)


def patterns(
    folders: Folders,
    output_dir: Output = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json, where the model's own is neither local nor cached."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the clusters.")] = 0,
    force: Force = False,
) -> None:
    """Look into routing logs: experts and difficulty, specialisation, clusters of documents."""
    from lm_eval_bh.analysis.patterns import write_patterns
    from lm_eval_bh.analysis.table.experiments import load_experiments

    loaded = load_experiments(folders, force=force)
    path = tokenizer
    if path is None and len(loaded.frame):
        path = find_tokenizer(Path(loaded.frame["file"].iloc[0]))
    if path is None:
        typer.echo(
            "note: no tokenizer was found, so tokens have no class: name one with --tokenizer.",
            err=True,
        )
    paths = write_patterns(loaded, output_dir or _home(folders[0]), tokenizer=path, seed=seed)
    _say_written(paths)
    _tell(loaded.problems, loaded.notes)


def _read(sources: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame | None, Notices, Notices]:
    """Return the experiments and layers of folders, or of a table that was written before."""
    import pandas as pd

    from lm_eval_bh.analysis.table.experiments import load_experiments
    from lm_eval_bh.analysis.table.table_files import LAYERS

    tables = [source for source in sources if source.suffix == ".csv"]
    if not tables:
        loaded = load_experiments(sources, force=True)
        return loaded.frame, loaded.layers, loaded.problems, loaded.notes
    if len(sources) > 1:
        raise ParameterError(
            f"{tables[0]} is a table by itself: give one table, or folders of runs."
        )
    beside = tables[0].with_name(f"{LAYERS}.csv")
    return pd.read_csv(tables[0]), pd.read_csv(beside) if beside.is_file() else None, [], []


def _draw(
    frame: pd.DataFrame, layers: pd.DataFrame | None, panel: str | None, path: Path
) -> list[Path]:
    """Draw every group of a table into a file of its own; return the files."""
    from lm_eval_bh.analysis.show.plots import (
        create_comprehensive_visualization,
        create_single_panel,
    )

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


def _home(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _say_written(paths: list[Path]) -> None:
    for path in paths:
        typer.echo(f"Written to {path}")


def _tell(problems: Notices, notes: Notices) -> None:
    """List what a reader should know; end with its exit code if files were left out."""
    for _, sentence in notes:
        typer.echo(f"note: {sentence}", err=True)
    for _, sentence in problems:
        typer.echo(f"left out: {sentence}", err=True)
    if problems:
        raise typer.Exit(INCOMPLETE)


def find_tokenizer(results: Path) -> Path | None:
    """Return the tokenizer.json of a run's model, if it is local or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    arguments = read_json(results)["config"].get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(","))
    name = arguments.get("tokenizer") or arguments.get("pretrained")
    if name is None:
        return None
    folder = tiny_olmoe() if name == TINY_OLMOE else Path(name)
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    if folder.is_absolute():
        return None
    cached = try_to_load_from_cache(name, "tokenizer.json", revision=arguments.get("revision"))
    return Path(cached) if isinstance(cached, str) else None
