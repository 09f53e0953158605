"""Reads folders of finished experiments into one tidy table.

An experiment is one run of lm-eval on one task. Its row joins what the harness measured
(``results_*.json`` and, with ``--log_samples``, ``samples_<task>_*.jsonl``) with what routing did
(``config.bh`` in the same file, and the log folder of that run id where there is one).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_bh.analysis import metrics
from lm_eval_bh.analysis.flops import Architecture
from lm_eval_bh.analysis.significance import PERPLEXITIES, matched_budget
from lm_eval_bh.errors import DataError
from lm_eval_bh.files import replacing
from lm_eval_bh.schema import (
    INTERNAL_ROUTING,
    MANIFEST,
    InternalRouting,
    RunInfo,
    TaskSummary,
    dataset_name,
    experiment_name,
    read_internal_routing,
    read_json,
    read_manifest,
    read_run_info,
)

TABLE = "bh_routing_results"

# Rules that give every token max_k experts, whatever its logits.
FIXED_COUNT = ("topk", "random_k")
RULE_LABELS = {"bh": "BH", "by": "BY", "holm": "Holm", "hochberg": "Hochberg"} | {
    "bonferroni": "Bonferroni",
    "top_p": "top-p",
    "min_p": "min-p",
}

# An accuracy of the harness, the one to speak of first: acc_norm allows for the endings' lengths.
ACCURACIES = ("acc_norm", "acc", "exact_match")

_FLOAT, _INT, _TEXT, _BOOL = "float64", "Int64", "object", "bool"
COLUMNS: dict[str, str] = {
    "run_id": _TEXT,
    "file": _TEXT,
    "group": "int64",
    "model": _TEXT,
    "task": _TEXT,
    "dataset": _TEXT,
    "rule": _TEXT,
    "alpha": _FLOAT,
    "min_k": _INT,
    "max_k": _INT,
    "strategy": _TEXT,
    "baseline": _BOOL,  # plain static top-k: what adaptive rules are compared with
    "adaptive": _BOOL,  # whether the number of experts depends on the token
    "mode": _TEXT,
    "configuration": _TEXT,  # equal for two runs of the same routing
    "native_top_k": _INT,
    "num_experts": _INT,
    "limit": _FLOAT,
    "num_fewshot": _INT,
    "documents": _INT,
    "tokens": _INT,
    "seconds": _FLOAT,
    "cached_requests": _INT,
    "mean_experts": _FLOAT,  # over the routed layers
    "std_experts": _FLOAT,
    "mean_experts_model": _FLOAT,  # over all layers; those that are not routed take the model's k
    "would_select_mean_experts": _FLOAT,  # with mode=analyze, where the model's own k served
    "word_perplexity": _FLOAT,
    "word_perplexity_stderr": _FLOAT,
    "byte_perplexity": _FLOAT,
    "byte_perplexity_stderr": _FLOAT,
    "target_perplexity": _FLOAT,  # the harness's "perplexity" of LAMBADA: a whole word each
    "target_perplexity_stderr": _FLOAT,
    "acc": _FLOAT,
    "acc_stderr": _FLOAT,
    "acc_norm": _FLOAT,
    "acc_norm_stderr": _FLOAT,
    "accuracy": _FLOAT,  # the first of ACCURACIES that the task has
    "accuracy_stderr": _FLOAT,
    **dict.fromkeys(metrics.METRICS, _FLOAT),
    "adaptive_range": _INT,
    "context_length": _INT,  # that FLOPs are counted at
    "matched_metric": _TEXT,
    "matched_perplexity": _FLOAT,
    "matched_accuracy": _FLOAT,
    "matched_by": _TEXT,
    "matched_k_low": _INT,
    "matched_k_high": _INT,
}
LAYER_COLUMNS = ("run_id", "task", "group", "layer", "tokens", "mean", "std", "usage", "histogram")

# Stands beside adaptive rows even where it is empty: nobody shall forget to ask.
STATIC = ("matched_perplexity", "matched_accuracy", "matched_by")

# What Markdown and LaTeX show; CSV and JSON hold everything.
READABLE = {
    "group": "group",
    "task": "task",
    "strategy": "strategy",
    "mean_experts": "experts",
    "perplexity": "token ppl",
    "word_perplexity": "word ppl",
    "target_perplexity": "target ppl",
    "accuracy": "accuracy",
    "matched_perplexity": "ppl of top-k at equal experts",
    "matched_accuracy": "accuracy of top-k at equal experts",
    "matched_by": "how",
    "flops_reduction_pct": "FLOPs saved (%)",
    "tokens_per_second": "tokens/s",
    "ceiling_hit_rate": "ceiling (%)",
    "floor_hit_rate": "floor (%)",
    "gini_coefficient": "Gini",
}

SHOWN_DIFFERENCES = 5  # files that a refusal names

# What reading a JSON file of another shape than expected raises.
_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)

# How lm-eval ends the names of its files: with the time.
_DATED = re.compile(r"_(\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?)\.json$")

# The head of a sample in an internal routing log; the rest of the sample may be a million numbers.
_SAMPLE_HEAD = re.compile(
    rb'"sample_id": (\d+), "request": (\d+), "repeat": \d+, "num_tokens": \d+, '
    rb'"token_ids": \[[^\]]*\], '
    rb'"loss": ([^,]+),'
)


@dataclass(frozen=True)
class Group:
    """Files that may be compared with each other.

    Attributes
    ----------
    number : int
        From 1; the column ``group``.
    files : tuple of Path
        Its files.
    settings : dict
        What its first file was evaluated with: limit, versions, hashes, model, few-shot settings.
    """

    number: int
    files: tuple[Path, ...]
    settings: dict[str, Any]


@dataclass
class Loaded:
    """Experiments as tables.

    Attributes
    ----------
    frame : DataFrame
        One row an experiment (run and task), with the columns :data:`COLUMNS`; null where something
        was not measured.
    layers : DataFrame
        One row an experiment and routed layer, with the columns :data:`LAYER_COLUMNS`: mean and
        standard deviation of the experts per token; ``usage`` and ``histogram`` are lists of int.
    problems : list of (Path, str)
        Files that are broken or incomplete and were left out, each with what to do.
    notes : list of (Path, str)
        What a reader of the tables should know about files that were not left out.
    groups : list of Group
        One, unless files that cannot be compared were kept apart.
    """

    frame: pd.DataFrame
    layers: pd.DataFrame
    problems: list[tuple[Path, str]]
    notes: list[tuple[Path, str]]
    groups: list[Group]
    _runs: dict[str, _Run] = field(default_factory=dict, repr=False)
    _documents: dict[tuple[str, str], pd.DataFrame | None] = field(default_factory=dict, repr=False)

    def documents(self, run_id: str, task: str) -> pd.DataFrame | None:
        """Return what the harness logged for each document of an experiment, or None.

        Returns
        -------
        DataFrame or None
            Indexed by ``doc_id``, with the columns ``hash`` (document, prompt and target),
            ``output`` (the responses as JSON) and, where the task has them, ``loglikelihood``
            (nats) with ``words``, ``bytes``, ``targets`` and ``tokens`` (scored; only if a routing
            log tells), ``acc``, ``acc_norm``, ``exact_match``. None without ``--log_samples``.
        """
        key = run_id, task
        if key not in self._documents:
            self._documents[key] = None
            path = self._runs[run_id].samples_file(task)
            if path is not None:
                try:
                    self._documents[key] = read_documents(path, self._runs[run_id].documents(task))
                except DataError as error:
                    self.problems.append((path, str(error)))
        return self._documents[key]

    def internal_routing_file(self, run_id: str, task: str) -> Path | None:
        """Return the path of an experiment's internal routing log; None if there is none."""
        return self._runs[run_id].internal_routing_file(task)

    def log_folder(self, run_id: str) -> Path | None:
        """Return the finished log folder of a run, which may hold token logs; None without one."""
        return self._runs[run_id].log_folder


