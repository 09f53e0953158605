"""Reads the YAML file of a sweep: plain values of the right types, in bounded time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, cast

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.validation import mismatch

LARGEST = 2**16  # bytes; real settings need a few hundred

_Plain = float | bool | str | None


class SettingsFile(TypedDict, total=False):
    """The keys of the file, see :class:`~lm_eval_bh.harness.sweep.sweep_config.SweepConfig`."""

    preset: str | None
    pretrained: str
    tasks: list[str] | str | None
    baselines: list[int] | int | None
    alphas: list[float] | float | None
    max_k: list[int] | int | None
    rules: list[str] | str | None
    limit: int | None
    batch_size: int | str
    seed: int | None
    log_routing: str
    log_samples: int | None
    model_args: dict[str, _Plain | list[_Plain] | dict[str, _Plain]]


def read_settings(file: Path) -> SettingsFile:
    """Read the settings of a sweep.

    Raises
    ------
    ParameterError
        If the file cannot be read, is too large or refers to its own parts, or if a key is unknown
        or its value of another type.
    """
    import yaml

    try:
        if file.exists() and not file.is_file():
            raise OSError("it is not a file")
        if file.stat().st_size > LARGEST:
            raise OSError(f"it has more than {LARGEST} bytes")
        text = file.read_text(encoding="utf-8")
        # Ten lines with nested aliases can expand to billions of values.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has an alias such as *name: write the value out")
        content = yaml.safe_load(text)
    except RecursionError as error:
        raise ParameterError(f"The settings {file} are nested too deeply: flatten them.") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ParameterError(
            f"The settings {file} could not be read ({why}): fix or remove the file."
        ) from error
    known = list(SettingsFile.__annotations__)
    if not isinstance(content, dict):
        raise ParameterError(f"The settings {file} must hold keys with values, such as limit: 50.")
    for name in content:
        if name not in known:
            raise ParameterError(
                f"The settings {file} name {name!r:.80}, which is unknown: "
                f"choose among {', '.join(known)}{did_you_mean(str(name), known)}."
            )
    if reason := mismatch(content, SettingsFile, "a value"):
        wrong = reason.removeprefix("a value.")
        raise ParameterError(f"The settings {file} are wrong: {wrong}; mend the file.")
    return cast(SettingsFile, content)


def plain_value(value: Any) -> bool:
    """Return whether a model argument can be written to a file unchanged."""
    return mismatch(value, _Plain | list[_Plain] | dict[str, _Plain], "") is None
