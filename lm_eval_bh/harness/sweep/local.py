"""Runs the experiments of a sweep in this process, or in all processes that accelerate started."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from lm_eval_bh.harness.sweep.sweep_config import Experiment, SweepConfig
from lm_eval_bh.harness.sweep.sweep_folder import SweepFolder
from lm_eval_bh.harness.sweep.waiting import Say, saying

if TYPE_CHECKING:
    from lm_eval_bh.harness.sweep.evaluator import Evaluator

Finished = Callable[[Experiment, float], None]


def run_here(
    config: SweepConfig,
    experiments: Sequence[Experiment],
    folder: SweepFolder,
    finished: Finished,
    device: str | None = None,
    say: Say = print,
    then: Callable[[Evaluator], None] | None = None,
) -> None:
    """Evaluate the experiments one after the other with one loaded model.

    Parameters
    ----------
    config : SweepConfig
        The settings of the sweep.
    experiments : sequence of Experiment
        Those to run now, less what another process runs or has run meanwhile; on several processes
        the first one decides.
    folder : SweepFolder
        Where they write.
    finished : callable
        Called on the first process with every experiment and its seconds, after its results are
        written.
    device : str or None
        As lm-eval takes it.
    say : callable
        Takes a line once a minute.
    then : callable or None
        Called at the end with the loaded model, which is loaded for it where no experiment is left.
    """
    from lm_eval_bh.harness.sweep.evaluator import Evaluator  # torch, transformers, lm-eval

    if not experiments and then is None:
        return
    with saying("the model", say):
        evaluator = Evaluator(config, experiments or config.experiments(), device)
    for experiment in evaluator.agree(list(experiments)):
        with folder.alone(experiment) if evaluator.rank == 0 else nullcontext(False) as mine:
            if not evaluator.agree(mine):
                continue
            if evaluator.rank == 0:
                folder.clear(experiment)
            evaluator.agree(None)  # nobody writes before it is cleared
            start = time.perf_counter()
            with saying(experiment.name, say) if evaluator.rank == 0 else nullcontext():
                evaluator.run(experiment, folder.run(experiment))
            if evaluator.rank == 0:
                finished(experiment, time.perf_counter() - start)
    if then is not None:
        then(evaluator)
    evaluator.agree(None)  # nobody leaves while the first process still writes


def end_processes() -> None:
    """End the group of processes that accelerate made; only before this one ends.

    Its threads otherwise outlive the interpreter now and then, which aborts a process that has done
    everything, and the launcher with it.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