@dataclass
class _Run:
    """One results file of the harness."""

    file: Path
    content: dict[str, Any]
    info: RunInfo | None
    run_id: str
    fingerprint: str  # of the file's bytes
    log_folder: Path | None = None
    log_files: tuple[str, ...] = ()

    @classmethod
    def read(cls, file: Path) -> _Run:
        content = read_json(file)
        if not isinstance(content.get("results"), dict) or not content["results"]:
            raise DataError(f"{file} holds no results: run the evaluation again.")
        if not isinstance(content.get("config"), dict):
            raise DataError(f"{file} holds no configuration: run the evaluation again.")
        fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()
        info = read_run_info(content, str(file))
        run_id = info["run_id"] if info else f"hf-{fingerprint[:12]}"
        return cls(file, content, info, run_id, fingerprint)

    def check(self) -> None:
        """Raise whatever reading the file will raise, if it lacks something or has it wrong."""
        self.settings()
        for task in self.tasks:
            self.task_settings(task)
            _row(self, task, self.info, None)
            _layer_rows(self.summary(task))

    @property
    def tasks(self) -> list[str]:
        """The tasks evaluated; the sums of groups of tasks are no experiments."""
        known = self.content.get("configs") or self.content["results"]
        return sorted(task for task in self.content["results"] if task in known)

    @property
    def model(self) -> str:
        """The hub name, or the last part of a path."""
        config = self.content["config"]
        arguments = config.get("model_args") or {}
        if isinstance(arguments, str):
            pairs = (part.partition("=") for part in arguments.split(","))
            arguments = {name.strip(): value for name, _, value in pairs}
        name = str(
            arguments.get("pretrained") or self.content.get("model_name") or config.get("model")
        )
        return Path(name).name if name.startswith(("/", ".", "~")) else name

    def of_task(self, table: str, task: str) -> Any:
        """Return what one of the harness's tables has for a task, or None."""
        return (self.content.get(table) or {}).get(task)

    def documents(self, task: str) -> int | None:
        """Return how many documents of a task were evaluated."""
        counted = (self.of_task("n-samples", task) or {}).get("effective")
        if counted is None:
            counted = self.content["results"][task].get("sample_len")
        return None if counted is None else int(counted)

    def summary(self, task: str) -> TaskSummary | None:
        """Return what routing did for a task; None if that was not logged."""
        summary = self.info["summary"] if self.info else None
        found = summary["tasks"].get(task) if summary else None
        return found if found and found["tokens"] else None

    @property
    def cached_requests(self) -> int | None:
        """How many requests left no trace in the routing summary; None without one."""
        summary = self.info["summary"] if self.info else None
        return summary["cached_requests"] if summary else None

    def samples_file(self, task: str) -> Path | None:
        """Return the file of what the harness logged for each document, if it exists."""
        dated = _DATED.search(self.file.name)
        path = self.file.with_name(f"samples_{task}_{dated[1]}.jsonl") if dated else None
        return path if path and path.is_file() else None

    def internal_routing_file(self, task: str) -> Path | None:
        if self.log_folder is None or self.info is None:
            return None
        config = self.info["config"]
        alpha = None if config["rule"] in FIXED_COUNT else config["alpha"]
        name = experiment_name(config["rule"], config["max_k"], alpha, task) + INTERNAL_ROUTING
        return self.log_folder / name if name in self.log_files else None

    def find_log(self, manifests: Mapping[str, Path]) -> DataError | None:
        """Look for the log folder; return an error if it is there but incomplete."""
        if self.info is None or not self.info["log_dir"]:
            return None
        places = [self.file.parent, *self.file.parent.parents, Path()]
        candidates = [place / self.info["log_dir"] / self.run_id for place in places]
        if self.run_id in manifests:
            candidates.insert(0, manifests[self.run_id])
        folder = next((folder for folder in candidates if folder.is_dir()), None)
        if folder is None:
            return None
        try:
            self.log_files = tuple(read_manifest(folder)["files"])
        except DataError as error:
            return error
        self.log_folder = folder
        return None

    def settings(self) -> dict[str, Any]:
        """Return what must be equal for the model's sake."""
        config, info = self.content["config"], self.info
        null = (info["null_model"] if info else None) or {}
        return {
            "model": self.model,
            "number of parameters": config.get("model_num_parameters"),
            "dtype": config.get("model_dtype"),
            "commit of the model": config.get("model_sha") or None,
            "fingerprint of the routers": null.get("fingerprint"),
            "max_length": self.content.get("max_length"),
            "system instruction": self.content.get("system_instruction_sha") or "none",
            "chat template": self.content.get("chat_template_sha") or "none",
            # Without a template it changes nothing, and lm-eval's defaults for it differ.
            "fewshot_as_multiturn": bool(self.content.get("fewshot_as_multiturn"))
            if self.content.get("chat_template_sha")
            else None,
        }

    def task_settings(self, task: str) -> dict[str, Any]:
        """Return what must be equal for a task's sake."""
        config = self.content["config"]
        counted = self.of_task("n-samples", task)
        shots = self.of_task("n-shot", task)
        return {
            # What came of it, where that is told: a limit above the number of documents is none.
            "limit": f"{counted['effective']} of {counted['original']} documents"
            if counted
            else str(config.get("limit")),
            "version": self.of_task("versions", task),
            "hash": self.of_task("task_hashes", task),
            "num_fewshot": shots,
            "fewshot_seed": config.get("fewshot_seed") if shots else None,
            "gen_kwargs": str(config.get("gen_kwargs") or "none"),
        }


