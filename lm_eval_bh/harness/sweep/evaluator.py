"""One loaded model with its tasks and null model: experiments only change the routing."""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from lm_eval import evaluator, simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.utils import get_commit_from_path, get_git_commit_hash
from torch.utils import collect_env
from tqdm import tqdm

from lm_eval_bh.errors import DataError
from lm_eval_bh.harness.logs.log_options import LogOptions
from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.harness.plugin.registration import MODEL_NAME
from lm_eval_bh.harness.sweep.exact_bootstrap import exact_bootstrap
from lm_eval_bh.harness.sweep.sweep_config import Experiment, SweepConfig
from lm_eval_bh.harness.sweep.task_names import are_ours, new_task_manager
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.placement import placement
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.schema import shortened
from lm_eval_bh.threads import CoresWatch, use_threads_that_pay


class Evaluator:
    """Evaluates experiments of one sweep in turn, like the ``lm_eval`` command.

    Parameters
    ----------
    config : SweepConfig
        The settings of the sweep.
    experiments : sequence of Experiment
        The experiments; the model is loaded for one with a null model, if any needs one.
    device : str or None
        As in lm-eval.

    Raises
    ------
    BHError
        As ``hf-bh``; before the first experiment if a ``max_k`` is too large.
    """

    def __init__(
        self, config: SweepConfig, experiments: Sequence[Experiment], device: str | None = None
    ) -> None:
        self.config, self.device = config, device
        # Tests need a null model as well; the others need less.
        first = max(
            experiments,
            key=lambda e: (
                e.policy is None,
                METHODS[e.rule].tests,
                not METHODS[e.rule].fixed_count,
            ),
        )
        placement(device)  # unlike lm_eval, a sweep has no default device
        options = {"batch_size": config.batch_size, "device": device}
        self.lm = BHLM.create_from_arg_obj(config.model_args_of(first), options)
        use_threads_that_pay(self.lm.model)
        self._cores = CoresWatch()
        for experiment in experiments:
            config.routing_of(experiment).check_experts(self.lm.integration.num_experts)
        with quiet(logging.ERROR):  # custom data sets warn of irrelevant options
            self._manager = new_task_manager(
                defaults=not are_ours(config.tasks, config.include_path),
                include_path=config.include_path,
                metadata=config.model_args_of(first, routing=False),
            )
            self.tasks: dict[str, Any] = self._manager.load(list(config.tasks))["tasks"]
        self._metadata = {name: dict(task.config.metadata) for name, task in self.tasks.items()}

    @property
    def rank(self) -> int:
        """Rank of this process among those that evaluate together."""
        return int(self.lm.rank)

    def agree(self, value: Any) -> Any:
        """Return the first process's value on every process."""
        if self.lm.world_size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def run(self, experiment: Experiment, folder: Path) -> Path | None:
        """Evaluate one experiment and write its results into ``folder``.

        Returns
        -------
        Path or None
            ``results_*.json``; None on processes other than the first.

        Raises
        ------
        DataError
            If the results cannot be written.
        """
        detailed = self.config.log_routing in ("samples", "full")
        options = LogOptions(
            self.config.log_routing,
            str(folder / "routing") if detailed else None,
            self.config.log_samples,
        )
        self.lm.reroute(
            Policy.load(experiment.policy)
            if experiment.policy
            else self.config.routing_of(experiment),
            options,
        )
        model_args = self.config.model_args_of(experiment) | {
            name: value
            for name in ("log_routing", "log_dir", "log_samples")
            if (value := getattr(options, name)) is not None
        }
        task = self.tasks[experiment.task]
        # lm-eval passes the model's arguments to a task when loading it.
        task.set_config("metadata", self._metadata[experiment.task] | model_args)
        tracker = EvaluationTracker(output_path=str(folder))
        self._cores.start()
        with quiet(logging.WARNING), exact_bootstrap():
            results = simple_evaluate(
                self.lm,
                model_args=model_args,
                tasks=[task],
                device=self.device,
                evaluation_tracker=tracker,
                task_manager=self._manager,
                **self.config.evaluation_options,
            )
        self._cores.check()
        if results is None:
            return None
        # A folder gets this name, and a path can be longer than a folder name may be.
        general = tracker.general_config_tracker
        general.model_name_sanitized = shortened(general.model_name_sanitized)
        # The harness names a model that it did not create after its class.
        results["config"]["model"] = general.model_source = MODEL_NAME
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        tracker.save_results_samples(experiment.task, samples[experiment.task])
        return _written(folder, tracker.date_id, len(samples[experiment.task]))


def _written(folder: Path, date: str, documents: int) -> Path:
    """Return the results file after checking that all was written: the tracker only warns."""
    for file in folder.glob(f"*/results_{date}.json"):
        try:
            json.loads(file.read_text(encoding="utf-8"))
            lines = "".join(
                samples.read_text(encoding="utf-8")
                for samples in file.parent.glob(f"samples_*_{date}.jsonl")
            ).split("\n")
        except ValueError:
            break
        if len(lines) == documents + 1 and not lines[-1]:  # the last line is complete
            return file
    raise DataError(
        f"The results of an experiment could not be written to {folder}: "
        "free some space and run the same command again; finished experiments are kept."
    )


_environment = functools.cache(collect_env.get_pretty_env_info)


def _commit() -> str | None:
    """Return the harness's commit, without git's complaint outside of a repository."""
    return _commit_of(os.getcwd())


@functools.cache
def _commit_of(folder: str) -> str | None:
    """Return the commit of the current folder."""
    try:
        subprocess.run(["git", "rev-parse", "--verify", "HEAD"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return get_commit_from_path(folder)  # type: ignore[no-any-return]
    return get_git_commit_hash()  # type: ignore[no-any-return]


@contextmanager
def quiet(level: int) -> Iterator[None]:
    """Silence the harness: a sweep shows one bar, and one line per experiment.

    Also keep it from querying the machine, which takes a second per experiment, and the folder's
    commit, about which git complains.
    """
    logger = logging.getLogger("lm_eval")
    before, start, describe = logger.level, tqdm.__init__, collect_env.get_pretty_env_info

    def disabled(bar: Any, *args: Any, **options: Any) -> None:
        start(bar, *args, **options | {"disable": True})

    logger.setLevel(level)
    tqdm.__init__ = disabled
    collect_env.get_pretty_env_info = _environment
    evaluator.get_git_commit_hash = _commit
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = start
        collect_env.get_pretty_env_info = describe
        evaluator.get_git_commit_hash = get_git_commit_hash
        logger.setLevel(before)
