"""Arguments and options that several subcommands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_bh.cli.printing import warn
from lm_eval_bh.errors import ParameterError
from lm_eval_bh.resources import MODELS

if TYPE_CHECKING:
    from lm_eval_bh.analysis.read.loaded import Loaded
    from lm_eval_bh.analysis.read.results_file import Notices

INCOMPLETE = 3  # exit code if files were left out
LARGEST_SEED = 2**32 - 1  # that numpy takes

# Of a model that is run: calibrate and analyze.
Pretrained = Annotated[
    str, typer.Option(help=f"Hub name or folder of the model, {' or '.join(MODELS)}.")
]
Length = Annotated[int, typer.Option(min=1, help="Window length in tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows in a batch.")]
Statistic = Annotated[str, typer.Option(help="logit, weight, contribution, benefit or predicted.")]
NullScope = Annotated[
    str,
    typer.Option(
        "--null-scope", "--null", help="What one null distribution is of: layer, expert or model."
    ),
]
NullFrom = Annotated[
    str, typer.Option(help="all experts, or those below the native top-k: unselected.")
]
Dtype = Annotated[str, typer.Option(help="auto (the model's own), float32, bfloat16, float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: cuda, else cpu.")]

# Of finished runs: aggregate, plot, report and patterns.
Folders = Annotated[
    list[Path], typer.Argument(help="Folders that lm_eval --output_path or a sweep wrote to.")
]
OutputDir = Annotated[
    Path | None, typer.Option(help="Folder to write to; default: the first folder.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Keep runs that cannot be compared, in separate groups.")
]
Margin = Annotated[float, typer.Option(help="Relative difference of perplexity to ignore.")]
AccuracyMargin = Annotated[float, typer.Option(help="Difference of accuracy to ignore.")]
Confidence = Annotated[float, typer.Option(help="Confidence of the intervals.")]
Resamples = Annotated[int, typer.Option(help="Bootstrap resamples.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the bootstrap.")]


def home_of(source: Path) -> Path:
    """Return the folder of a source: itself, or where the file lies."""
    return source if source.is_dir() else source.parent


def share_of(text: str, option: str, *, or_none_at_all: bool = False) -> float:
    """Return a share that an option is given as ``1%`` or ``0.01``.

    Raises
    ------
    ParameterError
        If it is neither, or not between 0 and 1; 0 itself has to be allowed.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not (0 < value < 1 or (or_none_at_all and value == 0)):
        raise ParameterError(f"{option} must be a share like 1% or 0.01: found {text!r}.")
    return value


def finish(problems: Notices, notes: Notices) -> None:
    """List what a reader should know; end with exit code 3 if files were left out."""
    for _, sentence in notes:
        warn(f"note: {sentence}")
    for _, sentence in problems:
        warn(f"left out: {sentence}")
    if problems:
        raise typer.Exit(INCOMPLETE)


def stop_without_runs(loaded: Loaded) -> None:
    """End the command, with nothing written, if none of the files could be read."""
    if not len(loaded.frame):
        for _, sentence in loaded.problems:
            warn(f"left out: {sentence}")
        warn("No run could be read, so nothing was written and older files stay as they were.")
        raise typer.Exit(INCOMPLETE)
