"""The folder of a sweep: its settings, its finished experiments, and their files.

::

    <folder>/sweep.json                                 the settings, before any work
    <folder>/runs/<experiment>/<model>/results_*.json   as `lm_eval --output_path` writes them
    <folder>/runs/<experiment>/routing/<run id>/        as `--model_args log_dir=` has it
    <folder>/logs/<experiment>_internal_routing.json    the same file, by its name
    <folder>/logs/<experiment>.json                     the summary, written last

An experiment is done once it has its summary and all files that the summary lists are unchanged:
see :mod:`lm_eval_bh.harness.sweep.done`. Other files of an unfinished experiment come from a killed
or damaged run, and are removed before it runs again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lm_eval_bh.errors import DataError
from lm_eval_bh.experiment_names import SWEEP_SETTINGS as SETTINGS
from lm_eval_bh.files import replacing
from lm_eval_bh.harness.logs.log_folder import explaining
from lm_eval_bh.harness.sweep.done import sealed, summary_file, why_not_done
from lm_eval_bh.harness.sweep.sweep_config import Experiment, SweepConfig, completed
from lm_eval_bh.schema import (
    INTERNAL_ROUTING,
    SCHEMA_VERSION,
    ExperimentSummary,
    read_json,
    read_summary,
)

VERSION = "schema_version"  # key in the settings
FIRST_RELEASE = 0  # which wrote no version
SHOWN = 200  # characters of a setting in a message
PATIENCE = 60.0  # seconds to wait for another process to write the settings


class SweepFolder:
    """The folder with everything of a sweep.

    Parameters
    ----------
    path : Path
        Path of the folder, which is made if missing.
    config : SweepConfig
        The settings of the sweep.
    """

    def __init__(self, path: Path, config: SweepConfig) -> None:
        self.path = path
        self.config = config
        self.logs = path / "logs"

    def check(self) -> None:
        """Check that the folder is free, or holds a sweep with these settings.

        Raises
        ------
        DataError
            If it is a file, or holds a sweep with other settings, which the message names.
        """
        for path in (self.path, *self.path.parents):
            if path.exists() and not path.is_dir():
                raise DataError(f"{path} is a file, not a folder: give another --output-dir.")
        before, _ = self._recorded()
        if before is None:
            return
        before, settings = completed(before), self.config.as_dict()
        differences = [
            f"{name}: {_short(before.get(name))} there, {_short(settings.get(name))} here"
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        if differences:
            raise DataError(
                f"{self.path} holds another sweep ({'; '.join(differences)}): "
                "give another --output-dir, or the same settings."
            )

    def claim(self) -> None:
        """Claim the folder for this sweep, and write its settings.

        Raises
        ------
        DataError
            As :meth:`check`, or if the folder cannot be written.
        """
        self.check()  # another sweep's folder is not touched
        with self._settled():
            if not (self.path / SETTINGS).exists():
                content = {VERSION: SCHEMA_VERSION, **self.config.as_dict()}
                with explaining(self.path), replacing(self.path / SETTINGS) as temporary:
                    temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        self.check()

    def release(self) -> None:
        """Release the folder if no experiment was started, so that it blocks no other sweep."""
        with self._settled():
            in_vain = not ((self.path / "runs").exists() or any(self.logs.glob("*.json")))
            if in_vain:
                (self.path / SETTINGS).unlink(missing_ok=True)
        if in_vain:
            shutil.rmtree(self.path / ".locks", ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds other files
                self.path.rmdir()

    def _recorded(self) -> tuple[dict[str, Any] | None, int]:
        """Return the settings in the folder, None if there are none, and their version."""
        file = self.path / SETTINGS
        if not os.path.lexists(file):
            return None, SCHEMA_VERSION
        content = read_json(file)
        version = content.pop(VERSION, FIRST_RELEASE)
        if type(version) is not int or version > SCHEMA_VERSION:
            raise DataError(
                f"{file} has the schema version {_short(version)}, and this release reads up to "
                f"{SCHEMA_VERSION}: upgrade lm-eval-bh, or give another --output-dir."
            )
        return content, version

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Keep other processes from changing the settings."""
        lock = self._lock(SETTINGS)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise DataError(
                f"Another process has held {lock.lock_file} for {PATIENCE:.0f} seconds: "
                "end it, or give another --output-dir."
            ) from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def alone(self, experiment: Experiment) -> Iterator[bool]:
        """Yield whether to run the experiment here: it is not done and runs nowhere else.

        No other process runs it within the block.

        Raises
        ------
        DataError
            As :meth:`claim`.
        """
        self.claim()
        lock = self._lock(experiment.name)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield not self.done(experiment)
        finally:
            lock.release()

    def _lock(self, name: str) -> FileLock:
        """Return a file-system lock, which ends with its process in any case."""
        locks = self.path / ".locks"
        with explaining(locks):
            locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / name)

    def run(self, experiment: Experiment) -> Path:
        """Return the folder of the experiment's results."""
        return self.path / "runs" / experiment.name

    def summary(self, experiment: Experiment) -> Path:
        """Return the summary file, which marks the experiment as done."""
        return summary_file(self.path, experiment.name)

    def why_not_done(self, experiment: Experiment) -> str | None:
        """Return why the experiment has to run, or None if it is done."""
        if not os.path.lexists(self.summary(experiment)):
            return "it has not run"
        _, version = self._recorded()
        settings = self.config.as_dict(grid=False)
        # The first release wrote no settings into summaries: the folder's apply.
        earlier = settings if version == FIRST_RELEASE else None
        return why_not_done(self.path, experiment.name, settings, earlier)

    def done(self, experiment: Experiment) -> bool:
        """Return whether the experiment is finished, so that resuming skips it."""
        return self.why_not_done(experiment) is None

    def missing(self, experiments: Iterable[Experiment]) -> list[Experiment]:
        """Return the experiments that are not done."""
        return [experiment for experiment in experiments if not self.done(experiment)]

    def clear(self, experiment: Experiment) -> None:
        """Remove the remains of a killed run of the experiment."""
        self.summary(experiment).unlink(missing_ok=True)
        run = self.run(experiment)
        if run.is_symlink():  # its target is outside of this folder
            run.unlink()
        elif run.exists():
            shutil.rmtree(run)
        self._internal_routing(experiment).unlink(missing_ok=True)

    def finish(self, experiment: Experiment, summary: ExperimentSummary) -> None:
        """Give the logs their names and mark the experiment as done.

        Raises
        ------
        DataError
            If there is no space left.
        """
        with explaining(self.logs):
            self.logs.mkdir(parents=True, exist_ok=True)
            for file in self.run(experiment).glob(f"routing/*/*{INTERNAL_ROUTING}"):
                with replacing(self._internal_routing(experiment)) as temporary:
                    temporary.unlink()
                    _same_file(file, temporary)
            files = [file for file in self.run(experiment).rglob("*") if file.is_file()]
            if self._internal_routing(experiment).exists():
                files.append(self._internal_routing(experiment))
            summary = sealed(self.path, summary, files, self.config.as_dict(grid=False))
            with replacing(self.summary(experiment)) as temporary:
                temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def seconds(self, experiments: Iterable[Experiment]) -> list[float]:
        """Return the seconds of the finished experiments."""
        return [
            float(read_summary(self.summary(experiment))["summary"]["elapsed_time_seconds"] or 0)
            for experiment in experiments
            if self.done(experiment)
        ]

    def _internal_routing(self, experiment: Experiment) -> Path:
        return self.logs / f"{experiment.name}{INTERNAL_ROUTING}"


def _same_file(file: Path, other: Path) -> None:
    """Link a file to another name, or copy it if the file system has no links."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)


def _short(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "something too deep to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