def load_experiments(
    folders: Iterable[Path | str], *, force: bool = False, context_length: int | None = None
) -> Loaded:
    """Read all experiments in and below some folders.

    Parameters
    ----------
    folders : iterable of Path or str
        Where ``lm_eval --output_path`` or a sweep wrote, with ``--model hf-bh`` or, for baselines,
        ``--model hf``; single results files too.
    force : bool
        Keep experiments that cannot be compared apart, in groups, instead of refusing them.
    context_length : int, optional
        How many positions a token attends to, for the count of FLOPs. By default the longest window
        that the run allowed, which rather understates what fewer experts save.

    Raises
    ------
    DataError
        If a folder does not exist, if there are no results, or, without ``force``, if files differ
        in limit, task version, task hash, model or few-shot settings.
    """
    roots = [Path(folder) for folder in folders]
    files, manifests = _scan(roots)
    if not files:
        raise DataError(
            f"There is no results_*.json below {', '.join(map(str, roots))}: "
            "run lm_eval with --output_path, or name the folder that it was given."
        )
    loaded = Loaded(pd.DataFrame(), pd.DataFrame(), [], [], [])
    runs = list(_read_runs(files, manifests, loaded))
    loaded._runs = {run.run_id: run for run in runs}
    loaded.groups = _group(runs, loaded)
    if len(loaded.groups) > 1 and not force:
        raise DataError(_difference(runs, loaded))
    group_of = {file: group.number for group in loaded.groups for file in group.files}

    models = {run.model: run.info for run in runs if run.info is not None}
    rows, layers = [], []
    for run in runs:
        for task in run.tasks:
            common = {"run_id": run.run_id, "task": task, "group": group_of[run.file]}
            rows.append(_row(run, task, models.get(run.model), context_length) | common)
            layers += [common | layer for layer in _layer_rows(run.summary(task))]
    _add_token_perplexity(rows, loaded)
    _add_average_accuracy(rows)
    _add_stability(rows, loaded)
    rows.sort(key=_order)
    loaded.frame = _typed(rows)
    for name, column in matched_budget(loaded.frame).items():
        loaded.frame[name] = column.astype(COLUMNS[str(name)])
    number = {(row["run_id"], row["task"]): i for i, row in enumerate(rows)}
    layers.sort(key=lambda layer: (number[layer["run_id"], layer["task"]], layer["layer"]))
    loaded.layers = pd.DataFrame(layers, columns=list(LAYER_COLUMNS))
    return loaded


