"""Sweeps from plan to table, for ``lm-eval-bh sweep`` and Python.

Only here the harness, which runs experiments, meets the analysis, which reads them.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.files import check_output
from lm_eval_bh.harness.preflight import check_run
from lm_eval_bh.harness.sweep.local import run_here
from lm_eval_bh.harness.sweep.sweep_config import Experiment, SweepConfig, shard_of
from lm_eval_bh.harness.sweep.sweep_folder import SweepFolder
from lm_eval_bh.harness.sweep.waiting import Say
from lm_eval_bh.resources import DEFAULT_MODEL, shipped
from lm_eval_bh.routing.parameters import canonical
from lm_eval_bh.schema import SCHEMA_VERSION, ExperimentSummary

if TYPE_CHECKING:
    import pandas as pd

    from lm_eval_bh.harness.sweep.evaluator import Evaluator


@dataclass(frozen=True)
class Plan:
    """The remaining work of a sweep.

    Attributes
    ----------
    folder : SweepFolder
    config : SweepConfig
    experiments : list of Experiment
        All experiments of this shard.
    missing : list of Experiment
        Experiments that still have to run.
    again : dict of Experiment to str
        Experiments that have run, and why their results do not count.
    """

    folder: SweepFolder
    config: SweepConfig
    experiments: list[Experiment]
    missing: list[Experiment]
    again: dict[Experiment, str]

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the finished experiments; None before the first."""
        done = self.folder.seconds(self.experiments)
        return statistics.mean(done) * len(self.missing) if done else None


def plan(
    config: SweepConfig, output_dir: Path | str, *, repeat: int = 1, shard: str | None = None
) -> Plan:
    """Find the experiments of a sweep that still have to run, without writing anything.

    Raises
    ------
    ParameterError
        If the shard or the number of repeats is invalid.
    DataError
        If the folder holds a sweep with other settings.
    BHError
        As a run before its weights load.
    """
    folder = SweepFolder(Path(output_dir), config)
    folder.check()
    experiments = config.experiments(repeat)
    routings = [config.routing_of(experiment) for experiment in experiments]
    check_run(config.pretrained, canonical(config.model_args), routings)
    if shard is not None:
        experiments = shard_of(experiments, shard)
    reasons = {experiment: folder.why_not_done(experiment) for experiment in experiments}
    missing = {experiment: why for experiment, why in reasons.items() if why is not None}
    again = {e: why for e, why in missing.items() if os.path.lexists(folder.summary(e))}
    return Plan(folder, config, experiments, list(missing), again)


def run(
    todo: Plan,
    *,
    device: str | None = None,
    ray: str | None = None,
    workers: int | None = None,
    say: Say | None = None,
    then: Callable[[Evaluator], None] | None = None,
) -> None:
    """Run the missing experiments of a sweep, with a progress bar and a line for each.

    Parameters
    ----------
    todo : Plan
    device : str or None
        As in lm-eval; None for CUDA if available.
    ray : str or None
        Address of a Ray cluster, or ``local``; None runs in this process.
    workers : int or None
        Number of workers of the Ray cluster.
    say : callable or None
        Receives the lines; None prints them above the bar.
    then : callable or None
        See :func:`~lm_eval_bh.harness.sweep.local.run_here`; not called on a Ray cluster.

    Raises
    ------
    BHError
        The error of an experiment. Finished ones are kept; the same call runs the others.
    """
    from tqdm.auto import tqdm

    if ray is None and workers is not None:
        raise ParameterError(f"workers={workers} has no meaning without --ray: leave it out.")
    first = first_process()
    if first:
        check_output(todo.folder.path, "output_dir", folder=True)
        todo.folder.claim()
    total = len(todo.experiments)
    numbers = itertools.count(total - len(todo.missing) + 1)
    with (
        _released_after_failure(todo.folder if first else None),
        tqdm(
            total=total,
            initial=total - len(todo.missing),
            unit="experiment",
            desc="sweep",
            disable=None if first else True,  # None: unless in a terminal
        ) as bar,
    ):
        tell = say or bar.write

        def meanwhile(text: str) -> None:  # stdout may be silenced for the harness
            if first:
                say(text) if say else bar.write(text, file=sys.stderr)

        for experiment, why in todo.again.items() if first else ():
            tell(f"{experiment.name} runs again: {why}.")

        def finished(experiment: Experiment, seconds: float) -> None:
            summary = summarize(todo.folder.run(experiment), experiment, seconds)
            todo.folder.claim()
            todo.folder.finish(experiment, summary)
            tell(f"[{next(numbers)}/{total}] {line(summary)}")
            bar.update()

        if ray is None:
            run_here(todo.config, todo.missing, todo.folder, finished, device, meanwhile, then)
        else:
            from lm_eval_bh.harness.sweep.cluster import run_on_ray

            run_on_ray(
                todo.config,
                todo.missing,
                todo.folder,
                finished,
                ray,
                workers,
                device,
                meanwhile,
            )


@contextmanager
def _released_after_failure(folder: SweepFolder | None) -> Iterator[None]:
    """Release a folder that was claimed in vain."""
    try:
        yield
    except BaseException:
        if folder is not None:
            folder.release()
        raise


