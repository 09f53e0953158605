"""Arguments and options of subcommands: what several of them share is declared here, once.

Names behind the first of an option are former ones, see ``former_names.py``. Lists are words joined
by commas, and their option may be repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lm_eval_bh.cli.printing import warn
from lm_eval_bh.errors import ParameterError
from lm_eval_bh.resources import MODELS

if TYPE_CHECKING:
    from lm_eval_bh.analysis.read.loaded import Loaded
    from lm_eval_bh.analysis.read.results_file import Notices

INCOMPLETE = 3  # exit code if files were left out
LARGEST_SEED = 2**32 - 1  # that numpy takes

# Values of options, spelt out so that help and completion know them without loading what takes
# them; tests/cli/test_options.py compares both.
DtypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]
StatisticName = Literal["logit", "weight", "contribution", "benefit", "predicted"]
ScopeName = Literal["layer", "expert", "model"]
SourceName = Literal["all", "unselected"]
KernelName = Literal["gaussian", "epanechnikov", "tophat", "linear"]
LogLevel = Literal["off", "summary", "samples", "full"]
SweepPreset = Literal["quick", "seeds", "full"]
TunePreset = Literal["search", "winner"]
BaselineName = Literal["native", "max_k"]
EngineName = Literal["hf", "vllm", "vllm-plugin"]
TargetName = Literal["hf", "vllm", "llama.cpp"]
TraceFormat = Literal["vllm", "sglang", "megatron", "csv"]
ShippedName = Literal["tiny-olmoe", "tiny-glm", "tasks", "kde_models"]
PanelName = Literal[
    "perplexity",
    "accuracy",
    "experts",
    "heatmap",
    "pareto",
    "constraints",
    "utilization",
    "layers",
    "speed",
]

# The model, and where and how it runs.
_MODEL = f"Name on the hub or folder of the model, {' or '.join(MODELS)}"
Model = Annotated[str, typer.Option("--model", "--pretrained", help=f"{_MODEL}.")]
OptionalModel = Annotated[str | None, typer.Option("--model", "--pretrained", help=f"{_MODEL}.")]
ModelOfPolicy = Annotated[
    str | None,
    typer.Option("--model", "--pretrained", help=f"{_MODEL}; default: the policy's model."),
]
ModelArgs = Annotated[
    str | None,
    typer.Option(help="Further arguments of hf-bh, as lm_eval takes them: alpha=0.4,max_k=8."),
]
Dtype = Annotated[DtypeName, typer.Option(help="Type of the weights; auto: as they are stored.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: cuda, else cpu.")]

# The text that it reads. Only view has texts short enough for the command line.
_TEXT = "UTF-8 text, documents separated by empty lines; default: "
TRAINING_TEXT = f"{_TEXT}WikiText-2's training text."
THREE_TEXTS = (
    f"{_TEXT}WikiText-2. tune calibrates on the first part (training), chooses on the second "
    "(validation) and confirms on the third (test)."
)
Window = Annotated[
    int, typer.Option("--window", "--length", min=1, help="Tokens in a window of text.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows in a batch.")]

# Null models.
NULL = "Null model"
Statistic = Annotated[
    StatisticName, typer.Option(help="Score of an expert to test.", rich_help_panel=NULL)
]
NullScope = Annotated[
    ScopeName,
    typer.Option(
        "--null-scope",
        "--null",
        help="Fit one null distribution per layer, expert or model.",
        rich_help_panel=NULL,
    ),
]
NullFrom = Annotated[
    SourceName,
    typer.Option(
        help="Fit it to all experts, or to those below the native top-k.", rich_help_panel=NULL
    ),
]

# Finished runs.
Folders = Annotated[
    list[Path], typer.Argument(help="Folders that lm_eval --output_path or a sweep wrote to.")
]
OutputDir = Annotated[
    Path | None, typer.Option(help="Folder to write to; default: the first folder.")
]
KeepGroups = Annotated[
    bool,
    typer.Option(
        "--keep-groups", "--force", help="Keep runs that cannot be compared, in separate groups."
    ),
]
Margin = Annotated[float, typer.Option(help="Relative difference of perplexity to ignore.")]
AccuracyMargin = Annotated[float, typer.Option(help="Difference of accuracy to ignore.")]
Confidence = Annotated[float, typer.Option(help="Confidence of the intervals.")]
Resamples = Annotated[int, typer.Option(help="Number of bootstrap resamples.")]
Seed = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of everything drawn at random.")
]

# Files that are there already.
Overwrite = Annotated[
    bool, typer.Option("--overwrite", "--force", help="Replace what is there already.")
]


def joined_arguments(model_args: str | None, **options: str | None) -> str:
    """Return --model-args with the options that name one of them: pretrained, dtype, device.

    Raises
    ------
    ParameterError
        If one is given in both ways.
    """
    text = model_args or ""
    inside = {part.partition("=")[0].strip() for part in text.split(",")}
    given = {name: value for name, value in options.items() if value not in (None, "auto")}
    for name in given:
        if name in inside:
            option = "model" if name == "pretrained" else name
            raise ParameterError(
                f"{name} is given twice: use either --{option} or {name}= in --model-args."
            )
    return ",".join([*(f"{name}={value}" for name, value in given.items()), *filter(None, [text])])


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
