"""The folder of a sweep: what was asked, what is done, and where an experiment writes.

::

    <folder>/sweep.json                                 the settings, with the first that finishes
    <folder>/runs/<experiment>/<model>/results_*.json   as `lm_eval --output_path` writes them
    <folder>/runs/<experiment>/routing/<run id>/        as `--model_args log_dir=` has it
    <folder>/logs/<experiment>_internal_routing.json    the same file, by its name
    <folder>/logs/<experiment>.json                     the summary, written last

An experiment is done once it has its summary. Whatever else lies there of one that is not done is
of a run that was killed, and removed before it runs again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lm_eval_bh.errors import DataError
from lm_eval_bh.files import replacing
from lm_eval_bh.harness.logs.log_folder import explaining
from lm_eval_bh.harness.sweep.sweep_config import Experiment, SweepConfig
from lm_eval_bh.schema import INTERNAL_ROUTING, ExperimentSummary, read_json

SETTINGS = "sweep.json"
SHOWN = 200  # characters of a setting in a message


class SweepFolder:
    """Where a sweep keeps everything.

    Parameters
    ----------
    path : Path
        Made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"

    def check(self, config: SweepConfig) -> None:
        """Look whether the folder is free, or of a sweep with these settings.

        Raises
        ------
        DataError
            If it holds a sweep with other settings, which the message names.
        """
        file = self.path / SETTINGS
        if not file.exists():
            return
        before, settings = read_json(file), json.loads(json.dumps(config.as_dict()))
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

    def claim(self, config: SweepConfig) -> None:
        """Take the folder for a sweep, whose settings it keeps.

        Done with the first finished experiment, not before: a sweep that never got so far leaves
        nothing that stands in the way of the next.

        Raises
        ------
        DataError
            As :meth:`check`, or if it cannot be written.
        """
        file = self.path / SETTINGS
        with self._lock(SETTINGS), explaining(self.path):
            if not file.exists():
                with replacing(file) as temporary:
                    temporary.write_text(json.dumps(config.as_dict(), indent=2) + "\n", "utf-8")
        self.check(config)

    @contextmanager
    def alone(self, experiment: Experiment) -> Iterator[bool]:
        """Yield whether the experiment is to be run here: not done, and under way nowhere else.

        While the block lasts nobody else runs it.
        """
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
        """Return a lock of the file system, which ends with its process, however that ends."""
        locks = self.path / ".locks"
        with explaining(locks):
            locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / name)

    def run(self, experiment: Experiment) -> Path:
        """Return the folder that the experiment writes its results to."""
        return self.path / "runs" / experiment.name

    def summary(self, experiment: Experiment) -> Path:
        """Return the file that says that the experiment is done."""
        return self.logs / f"{experiment.name}.json"

    def done(self, experiment: Experiment) -> bool:
        """Whether the experiment is finished, so that resuming leaves it alone."""
        return self.summary(experiment).is_file()

    def missing(self, experiments: Iterable[Experiment]) -> list[Experiment]:
        """Return the experiments that are not done."""
        return [experiment for experiment in experiments if not self.done(experiment)]

    def clear(self, experiment: Experiment) -> None:
        """Remove what a killed run of the experiment has left."""
        self.summary(experiment).unlink(missing_ok=True)
        if self.run(experiment).exists():
            shutil.rmtree(self.run(experiment))
        self._internal_routing(experiment).unlink(missing_ok=True)

    def finish(self, experiment: Experiment, summary: ExperimentSummary) -> None:
        """Put the logs under their names; from now on the experiment is done.

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
            with replacing(self.summary(experiment)) as temporary:
                temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def seconds(self, experiments: Iterable[Experiment]) -> list[float]:
        """Return how long those that are done have taken."""
        return [
            float(read_json(self.summary(experiment))["summary"]["elapsed_time_seconds"])
            for experiment in experiments
            if self.done(experiment)
        ]

    def _internal_routing(self, experiment: Experiment) -> Path:
        return self.logs / f"{experiment.name}{INTERNAL_ROUTING}"


def _same_file(file: Path, other: Path) -> None:
    """Give a file another name; where the file system knows no links, copy it."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
