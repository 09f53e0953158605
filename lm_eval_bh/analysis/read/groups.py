"""Groups runs that differ only in routing, so that they can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_bh.analysis.read.documents import CONTENT, different
from lm_eval_bh.analysis.read.results_file import Run

SHOWN_DIFFERENCES = 5  # conflicts shown in the error

# (run id, task) -> logged documents, or None.
Documents = Callable[[str, str], "pd.DataFrame | None"]


@dataclass(frozen=True)
class Group:
    """Files that can be compared with each other.

    Attributes
    ----------
    number : int
        From 1; the column ``group``.
    files : tuple of Path
        Its files.
    settings : dict
        Settings of its first file: limit, versions, hashes, model, few-shot settings.
    """

    number: int
    files: tuple[Path, ...]
    settings: dict[str, Any]


def group_runs(runs: Sequence[Run], documents: Documents) -> list[Group]:
    """Put each file into the first group without a conflict."""
    members: list[list[Run]] = []
    for run in runs:
        for group in members:
            if not any(_conflicts(other, run, documents) for other in group):
                group.append(run)
                break
        else:
            members.append([run])
    return [
        Group(
            number,
            tuple(run.file for run in group),
            group[0].settings() | {t: group[0].task_settings(t) for t in group[0].tasks},
        )
        for number, group in enumerate(members, start=1)
    ]


def _conflicts(first: Run, second: Run, documents: Documents) -> list[str]:
    """Return how two files conflict; a setting missing in one of them is no conflict."""
    found = _differing(first.settings(), second.settings())
    if first.commit is not None and second.commit is not None:
        found.pop("revision", None)  # a branch and a tag may be the same commit
    for task in sorted(set(first.tasks) & set(second.tasks)):
        settings = [run.task_settings(task) for run in (first, second)]
        if None in (settings[0]["hash"], settings[1]["hash"]):  # else hashes tell documents apart
            for run, of_task in zip((first, second), settings, strict=True):
                of_task["documents"] = _documents_of(run, task, documents)
        differing = _differing(*settings)
        if "hash" in differing and _same_documents(first, second, task, documents):
            del differing["hash"]
        if "limit" in differing:
            differing.pop("number of documents", None)  # redundant
        found |= {f"{name} of {task}": values for name, values in differing.items()}
    return [f"{name} {one} and {other}" for name, (one, other) in found.items()]


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (value, second[name])
        for name, value in first.items()
        if value is not None and second[name] is not None and value != second[name]
    }


def _documents_of(run: Run, task: str, documents: Documents) -> str | None:
    """Return the digest of a run's documents, from its samples if the results lack it."""
    known = run.documents_digest(task)
    table = None if known else documents(run.run_id, task)
    if table is None or table["hash"].isna().any():
        return known
    hashes = sorted(hashes.split("-")[0] for hashes in table["hash"])
    if hashes[-1].startswith(CONTENT) or hashes[0].startswith(CONTENT):
        return None  # from an earlier release: cannot match lm-eval's hashes
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _same_documents(first: Run, second: Run, task: str, documents: Documents) -> bool:
    """Return whether two runs saw the same documents in different orders, as processes do.

    lm-eval's hash of a task depends on the order in which processes gather documents.
    """
    one, other = (documents(run.run_id, task) for run in (first, second))
    if one is None or other is None or not one.index.equals(other.index):
        return False
    return different(one["hash"], other["hash"]) is None


def difference(runs: Sequence[Run], groups: Sequence[Group], documents: Documents) -> str:
    """Return an error message that names the conflicting files."""
    of_file = {run.file: run for run in runs}
    reference = [of_file[file] for file in groups[0].files]
    lines = []
    for group in groups[1:]:
        for file in group.files:
            for other in reference:
                if conflicts := _conflicts(other, of_file[file], documents):
                    lines.append(f"{other.file} and {file} have " + ", ".join(conflicts))
                    break
    if len(lines) > SHOWN_DIFFERENCES:
        lines[SHOWN_DIFFERENCES:] = [f"and {len(lines) - SHOWN_DIFFERENCES} more files differ too"]
    return (
        "These results cannot be compared: " + "; ".join(lines) + ". "
        "Evaluate them with equal settings, or keep them apart with --keep-groups."
    )
