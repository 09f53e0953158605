"""Runs the experiments of a sweep in this process, or in all of accelerate's."""

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
        Experiments to run now, except those that another process runs or has run meanwhile; the
        first of several processes decides.
    folder : SweepFolder
        The sweep's folder.
    finished : callable
        Called on the first process with every experiment and its seconds, after its results have
        been written.
    device : str or None
        As in lm-eval.
    say : callable
        Takes a line once a minute.
    then : callable or None
        Called at the end with the model, which is loaded for it if no experiment was left.
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
            evaluator.agree(None)  # no process writes before it is cleared
            start = time.perf_counter()
            with saying(experiment.name, say) if evaluator.rank == 0 else nullcontext():
                evaluator.run(experiment, folder.run(experiment))
            if evaluator.rank == 0:
                finished(experiment, time.perf_counter() - start)
    if then is not None:
        then(evaluator)
    evaluator.agree(None)  # no process leaves while the first still writes


def end_processes() -> None:
    """End accelerate's process group, just before this process ends.

    Otherwise its threads sometimes outlive the interpreter, which aborts a process that has
    finished, and the launcher with it.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
