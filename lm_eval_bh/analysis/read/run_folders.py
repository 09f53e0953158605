"""Finds the results files in and below folders, and reads the complete ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lm_eval_bh.analysis.read.results_file import DATED, Notices, Run
from lm_eval_bh.errors import DataError
from lm_eval_bh.experiment_names import SWEEP_SETTINGS
from lm_eval_bh.schema import (
    INTERNAL_ROUTING,
    MANIFEST,
    SPEED,
    TOKENS,
    SpeedFile,
    read_speed,
)

UNDATED = "results.json"  # from lm-eval before its names had the time

# Errors of computing with damaged numbers of the right types.
_MALFORMED = (
    ArithmeticError,
    AttributeError,
    IndexError,
    KeyError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass
class Found:
    """The files in and below some folders.

    Attributes
    ----------
    results : list of Path
        Results files, in the order of their paths.
    logs : dict of str to Path
        Run id -> folder of its routing log, finished or not.
    sweeps : list of Path
        Folders of sweeps.
    speeds : list of Path
        Files of speed phases.
    problems, notes : list of (Path, str)
        Folders that could not be read, and files skipped on purpose.
    """

    results: list[Path] = field(default_factory=list)
    logs: dict[str, Path] = field(default_factory=dict)
    sweeps: list[Path] = field(default_factory=list)
    speeds: list[Path] = field(default_factory=list)
    problems: Notices = field(default_factory=list)
    notes: Notices = field(default_factory=list)


def find_files(folders: Sequence[Path]) -> Found:
    """Find the results files and routing logs in and below folders, through links too."""
    found, results = Found(), set()
    unfinished: dict[str, Path] = {}

    def unreadable(error: OSError) -> None:
        sentence = f"{error.filename} could not be read: {error.strerror}; make it readable."
        found.problems.append((Path(error.filename), sentence))

    for folder in folders:
        if folder.is_file() and is_speed(folder.name):
            found.speeds.append(folder)
        elif folder.is_file():
            results.add(folder)
        elif not folder.is_dir():
            raise DataError(f"There is no folder {folder}: use one that lm_eval wrote to.")
    for parent, children, names in _walk([f for f in folders if f.is_dir()], unreadable):
        if MANIFEST in names:
            found.logs.setdefault(parent.name, parent)
        elif TOKENS in children or any(name.endswith(INTERNAL_ROUTING) for name in names):
            unfinished.setdefault(parent.name, parent)
        if SWEEP_SETTINGS in names:
            found.sweeps.append(parent)
        found.speeds += [parent / name for name in names if is_speed(name)]
        for name in names:
            if name.endswith(".json") and (name.startswith("results_") or DATED.search(name)):
                results.add(parent / name)
            elif name == UNDATED:
                sentence = (
                    f"{parent / name} is not read: it has no time in its name, as old releases of "
                    "lm-eval wrote it; give the file itself to read it."
                )
                found.notes.append((parent / name, sentence))
    found.results = sorted(results, key=lambda file: file.as_posix())
    found.logs = unfinished | found.logs
    return found


def is_speed(name: str) -> bool:
    """Return whether a file name is that of a speed phase."""
    return name.startswith(SPEED) and name.endswith(".json")


def read_speeds(files: Iterable[Path], problems: Notices) -> list[SpeedFile]:
    """Return the files of speed phases; unreadable ones are added to the problems."""
    found = []
    for file in files:
        try:
            found.append(read_speed(file))
        except DataError as error:
            problems.append((file, str(error)))
    return found


def _walk(
    folders: Sequence[Path], unreadable: Callable[[OSError], None]
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield (folder, its folders, its files) of a tree, every real folder once.

    Links to folders are followed last, so that real folders keep their own paths.
    """
    seen, waiting = set(), list(folders)
    while waiting:
        links = []
        for start in waiting:
            for path, children, names in os.walk(start, onerror=unreadable):
                status = os.stat(path)
                if (status.st_dev, status.st_ino) in seen:
                    children.clear()  # a link leads back here
                    continue
                seen.add((status.st_dev, status.st_ino))
                children.sort()
                parent = Path(path)
                links += [parent / child for child in children if (parent / child).is_symlink()]
                yield parent, children, sorted(names)
        waiting = links


def read_runs(
    files: Iterable[Path],
    logs: Mapping[str, Path],
    check: Callable[[Run], object],
    problems: Notices,
    notes: Notices,
    *,
    routing: bool = True,
) -> Iterator[Run]:
    """Yield the complete runs.

    Parameters
    ----------
    files, logs
        From :func:`find_files`.
    check : callable
        Raises errors of later reading if something in the run is missing or wrong.
    problems, notes : list of (Path, str)
        Filled with the reasons for omitted files, and remarks on others.
    routing : bool
        Whether routing logs are needed.
    """
    seen: dict[str, Run] = {}
    for file in files:
        try:
            run = Run.read(file)
            check(run)
        except (DataError, *_MALFORMED) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            sentence = f"{file} is damaged ({reason}): run the evaluation again."
            problems.append((file, str(error) if isinstance(error, DataError) else sentence))
            continue
        if run.run_id in seen:
            first = seen[run.run_id]
            if first.fingerprint == run.fingerprint:
                notes.append((file, f"{file} is a copy of {first.file}: it is read once."))
            else:
                sentence = (
                    f"{file} has the run id {run.run_id} of {first.file}, so their routing logs "
                    "cannot be told apart: run the evaluation again."
                )
                problems.append((file, sentence))
            continue
        seen[run.run_id] = run
        if not routing:
            yield run
            continue
        if problem := run.find_log(logs):
            problems.append((file, str(problem)))
        if run.info and run.info["log_dir"] and not (problem or run.log_folder):
            sentence = (
                f"The routing log of {file}, written to {run.info['log_dir']}, is not below the "
                "folders that were read: give the folder that it was moved to as well."
            )
            notes.append((file, sentence))
        if cached := run.cached_requests:
            sentence = (
                f"{cached} requests of {file} came from a cache: "
                "its routing numbers cover only the others."
            )
            notes.append((file, sentence))
        yield run
