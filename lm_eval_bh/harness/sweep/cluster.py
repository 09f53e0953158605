"""Runs the experiments of a sweep on a Ray cluster: one actor per GPU or worker holds one model."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.harness.sweep import waiting
from lm_eval_bh.harness.sweep.local import Finished
from lm_eval_bh.harness.sweep.sweep_config import Experiment, SweepConfig
from lm_eval_bh.harness.sweep.sweep_folder import SweepFolder
from lm_eval_bh.harness.sweep.waiting import Progress, Say

if TYPE_CHECKING:
    from lm_eval_bh.harness.sweep.evaluator import Evaluator

ASIDE = "aside"  # concurrency group for queries to a busy worker
PATIENCE = 10.0  # seconds that a worker has to answer a query
LOSSES = 3  # workers that an experiment may lose before the sweep gives up on it

logger = logging.getLogger(__name__)


class Worker:
    """Holds one model, loaded for the first experiment, in a separate process."""

    def __init__(
        self, config: SweepConfig, experiments: Sequence[Experiment], folder: Path, device: str
    ) -> None:
        self._of = config, experiments, device
        self._folder = SweepFolder(folder, config)
        self._evaluator: Evaluator | None = None

    def used(self) -> float:
        """Return this process's CPU seconds, even during an evaluation."""
        return time.process_time()

    def run(self, experiment: Experiment) -> float | None:
        """Evaluate an experiment; return its seconds, or None if another process runs or ran it."""
        if self._evaluator is None:  # not in __init__, whose errors Ray reports as a lost worker
            from lm_eval_bh.harness.sweep.evaluator import Evaluator

            self._evaluator = Evaluator(*self._of)
        with self._folder.alone(experiment) as mine:
            if not mine:
                return None
            self._folder.clear(experiment)
            start = time.perf_counter()
            self._evaluator.run(experiment, self._folder.run(experiment))
            return time.perf_counter() - start


def run_on_ray(
    config: SweepConfig,
    experiments: Sequence[Experiment],
    folder: SweepFolder,
    finished: Finished,
    address: str,
    workers: int | None = None,
    device: str | None = None,
    say: Say = print,
) -> None:
    """Evaluate the experiments on a Ray cluster; a lost worker's experiment runs again.

    Parameters
    ----------
    config, experiments, folder, finished
        See :func:`~lm_eval_bh.harness.sweep.local.run_here`. All machines must see the folder under
        the same path.
    address : str
        Address of the cluster, or ``local`` for one on this machine.
    workers : int or None
        Number of workers; None for one per GPU or, without GPUs, one per CPU.
    device : str or None
        As in lm-eval; None for ``cuda`` if the cluster has GPUs.
    say : callable
        Takes a line once a minute: the experiments still running, and the number of live workers.

    Raises
    ------
    ParameterError
        If Ray is not installed, the cluster cannot be reached, or no workers are available.
    BHError
        The error of an experiment; other running experiments are abandoned.
    """
    try:
        import ray
    except ImportError as error:
        raise ParameterError(
            "Ray is not installed: pip install 'lm-eval-bh[ray]', or leave --ray out."
        ) from error
    if not experiments:
        return
    if workers is not None and workers < 1:
        raise ParameterError(f"workers={workers} is not a number of workers: give 1 or more.")
    start = {"num_cpus": max(workers or 0, os.cpu_count() or 1)} if address == "local" else {}
    # Ray's default niceness of 15 leaves 3 % of a busy CPU to a sweep.
    os.environ.setdefault("RAY_worker_niceness", "0")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **start)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray silently replaced it
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ParameterError(
            f"No Ray cluster answers at {address!r} ({reason}): check the address, or use local."
        ) from error
    try:
        gpus = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
        room = gpus or int(ray.cluster_resources().get("CPU", 1))
        if workers is not None and workers > room:
            raise ParameterError(
                f"workers={workers} is more than the cluster's {room} "
                f"{'GPUs' if gpus else 'CPUs'}: give {room} at most."
            )
        pool = _Pool(ray, config, experiments, folder, device or ("cuda" if gpus else "cpu"), say)
        pool.run(min(workers or room, len(experiments)), finished)
    except ray.exceptions.RayError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ParameterError(
            f"The Ray cluster gave up ({reason}): fix that and run the same command again; "
            "finished experiments are kept."
        ) from error
    finally:
        ray.shutdown()


class _Pool:
    """The actors and their current experiments."""

    def __init__(
        self,
        ray: Any,
        config: SweepConfig,
        experiments: Sequence[Experiment],
        folder: SweepFolder,
        device: str,
        say: Say,
    ) -> None:
        self.ray = ray
        self.say = say
        self.progress: dict[Any, Progress] = {}
        self.waiting = list(experiments)
        self.losses: dict[Experiment, int] = {}
        self.under_way: dict[Any, tuple[Any, Experiment]] = {}
        gpus = 0 if device == "cpu" else 1
        # A separate group answers while an experiment runs.
        remote = ray.remote(num_cpus=1, num_gpus=gpus, concurrency_groups={ASIDE: 1})(Worker)
        # Every worker loads a model; the folder may be relative to this process's.
        self._arguments = config, list(experiments), folder.path.resolve(), device
        self._worker_class = remote

    def new_worker(self) -> Any:
        return self._worker_class.remote(*self._arguments)

    def run(self, workers: int, finished: Finished) -> None:
        for _ in range(workers):
            self._give(self.new_worker())
        while self.under_way:
            done, _ = self.ray.wait(list(self.under_way), num_returns=1, timeout=waiting.EVERY)
            if not done:
                self._say_what_is_waited_for()
                continue
            (answer,) = done
            worker, experiment = self.under_way.pop(answer)
            self.progress.pop(answer)
            try:
                seconds = self.ray.get(answer)
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except (
                self.ray.exceptions.RayActorError,
                self.ray.exceptions.OutOfMemoryError,
            ):
                self.ray.kill(worker)  # it may be unreachable but still writing
                self._lost(experiment)
                worker = self.new_worker()
            else:
                if seconds is not None:
                    finished(experiment, seconds)
            self._give(worker)

    def _give(self, worker: Any) -> None:
        """Give a worker an experiment, or release it to make room for others."""
        if self.waiting:
            experiment = self.waiting.pop(0)
            answer = worker.run.remote(experiment)
            self.under_way[answer] = worker, experiment
            self.progress[answer] = Progress()
        else:
            self.ray.kill(worker)

    def _say_what_is_waited_for(self) -> None:
        asked = {
            answer: worker.used.options(concurrency_group=ASIDE).remote()
            for answer, (worker, _) in self.under_way.items()
        }
        self.ray.wait(list(asked.values()), num_returns=len(asked), timeout=PATIENCE)
        lines, alive = [], 0
        for answer, question in asked.items():
            used = None
            with contextlib.suppress(self.ray.exceptions.RayError):  # run() handles lost workers
                used = self.ray.get(question, timeout=0)
                alive += 1
            lines.append(self.progress[answer].line(self.under_way[answer][1].name, used))
        self.say(f"{alive} of {len(asked)} workers are running. Waiting for {'; '.join(lines)}.")

    def _lost(self, experiment: Experiment) -> None:
        self.losses[experiment] = self.losses.get(experiment, 0) + 1
        if self.losses[experiment] >= LOSSES:
            raise ParameterError(
                f"{experiment.name} lost {LOSSES} workers in a row, perhaps for lack of memory: "
                "give it fewer workers or a smaller batch size, and run the same command again."
            )
        logger.warning("A worker was lost in %s, which runs again.", experiment.name)
        self.waiting.insert(0, experiment)
