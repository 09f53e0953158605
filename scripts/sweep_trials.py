"""Trials of disturbed sweeps for faults.py: commands, messages and losses."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd

PROGRAM = [sys.executable, "-m", "lm_eval_bh"]
GRID = {"tasks": "bh_demo_lambada", "baselines": "8", "max-k": "8", "alphas": "0.4,0.5,0.6"}
LIMIT, OTHER_LIMIT = 40, 30
OWN = ("run_id", "baseline_run_id", "file", "seconds", "evaluation_tokens_per_second")
TABLES = ("results", "layers", "comparisons")
PATIENCE = 300  # seconds until a command counts as hanging

# Messages at the end of a command; a signal may still come while Python shuts down.
SENTENCE = re.compile("^(lm-eval-bh: |left out: |4 of 4 experiments are done)", re.MULTILINE)

Tables = dict[str, pd.DataFrame]


class Skipped(Exception):  # noqa: N818  no error
    """Raised if this machine cannot produce a fault."""


class Ended(NamedTuple):
    code: int
    text: str


class Running(NamedTuple):
    process: subprocess.Popen[bytes]
    output: Path
    started: float

    def wait_until(self, moment: float) -> None:
        """Wait until a number of seconds after the start, or until the end."""
        left = self.started + moment - time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(left, 0))


@dataclass
class Trial:
    """One disturbance of one sweep, and its outcome."""

    folder: Path
    rng: random.Random
    limit: int = LIMIT
    lost: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finished_then: int = 0

    @property
    def sweep(self) -> list[str]:
        flags = [f"--{name}={value}" for name, value in GRID.items()]
        command = ["sweep", "--model=tiny-olmoe", *flags, f"--limit={self.limit}"]
        return [*command, f"--output-dir={self.folder}", "--device=cpu"]

    def start(
        self, command: list[str], prepare: Callable[[], object] = int, **environment: str
    ) -> Running:
        """Start the program; ``prepare`` is called in the new process."""

        def prepared() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
            prepare()

        handle, output = tempfile.mkstemp(dir=self.folder.parent)
        process = subprocess.Popen(
            [*PROGRAM, *command],
            env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            preexec_fn=prepared,
            start_new_session=True,  # as a terminal's command has a group of processes
        )
        os.close(handle)
        return Running(process, Path(output), time.monotonic())

    def end(self, running: Running) -> Ended:
        """Wait for the end; a failure must print a sentence, unless it was a kill."""
        try:
            code = running.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            running.process.kill()
            code = running.process.wait()
            self.silent.append("it hung")
        text = running.output.read_text(errors="replace")
        self.texts.append(text)
        if code not in (0, -signal.SIGKILL) and not SENTENCE.search(text):
            self.silent.append(f"exit code {code} without a sentence: {text[-200:]!r}")
        return Ended(code, text)

    def run(self, command: list[str], prepare: Callable[[], object] = int, **env: str) -> Ended:
        return self.end(self.start(command, prepare, **env))

    def finished(self) -> dict[str, bytes]:
        """Return the summaries of the finished experiments."""
        files = self.folder.glob("logs/*.json")
        return {f.name: f.read_bytes() for f in files if "internal_routing" not in f.name}

    def aggregate(self) -> tuple[Ended, Tables]:
        """Return the command's output, and the tables that it wrote."""
        for table in TABLES:
            (self.folder / f"bh_routing_{table}.csv").unlink(missing_ok=True)
        ended = self.run(["aggregate", str(self.folder), "--no-figure", "--resamples=99"])
        found = {}
        for table in TABLES:
            with contextlib.suppress(FileNotFoundError):
                frame = pd.read_csv(self.folder / f"bh_routing_{table}.csv")
                found[table] = frame.drop(columns=[name for name in OWN if name in frame])
        return ended, found

    def judge(self, reference: Tables, left_alone: dict[str, bytes]) -> None:
        """Run the same command again, aggregate, and compare."""
        self.finished_then = len(left_alone)
        again = self.run(self.sweep)
        if again.code and "remove the file" in again.text:  # the advice is taken
            (self.folder / "sweep.json").unlink()
            again = self.run(self.sweep)
        if again.code:
            self.lost.append(f"the sweep cannot go on: {again.text[-300:]!r}")
        ended, tables = self.aggregate()
        if not same(tables, reference):
            self.lost.append("another table")
            if not (ended.code or again.code):
                self.silent.append("another table, and no word")
        after = self.finished()
        if redone := [name for name, text in left_alone.items() if after.get(name) != text]:
            self.lost.append(f"finished before, and run again: {', '.join(redone)}")


def same(tables: Tables, reference: Tables) -> bool:
    return tables.keys() == reference.keys() and all(
        table.equals(reference[name]) for name, table in tables.items()
    )


class Bench:
    """Undisturbed sweeps, for comparison and as copies for trials."""

    def __init__(self, root: Path, seed: int, kills: int) -> None:
        self.root, self.kills = root, kills
        self.rng = random.Random(seed)
        self._numbers = itertools.count(1)
        self._undisturbed: dict[int, tuple[Trial, Tables]] = {}
        self.seconds = 0.0
        self.undisturbed()

    def undisturbed(self, limit: int = LIMIT) -> tuple[Trial, Tables]:
        if limit not in self._undisturbed:
            trial = self.trial(limit)
            start = time.monotonic()
            if trial.run(trial.sweep).code:
                raise SystemExit(f"An undisturbed sweep fails:\n{trial.texts[-1]}")
            self.seconds = self.seconds or time.monotonic() - start
            self._undisturbed[limit] = trial, trial.aggregate()[1]
        return self._undisturbed[limit]

    def trial(self, limit: int = LIMIT, *, copy: bool = False) -> Trial:
        """Return a trial with a folder that is missing, or a copy of a finished one."""
        home = self.root / f"trial-{next(self._numbers)}"
        home.mkdir()
        if copy:
            shutil.copytree(self.undisturbed()[0].folder, home / "sweep")
        return Trial(home / "sweep", self.rng, limit)

    def moments(self, number: int) -> Iterator[float]:
        """Yield random seconds, one in each of equal parts of an undisturbed sweep's time."""
        for part in range(number):
            yield (part + self.rng.random()) / number * self.seconds

    def judge(self, trial: Trial, left_alone: dict[str, bytes] | None = None) -> Trial:
        left_alone = trial.finished() if left_alone is None else left_alone
        trial.judge(self.undisturbed(trial.limit)[1], left_alone)
        return trial