def _scan(folders: Sequence[Path]) -> tuple[list[Path], dict[str, Path]]:
    """Return (results files, run id -> log folder), each in the order of their paths."""
    files: set[Path] = set()
    manifests: dict[str, Path] = {}
    for folder in folders:
        if folder.is_file():
            files.add(folder)
        elif not folder.is_dir():
            raise DataError(f"There is no folder {folder}: name one that lm_eval has written to.")
        for parent, children, names in os.walk(folder):
            children.sort()
            for name in names:
                if name == MANIFEST:
                    manifests.setdefault(Path(parent).name, Path(parent))
                elif name.endswith(".json") and (
                    name.startswith("results_") or _DATED.search(name)
                ):
                    files.add(Path(parent) / name)
    return sorted(files, key=lambda file: file.as_posix()), manifests


def _read_runs(
    files: Iterable[Path], manifests: Mapping[str, Path], loaded: Loaded
) -> Iterator[_Run]:
    """Yield the runs that are complete; note down the others."""
    seen: dict[str, _Run] = {}
    for file in files:
        try:
            run = _Run.read(file)
            run.check()
        except (DataError, *_MALFORMED) as error:
            sentence = f"{file} is damaged ({error!r}): run the evaluation again."
            loaded.problems.append((file, str(error) if isinstance(error, DataError) else sentence))
            continue
        if run.run_id in seen:
            first = seen[run.run_id]
            if first.fingerprint == run.fingerprint:
                loaded.notes.append((file, f"{file} is a copy of {first.file}: it is read once."))
            else:
                sentence = (
                    f"{file} has the run id {run.run_id} of {first.file}, so their routing logs "
                    "cannot be told apart: run the evaluation again."
                )
                loaded.problems.append((file, sentence))
            continue
        if problem := run.find_log(manifests):
            loaded.problems.append((file, str(problem)))
        if run.info and run.info["log_dir"] and not (problem or run.log_folder):
            sentence = (
                f"The routing log of {file} is not in {run.info['log_dir']}: "
                "name the folder that it was moved to as well."
            )
            loaded.notes.append((file, sentence))
        if cached := run.cached_requests:
            sentence = (
                f"{cached} requests of {file} came from a cache: "
                "its routing numbers are of the others only."
            )
            loaded.notes.append((file, sentence))
        seen[run.run_id] = run
        yield run


def _group(runs: Sequence[_Run], loaded: Loaded) -> list[Group]:
    """Put each file into the first group that it differs from in nothing."""
    members: list[list[_Run]] = []
    for run in runs:
        for group in members:
            if not any(_conflicts(other, run, loaded) for other in group):
                group.append(run)
                break
        else:
            members.append([run])
    return [
        Group(
            number,
            tuple(run.file for run in group),
            group[0].settings() | {t: group[0].task_settings(t) for t in group[0].tasks},
        )
        for number, group in enumerate(members, start=1)
    ]


