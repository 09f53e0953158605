"""``lm-eval-bh patterns``: what routing logs show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lm_eval_bh.cli.options import (
    LARGEST_SEED,
    Folders,
    Force,
    OutputDir,
    finish,
    home_of,
    stop_without_runs,
)
from lm_eval_bh.cli.printing import say_written, warn
from lm_eval_bh.files import check_output
from lm_eval_bh.resources import model_path
from lm_eval_bh.schema import read_json


def patterns(
    folders: Folders,
    output_dir: OutputDir = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json; default: the model's, if local or in the hub's cache."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the clusters.")] = 0,
    force: Force = False,
) -> None:
    """Analyze routing logs: experts and difficulty, specialisation, clusters of documents.

    Exit code 3: files were broken or incomplete; they are listed, and the others analyzed.
    """
    from lm_eval_bh.analysis.patterns import write_patterns
    from lm_eval_bh.analysis.table.experiments import load_experiments

    folder = output_dir or home_of(folders[0])
    check_output(folder, "--output-dir", folder=True)
    loaded = load_experiments(folders, force=force)
    stop_without_runs(loaded)
    path = tokenizer or find_tokenizer(Path(loaded.frame["file"].iloc[0]))
    say_written(write_patterns(loaded, folder, tokenizer=path, seed=seed))
    if path is None:
        warn("note: no tokenizer was found, so tokens have no class; name one with --tokenizer.")
    finish(loaded.problems, loaded.notes)


def find_tokenizer(results: Path) -> Path | None:
    """Return the tokenizer.json of a run's model, if it is local or in the hub's cache."""
    arguments = read_json(results)["config"].get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.partition("=")[::2] for part in arguments.split(","))
    name = arguments.get("tokenizer") or arguments.get("pretrained")
    return name and file_of_model(name, "tokenizer.json", arguments.get("revision"))


def file_of_model(model: str, file: str, revision: str | None = None) -> Path | None:
    """Return a file of a model, if it is local or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(model_path(model))
    if (folder / file).is_file():
        return folder / file
    if folder.is_absolute():
        return None
    try:
        cached = try_to_load_from_cache(model, file, revision=revision)
    except HFValidationError:  # a folder that is gone is no name of the hub
        return None
    return Path(cached) if isinstance(cached, str) else None
