"""Disturbs sweeps and counts losses: kills, signals, full disks, damaged files, lost workers.

python scripts/faults.py                          # everything; about 25 minutes on two cores
python scripts/faults.py --kills 2 --only kill    # the faults whose name holds a word

Every trial disturbs a sweep of tiny-olmoe in its own folder, runs the same command again
undisturbed, and aggregates. A trial counts as

lost        if the final tables differ from those of an undisturbed sweep in anything but times and
            ids, or if an undamaged finished experiment ran again;
silent      if a failed command printed no message, or a successful one gave a different table
            without a message;
traceback   if any command printed one.

Moments are random, one in each of equal parts of an undisturbed sweep's time, so that start-up is
among them. Faults that this machine cannot produce (a small file system, libfaketime) are skipped
and named. The exit code is 1 if any trial counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table
from sweep_trials import LIMIT, OTHER_LIMIT, Bench, Running, Skipped, Trial, same

FAKETIME = [
    Path("/usr/lib", triple, "faketime", "libfaketime.so.1")
    for triple in ("", "x86_64-linux-gnu", "aarch64-linux-gnu")
]

# Faults: each yields finished trials.


def signals(bench: Bench, number: int, sent: signal.Signals, *options: str) -> Iterator[Trial]:
    for moment in bench.moments(number):
        trial = bench.trial()
        running = trial.start([*trial.sweep, *options])
        running.wait_until(moment)
        if sent == signal.SIGINT and running.process.poll() is None:  # as Ctrl-C in a terminal
            os.killpg(running.process.pid, sent)
        else:
            running.process.send_signal(sent)
        trial.end(running)
        yield bench.judge(trial)


def kill(bench: Bench) -> Iterator[Trial]:
    yield from signals(bench, bench.kills, signal.SIGKILL)


def terminate(bench: Bench) -> Iterator[Trial]:
    yield from signals(bench, few(bench), signal.SIGTERM)


def interrupt(bench: Bench) -> Iterator[Trial]:
    yield from signals(bench, few(bench), signal.SIGINT)


def kill_twice(bench: Bench) -> Iterator[Trial]:
    """Kill a sweep, and the one that resumes it."""
    for first, second in zip(bench.moments(few(bench)), bench.moments(few(bench)), strict=True):
        trial = bench.trial()
        for moment in (first, second):
            running = trial.start(trial.sweep)
            running.wait_until(moment)
            running.process.kill()
            trial.end(running)
        yield bench.judge(trial)


def small_files(bench: Bench) -> Iterator[Trial]:
    """Limit the size of files, as on a full disk."""
    for _ in range(few(bench)):
        trial = bench.trial()
        size = int(10 ** bench.rng.uniform(3.9, 4.7))  # the command's output goes to a file too
        limits = (size, resource.RLIM_INFINITY)
        trial.run(
            trial.sweep, lambda limits=limits: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        )
        yield bench.judge(trial)


def small_disk(bench: Bench) -> Iterator[Trial]:
    """Leave no space on the file system, and free some later."""
    for _ in range(few(bench)):
        trial = bench.trial()
        trial.folder.mkdir()
        pages = bench.rng.randint(4, 200)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "none", str(trial.folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            raise Skipped("no file system can be mounted here")
        try:
            trial.run(trial.sweep)
            left_alone = trial.finished()
            remount = ["mount", "-o", "remount,size=100m", str(trial.folder)]
            subprocess.run(remount, check=True)
            yield bench.judge(trial, left_alone)
        finally:
            subprocess.run(["umount", str(trial.folder)], check=True)


def read_only(bench: Bench) -> Iterator[Trial]:
    """Make the folder read-only, from the start or from a random moment."""
    for moment in (0.0, *itertools.islice(bench.moments(few(bench)), 1, None)):
        trial = bench.trial()
        trial.folder.mkdir()
        running = None
        if moment:
            running = trial.start(trial.sweep, without_privilege)
            running.wait_until(moment)
        folders = [trial.folder, *(f for f in trial.folder.rglob("*") if f.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        trial.end(running or trial.start(trial.sweep, without_privilege))
        for folder in folders:
            folder.chmod(0o755)
        yield bench.judge(trial)


def without_privilege() -> None:
    """Drop the capability with which root writes to read-only folders (CAP_DAC_OVERRIDE)."""
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(24, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the capability cannot be dropped")


def two_sweeps(bench: Bench) -> Iterator[Trial]:
    """Start two different sweeps on one folder: one gets it, the other is refused."""
    for moment in bench.moments(few(bench)):
        first = bench.trial()
        second = Trial(first.folder, bench.rng, OTHER_LIMIT)
        early, late = (first, second) if bench.rng.random() < 0.5 else (second, first)
        one = early.start(early.sweep)
        one.wait_until(bench.rng.choice([0.0, moment / 4]))
        two = late.start(late.sweep)
        ended = {early.limit: early.end(one), late.limit: late.end(two)}
        if sorted(e.code for e in ended.values()) != [0, 1]:
            first.lost.append(f"exit codes {[e.code for e in ended.values()]}")
        winner, loser = (first, second) if ended[LIMIT].code == 0 else (second, first)
        if "holds another sweep" not in ended[loser.limit].text:
            winner.silent.append(f"the loser said {ended[loser.limit].text[-200:]!r}")
        winner.texts += loser.texts
        yield bench.judge(winner)


def twins(bench: Bench) -> Iterator[Trial]:
    """Start the same sweep twice at once: they share the work."""
    for _ in range(few(bench)):
        trial = bench.trial()
        pair = [trial.start(trial.sweep), trial.start(trial.sweep)]
        if any([trial.end(running).code for running in pair]):
            trial.lost.append("one of them failed")
        yield bench.judge(trial)


def ray_workers(driver: Running) -> list[psutil.Process]:
    """Return the evaluating processes of a sweep's Ray cluster."""
    found = []
    for process in psutil.Process(driver.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] == ["ray::Worker.run"]:
                found.append(process)
    return found