def _conflicts(first: _Run, second: _Run, loaded: Loaded) -> list[str]:
    """Say in what two files differ; what one of them does not tell is no difference."""
    found = _differing(first.settings(), second.settings())
    for task in sorted(set(first.tasks) & set(second.tasks)):
        differing = _differing(first.task_settings(task), second.task_settings(task))
        if "hash" in differing and _same_documents(first, second, task, loaded):
            del differing["hash"]
        found |= {f"{name} of {task}": values for name, values in differing.items()}
    return [f"{name} {one} and {other}" for name, (one, other) in found.items()]


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (value, second[name])
        for name, value in first.items()
        if value is not None and second[name] is not None and value != second[name]
    }


def _same_documents(first: _Run, second: _Run, task: str, loaded: Loaded) -> bool:
    """Say whether two runs saw the same documents in another order, as several processes do.

    lm-eval's hash of a task is over the order in which its processes gather the documents.
    """
    one, other = (loaded.documents(run.run_id, task) for run in (first, second))
    return (
        one is not None and other is not None and one["hash"].to_dict() == other["hash"].to_dict()
    )


def _difference(runs: Sequence[_Run], loaded: Loaded) -> str:
    """Say which files keep the others from being compared."""
    of_file = {run.file: run for run in runs}
    reference = [of_file[file] for file in loaded.groups[0].files]
    lines = []
    for group in loaded.groups[1:]:
        for file in group.files:
            for other in reference:
                if conflicts := _conflicts(other, of_file[file], loaded):
                    lines.append(f"{other.file} and {file} have " + ", ".join(conflicts))
                    break
    if len(lines) > SHOWN_DIFFERENCES:
        lines[SHOWN_DIFFERENCES:] = [f"and {len(lines) - SHOWN_DIFFERENCES} more files differ too"]
    return (
        "These results cannot be compared: " + "; ".join(lines) + ". "
        "Evaluate them alike, or keep them apart in groups with --force."
    )


def _row(run: _Run, task: str, model: RunInfo | None, context_length: int | None) -> dict[str, Any]:
    """Return what one file tells about one of its tasks.

    Parameters
    ----------
    model : RunInfo or None
        Of any run of the same model: a baseline of ``--model hf`` does not say how many experts its
        model has.
    """
    context_length = context_length or run.content.get("max_length")
    values = run.content["results"][task]
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
        "run_id": run.run_id,
        "task": task,
        "file": run.file.as_posix(),
        "model": run.model,
        "dataset": dataset_name(task),
        "limit": run.content["config"].get("limit"),
        "num_fewshot": run.of_task("n-shot", task),
        "documents": run.documents(task),
        "context_length": context_length,
    }
    row |= _routing_of(run) if run.info else _routing_of_baseline(run, model)
    for name, harness in {
        **{name: name for name in ("word_perplexity", "byte_perplexity", *ACCURACIES)},
        "target_perplexity": "perplexity",
    }.items():
        row[name], row[f"{name}_stderr"] = _measured(values, harness)
    main = next((name for name in ACCURACIES if row[name] is not None), ACCURACIES[0])
    row["accuracy"], row["accuracy_stderr"] = row[main], row[f"{main}_stderr"]

    summary = run.summary(task)
    if summary is not None and run.info is not None:
        row |= _routing_metrics(run.info, summary, row)
        row["cached_requests"] = run.cached_requests
    if model is not None and context_length and row["mean_experts_model"] is not None:
        architecture = Architecture.from_config(model["model_config"], model["num_layers"])
        if architecture is not None:
            row["flops_reduction_pct"] = metrics.flops_reduction_pct(
                architecture.flops(row["mean_experts_model"], context_length),
                architecture.flops(model["native_top_k"], context_length),
            )
    row["expert_activation_ratio"] = metrics.expert_activation_ratio(
        row["mean_experts"], row["max_k"]
    )
    return {name: row[name] for name in COLUMNS} | {"_date": run.content.get("date") or 0}


