"""The settings of a sweep, their sources, and the experiments that they define."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.experiment_names import LONGEST_NAME
from lm_eval_bh.harness.arguments import ROUTING_ARGUMENTS, arguments_of, routing_config
from lm_eval_bh.harness.logs.log_options import LogOptions
from lm_eval_bh.harness.sweep.settings_file import plain_value, read_settings
from lm_eval_bh.harness.sweep.task_names import expand_tasks
from lm_eval_bh.resources import DEFAULT_MODEL, TINY_OLMOE
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.schema import dataset_name, experiment_name, shortened

# Names that model_args may not hold: they differ by experiment or have own options.
SET_BY_THE_SWEEP = (
    "pretrained",
    "rule",
    "alpha",
    "max_k",
    "target_experts",
    "policy",
    "log_routing",
    "log_dir",
    "log_samples",
    "log_logits",
    "batch_size",
    "device",
)

GRID = ("tasks", "baselines", "alphas", "max_k", "rules", "policies")  # defines the experiments
LOGGED = 8  # documents per task whose routing is logged as JSON, by default

# The prototype's grid of sixty experiments. The other presets also have small static top-k, so that
# every mean has its control.
SEEDS: dict[str, Any] = {
    "pretrained": DEFAULT_MODEL,
    "tasks": ["bh_suite"],
    "baselines": [8, 16, 32, 64],
    "max_k": [8, 16, 32, 64],
    "alphas": [0.3, 0.4, 0.5, 0.6],
    "limit": 200,
}
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "pretrained": TINY_OLMOE,
        "tasks": ["bh_demo"],
        "baselines": [2, 4, 8],
        "max_k": [8],
        "alphas": [0.4, 0.5],
        "policies": [TINY_OLMOE],
    },
    "full": SEEDS | {"baselines": [2, 3, 4, 5, 6, 7, 8, 16, 32, 64]},
    "seeds": SEEDS,
}


@dataclass(frozen=True)
class Experiment:
    """One routing configuration on one task; repetitions differ in ``repeat``.

    Attributes
    ----------
    rule : str
    max_k : int
    alpha : float or None
        None for a rule without a level.
    task : str
        A task of lm-eval.
    repeat : int
        1 for the first run.
    policy : str or None
        A policy file, or the name of a shipped policy.
    digest : str
        Digest of the policy, so that another policy of the same name is another experiment.
    """

    rule: str
    max_k: int
    alpha: float | None
    task: str
    repeat: int = 1
    policy: str | None = None
    digest: str = ""

    @property
    def name(self) -> str:
        """The name of its folder and logs, such as ``8experts_bh_a040_wikitext``."""
        name = experiment_name(self.rule, self.max_k, self.alpha, self.task)
        if self.policy is not None:
            stem = re.sub(r"[^A-Za-z0-9.-]+", "_", Path(self.policy).stem)
            of_task = dataset_name(self.task)
            name = shortened(f"{self.max_k}experts_policy_{stem}_{self.digest}_{of_task}")
        return name if self.repeat == 1 else f"{name}_repeat{self.repeat}"

    @property
    def routing(self) -> dict[str, Any]:
        """Its part of ``--model_args``."""
        if self.policy is not None:
            return {"policy": self.policy}
        if self.alpha is None:
            return {"rule": self.rule, "max_k": self.max_k}
        rule = {} if self.rule == "bh" else {"rule": self.rule}
        return {"alpha": self.alpha, "max_k": self.max_k, **rule}


@dataclass(frozen=True)
class SweepConfig:
    """The settings of a sweep; a YAML file has the same keys. All are checked here.

    Attributes
    ----------
    pretrained : str
        Hub name or folder of the model, ``tiny-olmoe`` or ``tiny-glm``.
    tasks : tuple of str
        Tasks and tags of lm-eval; tags are replaced by their tasks.
    baselines : tuple of int
        Every k of phase 1, static top-k.
    alphas, max_k, rules
        Phase 2 is their product; ``max_k`` times ``rules`` for rules without a level.
    policies : tuple of str
        Policy files, and names of shipped policies: each is another configuration.
    limit : int or None
        Documents per task; None for all.
    batch_size : int or str
        As in lm-eval.
    seed : int or None
        All of lm-eval's seeds; None for lm-eval's own.
    log_routing, log_samples
        See ``LogOptions``. Eight documents per task by default: an article of WikiText has
        thousands of tokens, and 60 experiments add up.
    model_args : dict
        Further arguments of ``hf-bh``, equal for all experiments.
    include_path : str or None
        A folder of further tasks, as in ``lm_eval --include_path``.

    Raises
    ------
    ParameterError
        If a value is out of range, named twice or unknown, or if no experiment is left.
    """

    pretrained: str = DEFAULT_MODEL
    tasks: tuple[str, ...] = ()
    baselines: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    max_k: tuple[int, ...] = ()
    rules: tuple[str, ...] = ("bh",)
    policies: tuple[str, ...] = ()
    limit: int | None = None
    batch_size: int | str = 8
    seed: int | None = None
    log_routing: str = "samples"
    log_samples: int | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    include_path: str | None = None

    def __post_init__(self) -> None:
        for name in GRID:
            given = getattr(self, name)
            given = [given] if isinstance(given, str | int | float) else list(given or ())
            if wrong := [value for value in given if not isinstance(value, str | int | float)]:
                raise ParameterError(
                    f"{name} must be a list of values, as in [8, 16], not hold {wrong[0]!r}."
                )
            if name in ("tasks", "rules", "policies"):
                given = [str(value) for value in given]
            for value, times in Counter(given).items():
                if times > 1:
                    raise ParameterError(f"{name} names {value} {times} times: name it once.")
            object.__setattr__(self, name, tuple(given))
        if self.log_samples is None and self.log_routing in ("samples", "full"):
            object.__setattr__(self, "log_samples", LOGGED)
        self._check()
        object.__setattr__(self, "tasks", tuple(expand_tasks(self.tasks, self.include_path)))
        if long := [task for task in self.tasks if len(task.encode()) > LONGEST_NAME]:
            raise ParameterError(
                f"The task {long[0]!r:.80} has a name of {len(long[0].encode())} bytes: file names "
                f"allow {LONGEST_NAME} at most."
            )

    def _check(self) -> None:
        if self.limit is not None and (not _is_integer(self.limit) or self.limit < 1):
            raise ParameterError(
                f"limit must be an integer number of documents, 1 or more: found {self.limit!r}; "
                "leave it out for all."
            )
        if self.batch_size != "auto" and (not _is_integer(self.batch_size) or self.batch_size < 1):  # type: ignore[operator]
            raise ParameterError(
                f"batch_size must be a positive integer or auto: found {self.batch_size!r}."
            )
        if self.seed is not None and not (_is_integer(self.seed) and 0 <= self.seed < 2**32):
            raise ParameterError(
                f"seed must be an integer from 0 to {2**32 - 1}: found {self.seed!r}."
            )
        if not isinstance(self.model_args, Mapping):
            raise ParameterError(
                f"model_args must be names with values, such as {{dtype: float32}}: "
                f"found {self.model_args!r}."
            )
        for name, value in self.model_args.items():
            if not (isinstance(name, str) and plain_value(value)):
                raise ParameterError(
                    f"model_args sets {name!r:.80} to {value!r:.80}: give text, a number, or a "
                    "flat list of them."
                )
        for name in SET_BY_THE_SWEEP:
            if name in self.model_args:
                raise ParameterError(
                    f"model_args sets {name}, which the sweep sets for each experiment: "
                    "leave it out, and use the option of its name where there is one."
                )
        if self.include_path is not None and not isinstance(self.include_path, str):
            raise ParameterError(
                f"include_path must be the name of a folder: found {self.include_path!r:.80}."
            )
        if not self.tasks:
            raise ParameterError("The sweep has no task: give --tasks, for example bh_demo.")
        if not self.configurations and not self.policies:
            raise ParameterError(
                "The grid is empty: give --baselines, or --max-k with --alphas, or --policies, or "
                "a --preset."
            )
        folder = "." if self.log_routing in ("samples", "full") else None
        LogOptions(self.log_routing, folder, self.log_samples)
        for experiment in self._of_each_configuration:
            self.routing_of(experiment)

    def model_args_of(self, experiment: Experiment, routing: bool = True) -> dict[str, Any]:
        """Return the ``--model_args`` of an experiment, without logs.

        Without ``routing``, those that all experiments have in common.
        """
        common = arguments_of(experiment.rule, self.model_args)
        if not routing or experiment.policy is not None:
            common = {
                name: value for name, value in common.items() if name not in ROUTING_ARGUMENTS
            }
        if not routing:
            return {"pretrained": self.pretrained, **common}
        return {"pretrained": self.pretrained, **experiment.routing, **common}

    def routing_of(self, experiment: Experiment) -> RoutingConfig:
        """Return the routing configuration of an experiment."""
        if experiment.policy is not None:
            return Policy.load(experiment.policy).config
        given = self.model_args_of(experiment).items()
        return routing_config({name: value for name, value in given if name in ROUTING_ARGUMENTS})

    @property
    def configurations(self) -> list[tuple[str, int, float | None]]:
        """All (rule, max_k, alpha), baselines first, without the policies."""
        found: list[tuple[str, int, float | None]] = [("topk", k, None) for k in self.baselines]
        for rule in self.rules:
            if rule not in METHODS:
                raise ParameterError(
                    f"rule must be one of {', '.join(METHODS)}: found {rule!r}"
                    f"{did_you_mean(rule, METHODS)}."
                )
            levels: Sequence[float | None] = [None] if METHODS[rule].fixed_count else self.alphas
            found += [(rule, k, level) for k in self.max_k for level in levels]
        return list(dict.fromkeys(found))

    @property
    def _of_each_configuration(self) -> list[Experiment]:
        """One experiment per configuration, without task; policies come last."""
        found = [Experiment(*configuration, "") for configuration in self.configurations]
        for name in self.policies:
            policy = Policy.load(name)
            rule, max_k = policy.config.rule, policy.config.max_k
            found.append(Experiment(rule, max_k, None, "", policy=name, digest=policy.digest()[:8]))
        return found

    def experiments(self, repeats: int = 1) -> list[Experiment]:
        """Return all experiments in the order in which they run: complete rounds of repeats."""
        if not _is_integer(repeats) or repeats < 1:
            raise ParameterError(
                f"repeat must be an integer number of runs, 1 or more: found {repeats!r}."
            )
        found = [
            dataclasses.replace(configured, task=task, repeat=repeat)
            for repeat in range(1, repeats + 1)
            for configured in self._of_each_configuration
            for task in self.tasks
        ]
        names = Counter(experiment.name for experiment in found)
        if twice := [name for name, times in names.items() if times > 1]:
            raise ParameterError(
                f"Two experiments would be called {twice[0]}: "
                "run tasks of the same data set in separate sweeps."
            )
        return found

    @property
    def evaluation_options(self) -> dict[str, Any]:
        """The options that the ``lm_eval`` command passes to the evaluation, with their types."""
        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        seeds = {} if self.seed is None else dict.fromkeys(names, self.seed)
        return {
            "limit": None if self.limit is None else float(self.limit),
            "batch_size": str(self.batch_size),
            "gen_kwargs": {},
            "fewshot_as_multiturn": None,
            **seeds,
        }

    def as_dict(self, grid: bool = True) -> dict[str, Any]:
        """Return the settings as plain values for ``sweep.json``.

        Without the ``grid``, those on which every experiment depends.
        """
        settings = dataclasses.asdict(self).items()
        chosen = {name: value for name, value in settings if grid or name not in GRID}
        return json.loads(json.dumps(chosen))  # type: ignore[no-any-return]

    @classmethod
    def gather(
        cls,
        preset: str | None = None,
        file: Path | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> SweepConfig:
        """Combine settings: flags that are not None override a YAML file, which overrides a preset.

        Raises
        ------
        ParameterError
            If the preset or a key of the file is unknown, or the file cannot be read.
        """
        settings: dict[str, Any] = {}
        from_file: dict[str, Any] = {} if file is None else {**read_settings(file)}
        in_file = from_file.pop("preset", None)
        preset = preset or in_file
        if preset is not None:
            if preset not in PRESETS:
                raise ParameterError(
                    f"preset {preset!r} is unknown: use one of {', '.join(PRESETS)}"
                    f"{did_you_mean(str(preset), PRESETS)}."
                )
            settings |= PRESETS[preset]
        settings |= from_file
        settings |= {name: value for name, value in (flags or {}).items() if value is not None}
        return cls(**settings)


def completed(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return an earlier release's settings, completed by defaults."""
    found: dict[str, Any] = {"model_args": {}}
    for setting in dataclasses.fields(SweepConfig):
        if setting.default is not dataclasses.MISSING:
            plain = setting.default
            found[setting.name] = list(plain) if isinstance(plain, tuple) else plain
    found |= recorded
    if found["log_samples"] is None and found["log_routing"] in ("samples", "full"):
        found["log_samples"] = LOGGED
    return found


def shard_of(experiments: Sequence[Experiment], shard: str) -> list[Experiment]:
    """Return the experiments of shard ``i/n``, i from 1 to n: every n-th, for balance.

    Raises
    ------
    ParameterError
        If it does not have that form, or i is not in 1 to n.
    """
    position, _, shards = shard.partition("/")
    if not (position.isdecimal() and shards.isdecimal() and 1 <= int(position) <= int(shards)):
        raise ParameterError(
            f"invalid shard {shard!r}: use i/n with i from 1 to n, for example 1/4."
        )
    return list(experiments[int(position) - 1 :: int(shards)])


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