def lost_worker(bench: Bench) -> Iterator[Trial]:
    """Kill a worker of Ray, or the whole sweep, while workers evaluate."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise Skipped("Ray is not installed") from None
    for number in range(few(bench)):
        trial = bench.trial()
        running = trial.start([*trial.sweep, "--ray=local", "--workers=2"])
        workers: list[psutil.Process] = []
        while not workers and running.process.poll() is None:
            time.sleep(0.1)
            with contextlib.suppress(psutil.Error):
                workers = ray_workers(running)
        time.sleep(bench.rng.uniform(0, bench.seconds / 3))
        worker_only = number % 2 == 0
        with contextlib.suppress(psutil.Error):
            bench.rng.choice(workers).kill() if worker_only else running.process.kill()
        ended = trial.end(running)
        if worker_only and ended.code:
            trial.lost.append("the sweep ended")
        psutil.wait_procs(workers, timeout=60)
        yield bench.judge(trial)


KINDS = ("runs/*/*/results_*", "runs/*/*/samples_*", "runs/*/routing/*/*", "logs/*", "sweep.json")


def damaged(bench: Bench, change: Callable[[Trial, Path], Path]) -> Iterator[Trial]:
    """Damage a random file of a finished sweep, aggregate, then resume.

    ``change`` returns the damaged file. No other experiment may run again.
    """
    for kind in itertools.islice(itertools.cycle(KINDS), few(bench) + 1):
        trial = bench.trial(copy=True)
        files = [file for file in trial.folder.glob(kind) if file.is_file()]
        hit = change(trial, trial.rng.choice(sorted(files)))
        name = hit.relative_to(trial.folder).as_posix()
        left_alone = {n: t for n, t in trial.finished().items() if Path(n).stem not in name}
        ended, tables = trial.aggregate()
        told = any(word in ended.text for word in ("left out: ", "note: "))
        if not (same(tables, bench.undisturbed()[1]) or told or ended.code):
            trial.silent.append(f"{name}: aggregate gives another table, and no word")
        yield bench.judge(trial, left_alone)


def deleted(bench: Bench) -> Iterator[Trial]:
    def delete(trial: Trial, file: Path) -> Path:
        file.unlink()
        return file

    yield from damaged(bench, delete)


def truncated(bench: Bench) -> Iterator[Trial]:
    def cut(trial: Trial, file: Path) -> Path:
        os.truncate(file, trial.rng.randrange(file.stat().st_size))
        return file

    yield from damaged(bench, cut)


def deleted_folder(bench: Bench) -> Iterator[Trial]:
    def delete(trial: Trial, _: Path) -> Path:
        folder = trial.rng.choice(sorted((trial.folder / "runs").iterdir()))
        shutil.rmtree(folder)
        return folder

    yield from damaged(bench, delete)


def clock_set_back(bench: Bench) -> Iterator[Trial]:
    """Kill a sweep, and resume it two days earlier."""
    library = next((str(file) for file in FAKETIME if file.exists()), None)
    if library is None:
        raise Skipped("there is no libfaketime")
    past = {"LD_PRELOAD": library, "FAKETIME": "-2d", "DONT_FAKE_MONOTONIC": "1"}
    for moment in bench.moments(few(bench)):
        trial = bench.trial()
        running = trial.start(trial.sweep)
        running.wait_until(moment)
        running.process.kill()
        trial.end(running)
        left_alone = trial.finished()
        if trial.run(trial.sweep, **past).code:
            trial.lost.append("the sweep cannot go on in the past")
        yield bench.judge(trial, left_alone)


def few(bench: Bench) -> int:
    """Return the number of trials of faults other than kill -9."""
    return max(1, bench.kills // 5)


FAULTS: dict[str, Callable[[Bench], Iterator[Trial]]] = {
    "kill -9": kill,
    "kill -9, and again": kill_twice,
    "SIGTERM": terminate,
    "SIGINT": interrupt,
    "files of limited size": small_files,
    "full disk": small_disk,
    "read-only folder": read_only,
    "two different sweeps": two_sweeps,
    "the same sweep twice": twins,
    "lost Ray worker": lost_worker,
    "deleted file": deleted,
    "truncated file": truncated,
    "deleted folder": deleted_folder,
    "clock set back": clock_set_back,
}


def main(
    kills: Annotated[int, typer.Option(min=1, help="Kills; other faults a fifth as often.")] = 20,
    only: Annotated[
        str, typer.Option(help="Faults whose name holds one of these, by commas.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of moments and choices.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Folder to keep what was made.")] = None,
) -> None:
    """Disturb sweeps, and print the trials and their outcomes."""
    chosen = {
        name: fault
        for name, fault in FAULTS.items()
        if any(word in name for word in only.split(","))
    }
    table = Table("fault", "tried", "experiments finished: trials", "lost", "silent", "tracebacks")
    for column in table.columns[1:]:
        column.justify = "right"
    bad = 0
    with tempfile.TemporaryDirectory() if keep is None else contextlib.nullcontext(keep) as folder:
        bench = Bench(Path(folder), seed, kills)
        print(f"An undisturbed sweep of 4 experiments takes {bench.seconds:.0f} seconds.")
        for name, fault in chosen.items():
            counts, trials, finished = [0, 0, 0], 0, Counter[int]()
            skipped = ""
            try:
                for trial in fault(bench):
                    trials += 1
                    finished[trial.finished_then] += 1
                    traces = sum("Traceback" in text for text in trial.texts)
                    for i, found in enumerate((trial.lost, trial.silent, traces)):
                        counts[i] += bool(found)
                    for what in (*trial.lost, *trial.silent):
                        print(f"{name}, trial {trials}: {what}", flush=True)
                    for text in trial.texts:
                        if "Traceback" in text:
                            print(
                                f"{name}, trial {trials}: {text[text.index('Traceback') :][:3000]}"
                            )
            except Skipped as reason:
                skipped = str(reason)
            bad += sum(counts)
            then = ", ".join(f"{done}: {times}" for done, times in sorted(finished.items()))
            table.add_row(name, skipped or str(trials), then, *map(str, counts))
            print(f"{name}: {skipped or trials}", flush=True)
    Console(width=110).print(table)
    raise typer.Exit(int(bad > 0))


if __name__ == "__main__":
    typer.run(main)
