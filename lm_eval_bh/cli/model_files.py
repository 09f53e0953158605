"""Files of a model that is local or in the hub's cache, found without loading or downloading it."""

from __future__ import annotations

from pathlib import Path

from lm_eval_bh.resources import model_path
from lm_eval_bh.schema import read_json


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