def _measured(values: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    """Return (value, standard error) of a metric under the first filter that has it."""
    for key, value in values.items():
        metric, comma, of_filter = key.partition(",")
        if comma and metric == name:
            error = values.get(f"{name}_stderr,{of_filter}")  # "N/A" where there is none
            return _number(value), _number(error)
    return None, None


def _number(value: Any) -> float | None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    return float(value) if real else None


def _routing_of(run: _Run) -> dict[str, Any]:
    """Describe the routing of a run of hf-bh."""
    assert run.info is not None
    config = run.info["config"]
    fixed = config["rule"] in FIXED_COUNT
    min_k = config["max_k"] if fixed else config["min_k"]
    analyze = config["mode"] == "analyze"
    plain = (
        config["rule"] == "topk"
        and not analyze
        and config.get("temperature", 1.0) == 1.0
        and config.get("renormalize", "auto") == "auto"
        and len(run.info["routed_layers"]) == run.info["num_layers"]
    )
    null = {k: v for k, v in (run.info["null_model"] or {}).items() if k != "versions"}
    routing = config | {"min_k": min_k, "alpha": None if fixed else config["alpha"], "null": null}
    return {
        "rule": config["rule"],
        "alpha": routing["alpha"],
        "min_k": min_k,
        "max_k": config["max_k"],
        "strategy": strategy_label(config),
        "baseline": plain,
        "adaptive": min_k < config["max_k"],
        "mode": config["mode"],
        "configuration": _digest(routing),
        "native_top_k": run.info["native_top_k"],
        "num_experts": run.info["num_experts"],
    }


def _routing_of_baseline(run: _Run, model: RunInfo | None) -> dict[str, Any]:
    """Describe a run of the unmodified model, whose routers give every token the native top-k."""
    k = model["native_top_k"] if model else None
    return {
        "rule": "topk",
        "min_k": k,
        "max_k": k,
        "strategy": f"top-{k} (hf)" if k else "top-k (hf)",
        "baseline": True,
        "adaptive": False,
        "mode": "native",
        "configuration": _digest({"model": "hf"}),
        "native_top_k": k,
        "num_experts": model["num_experts"] if model else None,
        # By construction; whatever depends on the experts' use stays null.
        "mean_experts": k,
        "std_experts": 0.0 if k else None,
        "mean_experts_model": k,
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def strategy_label(config: Mapping[str, Any]) -> str:
    """Return a short name of a routing configuration, for tables and legends.

    Examples
    --------
    >>> strategy_label({"rule": "bh", "alpha": 0.4, "min_k": 1, "max_k": 8})
    'BH a=0.40, max 8'
    >>> strategy_label({"rule": "topk", "max_k": 8})
    'top-8'
    """
    rule, max_k = config["rule"], config["max_k"]
    if rule in FIXED_COUNT:
        label = f"{'top' if rule == 'topk' else 'random'}-{max_k}"
    else:
        alpha = config["alpha"]
        level = f"{alpha:.2f}" if round(alpha, 2) == alpha else f"{alpha:.6g}"
        label = f"{RULE_LABELS.get(rule, rule)} a={level}, max {max_k}"
        if config.get("min_k", 1) != 1:
            label += f", min {config['min_k']}"
    if config.get("statistic", "logit") not in ("logit", None):
        label += f", {config['statistic']}"
    if config.get("temperature", 1.0) != 1.0:
        label += f", T={config['temperature']:g}"
    if config.get("renormalize", "auto") != "auto":
        label += f", renormalize={str(config['renormalize']).lower()}"
    if config.get("layers", "all") != "all":
        label += f", layers {config['layers']}"
    return label + (", analyze only" if config.get("mode") == "analyze" else "")


def _routing_metrics(info: RunInfo, summary: TaskSummary, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of what routing did for one task.

    With ``mode=analyze`` they describe the selection that was looked at while the model's own top-k
    served the tokens; so nothing was saved, and the efficiency metrics stay null.
    """
    histogram = np.array([layer["histogram"] for layer in summary["layers"]], dtype=np.int64)
    usage = np.array([layer["usage"] for layer in summary["layers"]], dtype=np.int64)
    min_k, max_k = row["min_k"], row["max_k"]
    tokens, seconds = summary["tokens"], summary["seconds"]
    mean, served = summary["mean_experts_per_token"], info["config"]["mode"] != "analyze"
    unrouted = info["num_layers"] - len(info["routed_layers"])
    found: dict[str, Any] = {
        "tokens": tokens,
        "seconds": seconds,
        "std_experts": summary["std_experts_per_token"],
        "tokens_per_second": metrics.tokens_per_second(tokens, seconds),
        "latency_ms_per_token": metrics.latency_ms_per_token(tokens, seconds),
        "expert_utilization": metrics.expert_utilization(usage),
        "gini_coefficient": metrics.gini_coefficient(usage),
        "adaptive_range": metrics.adaptive_range(histogram),
        "selection_entropy": metrics.selection_entropy(histogram),
        "normalized_selection_entropy": metrics.normalized_selection_entropy(
            histogram, min_k, max_k
        ),
        "ceiling_hit_rate": metrics.ceiling_hit_rate(histogram, max_k),
        "floor_hit_rate": metrics.floor_hit_rate(histogram, min_k, max_k),
        "mid_range_rate": metrics.mid_range_rate(histogram, min_k, max_k),
        "layer_expert_variance": metrics.layer_expert_variance(histogram),
        "layer_consistency_score": metrics.layer_consistency_score(
            histogram, [layer["cross"] for layer in summary["layers"]]
        ),
        "would_select_mean_experts": None if served else mean,
    }
    if served and mean is not None:
        routed = len(info["routed_layers"])
        found["mean_experts"] = mean
        found["mean_experts_model"] = (mean * routed + info["native_top_k"] * unrouted) / (
            routed + unrouted
        )
    return found


def _layer_rows(summary: TaskSummary | None) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer["layer"],
            "tokens": sum(layer["histogram"]),
            "mean": layer["mean_experts"],
            "std": layer["std_experts"],
            "usage": layer["usage"],
            "histogram": layer["histogram"],
        }
        for layer in (summary["layers"] if summary else ())
    ]


def read_documents(path: Path, expected: int | None = None) -> pd.DataFrame:
    """Read what lm-eval logged for each document, see :meth:`Loaded.documents`.

    Parameters
    ----------
    path : Path
        ``samples_<task>_<time>.jsonl``.
    expected : int, optional
        How many documents the file must have.

    Raises
    ------
    DataError
        If a line is damaged or a document is missing.
    """
    mend = "run the evaluation again with --log_samples"
    rows: dict[int, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                sample = json.loads(line)
                # A task with several filters has a line for each; the first is the harness's first.
                if sample["doc_id"] not in rows:
                    rows[sample["doc_id"]] = _document(sample)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"Line {number} of {path} is damaged ({error!r}): {mend}."
                ) from error
    if expected is not None and len(rows) != expected:
        raise DataError(f"{path} has {len(rows)} of {expected} documents: {mend}.")
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("doc_id").sort_index()


def _document(sample: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "hash": "-".join(str(sample.get(f"{part}_hash")) for part in ("doc", "prompt", "target")),
        "output": json.dumps(sample["resps"]),
    }
    for name, unit in (("word_perplexity", "words"), ("byte_perplexity", "bytes")):
        if isinstance(sample.get(name), list):
            row["loglikelihood"], row[unit] = map(float, sample[name])
    if isinstance(sample.get("perplexity"), (int, float)):
        row |= {"loglikelihood": float(sample["perplexity"]), "targets": 1.0}
    for name in ACCURACIES:
        if isinstance(sample.get(name), (bool, int, float)):
            row[name] = float(sample[name])
    return row


def _add_token_perplexity(rows: Sequence[dict[str, Any]], loaded: Loaded) -> None:
    """Fill in ``perplexity``, where it is known how many tokens were scored.

    The harness logs a document's loglikelihood but not its number of tokens; an internal routing
    log has the loss per scored token, so their quotient is that number. It depends on the text and
    the tokenizer alone: one log serves all runs of a group, those of ``--model hf`` too. Unless it
    is known for every document, there is no token-level perplexity: one of the first documents
    would stand beside a word-level perplexity of all.
    """
    for alike in _alike(rows, "group", "task"):
        if all(row[name] is None for row in alike for name in PERPLEXITIES):
            continue
        logs = [
            (path, row)
            for row in alike
            if (path := loaded.internal_routing_file(row["run_id"], row["task"]))
            and loaded.documents(row["run_id"], row["task"]) is not None
        ]
        scored: dict[int, int] = {}
        for path, row in sorted(logs, key=lambda log: (log[0].stat().st_size, log[0].as_posix())):
            if len(scored) < (row["documents"] or math.inf):
                documents = loaded.documents(row["run_id"], row["task"])
                assert documents is not None
                scored |= _scored_tokens(path, documents)
        for row in alike:
            documents = loaded.documents(row["run_id"], row["task"]) if scored else None
            if documents is None or "loglikelihood" not in documents:
                continue
            tokens = documents.index.map(scored)
            if not tokens.hasnans:
                documents["tokens"] = np.asarray(tokens, dtype=np.float64)
                row["perplexity"] = metrics.perplexity(
                    documents["loglikelihood"], documents["tokens"].astype(int)
                )


def _scored_tokens(path: Path, documents: pd.DataFrame) -> dict[int, int]:
    """Return document -> number of scored tokens, for documents of a single request.

    The log is searched, not parsed: its losses are a few kilobytes among many megabytes.
    """
    losses: dict[int, list[float | None]] = {}
    if not path.stat().st_size:
        return {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for document, _, loss in _SAMPLE_HEAD.findall(content):
            losses.setdefault(int(document), []).append(None if loss == b"null" else float(loss))
    found = {}
    for document, (loss, *others) in losses.items():
        if loss and not others and document in documents.index:
            count = -documents["loglikelihood"][document] / loss
            if (
                math.isfinite(count)
                and round(count) >= 1
                and abs(count - round(count)) < 1e-6 * count
            ):
                found[document] = round(count)
    return found


def _add_average_accuracy(rows: Sequence[dict[str, Any]]) -> None:
    """Fill in ``avg_task_accuracy`` for configurations that did all tasks with an accuracy."""
    for group in _alike(rows, "group"):
        tasks = {row["task"] for row in group if row["accuracy"] is not None}
        for configured in _alike(group, "configuration"):
            found = {
                task: float(np.mean([row["accuracy"] for row in repeats]))
                for (task,), repeats in _by(configured, "task").items()
                if all(row["accuracy"] is not None for row in repeats)
            }
            if found.keys() == tasks:
                for row in configured:
                    row["avg_task_accuracy"] = metrics.avg_task_accuracy(found)


def _add_stability(rows: Sequence[dict[str, Any]], loaded: Loaded) -> None:
    """Fill in both stability metrics where a configuration ran more than once: means over pairs."""
    for repeats in _alike(rows, "group", "task", "configuration"):
        overlaps, equal = [], []
        for first, second in combinations(repeats, 2):
            runs = [(row["run_id"], row["task"]) for row in (first, second)]
            one, other = (loaded.documents(*run) for run in runs)
            if one is not None and other is not None:
                equal.append(
                    metrics.output_determinism(one["output"].to_dict(), other["output"].to_dict())
                )
            logs = [_internal_routing(loaded.internal_routing_file(*run), loaded) for run in runs]
            if logs[0] and logs[1]:
                overlaps.append(
                    metrics.expert_overlap_score(logs[0]["samples"], logs[1]["samples"])
                )
        for row in repeats:
            row["expert_overlap_score"] = _mean(overlaps)
            row["output_determinism"] = _mean(equal)


def _internal_routing(path: Path | None, loaded: Loaded) -> InternalRouting | None:
    try:
        return read_internal_routing(path) if path else None
    except DataError as error:
        if path is not None and (path, str(error)) not in loaded.problems:
            loaded.problems.append((path, str(error)))
        return None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _by(
    rows: Iterable[dict[str, Any]], *columns: str
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def _alike(rows: Iterable[dict[str, Any]], *columns: str) -> list[list[dict[str, Any]]]:
    return list(_by(rows, *columns).values())


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sort baselines before rules, then by level and size, repeats by their time."""
    return (
        row["group"],
        row["task"],
        not row["baseline"],
        row["rule"],
        row["max_k"] or 0,
        row["alpha"] or 0.0,
        row["strategy"],
        row["configuration"],
        row["_date"],
        row["file"],
    )


def _typed(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame([{name: row[name] for name in COLUMNS} for row in rows], columns=COLUMNS)
    for name, kind in COLUMNS.items():
        if kind == _FLOAT:
            frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(_FLOAT)
        elif kind == _TEXT:
            frame[name] = frame[name].astype(object).where(frame[name].notna(), None)
        else:
            frame[name] = frame[name].astype(kind)
    return frame


def write_tables(frame: pd.DataFrame, folder: Path | str) -> list[Path]:
    """Write ``bh_routing_results`` as CSV, JSON, Markdown and LaTeX, each whole or not at all.

    CSV and JSON hold every column at full precision, empty or null where something was not
    measured; Markdown and LaTeX the columns that people compare. Rows keep the order of the
    frame.

    Returns
    -------
    list of Path
        The four files.
    """
    records = [
        {name: _plain(value) for name, value in record.items()}
        for record in frame.to_dict(orient="records")
    ]
    contents = {
        "csv": frame.to_csv(index=False, lineterminator="\n"),
        "json": json.dumps(records, indent=1, allow_nan=False, ensure_ascii=False) + "\n",
        "md": _markdown(_readable(frame)),
        "tex": _latex(_readable(frame)),
    }
    paths = []
    for suffix, content in contents.items():
        paths.append(Path(folder) / f"{TABLE}.{suffix}")
        with replacing(paths[-1]) as temporary:
            temporary.write_text(content, encoding="utf-8", newline="\n")
    return paths


def _plain(value: Any) -> Any:
    """Return a value of a frame as JSON knows it; what is not finite is null."""
    if value is None or value is pd.NA:
        return None
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _readable(frame: pd.DataFrame) -> list[list[str]]:
    """Return the header and the rows of the columns that people compare and that hold something."""
    shown = {
        name: title
        for name, title in READABLE.items()
        if name in frame
        and (frame[name].notna().any() or (name in STATIC and frame["adaptive"].any()))
        and not (name == "group" and frame[name].nunique() == 1)
    }
    cells = [
        [_cell(_plain(value)) for value in record]
        for record in frame[list(shown)].itertuples(index=False, name=None)
    ]
    return [list(shown.values()), *cells]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _latex(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    styler = pd.DataFrame(body, columns=head, dtype=object).style.hide(axis="index")
    special = {"\\": r"\textbackslash{}"} | {c: f"\\{c}" for c in "&%$#_{}"}

    def escaped(cell: Any) -> str:
        return "".join(special.get(character, character) for character in str(cell))

    styler = styler.format(escaped).format_index(escaped, axis="columns")
    return str(styler.to_latex(hrules=True, column_format="l" * len(head)))