def first_process() -> bool:
    """Return whether this process, of accelerate's or torchrun's, prints the output."""
    return int(os.environ.get("RANK", "0")) == 0


def summarize(folder: Path, experiment: Experiment, seconds: float) -> ExperimentSummary:
    """Return the summary of an experiment from its files.

    Raises
    ------
    DataError
        If its results are not complete.
    """
    from lm_eval_bh.analysis.table.experiments import load_experiments
    from lm_eval_bh.analysis.table.metrics import METRICS
    from lm_eval_bh.analysis.table.table_files import plain

    loaded = load_experiments([folder])
    if len(loaded.frame) != 1:
        found = "; ".join(map(str, loaded.problems)) or f"{len(loaded.frame)} results"
        raise DataError(
            f"{folder} must hold one finished experiment, not {found}; run the same command again."
        )
    row = loaded.frame.iloc[0]
    further = ["word_perplexity", "byte_perplexity", "target_perplexity", "accuracy"]
    further.append("evaluation_tokens_per_second")
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": str(row["run_id"]),
        "config": experiment.name,
        "strategy": experiment.rule,
        "k_or_max_k": experiment.max_k,
        "alpha": experiment.alpha,
        "num_experts": int(row["num_experts"]),
        "dataset": experiment.task,
        "metrics": {
            name: plain(row[name])
            for name in dict.fromkeys([*METRICS, "perplexity_of", *further, "avg_experts"])
        },
        "summary": {
            "total_samples": plain(row["documents"]),
            "total_tokens": plain(row["tokens"]),
            "elapsed_time_seconds": round(seconds, 3),
        },
    }


def line(summary: ExperimentSummary) -> str:
    """Return one line about a finished experiment."""
    metrics, seconds = summary["metrics"], summary["summary"]["elapsed_time_seconds"]
    names = {
        "word_perplexity": "word perplexity",
        "target_perplexity": "perplexity of the target",
        "accuracy": "accuracy",
        "avg_experts": "mean experts",
    }
    shown = [
        f"{label} {value:,.{3 if abs(value) < 1000 else 0}f}"
        for name, label in names.items()
        if isinstance(value := metrics.get(name), (int, float))
    ]
    return f"{summary['config']}: {', '.join(shown)} ({seconds:.1f} s)"


class BHRoutingExperimentRunner:
    """The two-phase experiment in Python: top-k baselines, then BH over alpha and max_k.

    Parameters
    ----------
    model_name : str
        Hub name or folder of the model, ``tiny-olmoe`` or ``tiny-glm``.
    device : str or None
        As in lm-eval; None for CUDA if available, else the CPU.
    output_dir : str or Path
        Folder of the sweep; experiments that are in it do not run again.
    **settings
        Further settings of :class:`~lm_eval_bh.harness.sweep.sweep_config.SweepConfig`, such as
        ``batch_size=8`` or ``seed=1``.

    Examples
    --------
    ::

        runner = BHRoutingExperimentRunner("tiny-olmoe", "cpu", "runs/two_phase")
        frame = runner.run_two_phase_experiment([8], [8], [0.4, 0.5], ["demo_lambada"], 50)
    """

    def __init__(
        self,
        model_name: str = DEFAULT_MODEL,
        device: str | None = None,
        output_dir: str | Path = "runs/two_phase",
        **settings: Any,
    ) -> None:
        self.model_name = model_name
        self.device = device
        self.output_dir = Path(output_dir)
        self.settings = settings

    def run_two_phase_experiment(
        self,
        baseline_k_values: Sequence[int] = (8, 16, 32, 64),
        bh_max_k_values: Sequence[int] = (8, 16, 32, 64),
        bh_alpha_values: Sequence[float] = (0.3, 0.4, 0.5, 0.6),
        datasets: Sequence[str] = ("wikitext", "lambada", "hellaswag"),
        max_samples: int | None = 200,
    ) -> pd.DataFrame:
        """Run the missing experiments, and return one row per experiment.

        Parameters
        ----------
        baseline_k_values, bh_max_k_values, bh_alpha_values
            The grid.
        datasets : sequence of str
            Data sets of this package's tasks ("wikitext" is ``bh_wikitext``), or tasks.
        max_samples : int or None
            Documents per task; None for all.

        Returns
        -------
        DataFrame
            See :func:`~lm_eval_bh.analysis.table.experiments.load_experiments`.

        Raises
        ------
        BHError
            As :func:`run`.
        """
        from lm_eval_bh.analysis.table.experiments import load_experiments

        ours = {path.stem for path in shipped("tasks").glob("bh_*.yaml")}
        config = SweepConfig(
            pretrained=self.model_name,
            tasks=tuple(f"bh_{name}" if f"bh_{name}" in ours else name for name in datasets),
            baselines=tuple(baseline_k_values),
            max_k=tuple(bh_max_k_values),
            alphas=tuple(bh_alpha_values),
            limit=max_samples,
            **self.settings,
        )
        run(plan(config, self.output_dir), device=self.device)
        return load_experiments([self.output_dir]).frame
