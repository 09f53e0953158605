"""Tells whether an experiment is done, by its summary and the files that it lists.

An experiment writes its summary last, with digests of all its files, of the settings that decided
its results, and of the summary itself. The summary counts only as far as it agrees with these
files.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from lm_eval_bh.errors import DataError
from lm_eval_bh.experiment_names import is_file_name
from lm_eval_bh.harness.sweep.sweep_config import GRID, completed
from lm_eval_bh.schema import ExperimentSummary, read_json, read_run_info, read_summary

CHUNK = 2**20  # bytes read at a time


def summary_file(folder: Path, name: str) -> Path:
    """Return the path of an experiment's summary in a sweep's folder."""
    return folder / "logs" / f"{name}.json"


def sealed(
    folder: Path, summary: ExperimentSummary, files: Iterable[Path], settings: Mapping[str, Any]
) -> ExperimentSummary:
    """Return a summary with digests of its files, its settings and itself."""
    digests = {file.relative_to(folder).as_posix(): _digest(file) for file in sorted(files)}
    content = cast(ExperimentSummary, summary | {"settings": dict(settings), "files": digests})
    content["digest"] = _seal(content)
    return content


def why_not_done(
    folder: Path, name: str, settings: Mapping[str, Any], earlier: Mapping[str, Any] | None
) -> str | None:
    """Return why an experiment with a summary has to run again, or None if it is done.

    Parameters
    ----------
    folder : Path
        Folder of the sweep.
    name : str
        Name of the experiment.
    settings : mapping
        Settings that its results must have.
    earlier : mapping or None
        Settings of results whose summary lacks them, as in the first release.
    """
    file = summary_file(folder, name)
    try:
        summary = read_summary(file)
    except DataError as error:
        return str(error).partition(";")[0]
    if summary["config"] != name:
        return f"its summary belongs to {summary['config']}"
    if "digest" in summary and summary["digest"] != _seal(summary):
        return "its summary was changed"
    made_with = summary.get("settings", earlier)
    if made_with is None:
        return "the settings of its run are unknown"
    made_with = {k: v for k, v in completed(made_with).items() if k not in GRID}
    for setting in sorted(made_with.keys() | settings.keys()):
        if made_with.get(setting) != settings.get(setting):
            return f"it ran with a different {setting}"
    if "files" not in summary:
        return _why_earlier(folder / "runs" / name, summary["run_id"])
    for path, digest in summary["files"].items():
        if not (all(map(is_file_name, path.split("/"))) and (folder / path).is_file()):
            return f"{path} is missing"
        if _digest(folder / path) != digest:
            return f"{path} was changed"
    return None


def _why_earlier(run: Path, run_id: str) -> str | None:
    """Return why results of the first release, which has no digests, do not count."""
    for file in sorted(run.glob("*/results_*.json")):
        try:
            info = read_run_info({"config": {}} | read_json(file), str(file))
        except (DataError, AttributeError) as error:
            return str(error).partition(";")[0]
        if info is not None and info["run_id"] == run_id:
            return None
    return "its results are missing"


def _seal(summary: Mapping[str, Any]) -> str:
    content = {name: value for name, value in summary.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    status = file.stat()
    return _sha256(file, status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """Return the SHA-256 of a file; cached by size and time of change."""
    found = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
