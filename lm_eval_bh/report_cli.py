"""The subcommands ``report`` and ``patterns``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_bh.resources import TINY_OLMOE, tiny_olmoe
from lm_eval_bh.schema import read_json

if TYPE_CHECKING:
    from lm_eval_bh.analysis.results import Loaded

INCOMPLETE = 3  # exit code where files were left out

Folders = Annotated[
    list[Path], typer.Argument(help="Folders that lm_eval or a sweep wrote to; read recursively.")
]
Output = Annotated[
    Path | None, typer.Option(help="Folder to write to; by default the first that is read.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Keep what cannot be compared apart, instead of refusing.")
]


def report(
    folders: Folders,
    output_dir: Output = None,
    margin: Annotated[
        float, typer.Option(help="Relative difference of perplexity that does not matter.")
    ] = 0.01,
    accuracy_margin: Annotated[
        float, typer.Option(help="Absolute difference of accuracy that does not matter.")
    ] = 0.01,
    confidence: Annotated[float, typer.Option(help="Of all intervals.")] = 0.95,
    resamples: Annotated[int, typer.Option(help="Draws of the bootstrap.")] = 9999,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    force: Force = False,
) -> None:
    """Write a report of finished runs, as Markdown and as one self-contained HTML page."""
    from lm_eval_bh.analysis.report import write_report
    from lm_eval_bh.analysis.results import load_experiments

    loaded = load_experiments(folders, force=force)
    paths = write_report(
        loaded,
        _output(folders, output_dir),
        margin=margin,
        accuracy_margin=accuracy_margin,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    _finish(loaded, paths)


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
    from lm_eval_bh.analysis.results import load_experiments

    loaded = load_experiments(folders, force=force)
    path = tokenizer
    if path is None and len(loaded.frame):
        path = find_tokenizer(Path(loaded.frame["file"].iloc[0]))
    if path is None:
        typer.echo(
            "note: no tokenizer was found, so tokens have no class: name one with --tokenizer.",
            err=True,
        )
    paths = write_patterns(loaded, _output(folders, output_dir), tokenizer=path, seed=seed)
    _finish(loaded, paths)


def add_commands(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command()(report)
    app.command()(patterns)


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


def _output(folders: list[Path], output_dir: Path | None) -> Path:
    if output_dir is not None:
        return output_dir
    return folders[0].parent if folders[0].is_file() else folders[0]


def _finish(loaded: Loaded, paths: list[Path]) -> None:
    """Say what was written and what was left out; end with its exit code if anything was."""
    for path in paths:
        typer.echo(f"Written to {path}")
    for _, sentence in loaded.notes:
        typer.echo(f"note: {sentence}", err=True)
    for _, sentence in loaded.problems:
        typer.echo(f"left out: {sentence}", err=True)
    if loaded.problems:
        raise typer.Exit(INCOMPLETE)
