"""One row an experiment: what a single results file tells about one of its tasks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.read.documents import ACCURACIES
from lm_eval_bh.analysis.read.results_file import Run
from lm_eval_bh.analysis.table import metrics
from lm_eval_bh.analysis.table.flops import Architecture
from lm_eval_bh.schema import FIXED_COUNT, UNTESTED, RunInfo, TaskSummary, dataset_name

_RULE_LABELS = {
    "bh": "BH",
    "by": "BY",
    "holm": "Holm",
    "hochberg": "Hochberg",
    "bonferroni": "Bonferroni",
    "topk": "top-k",
    "top_p": "top-p",
    "min_p": "min-p",
    "random_k": "random-k",
}

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
    "target_experts": _FLOAT,  # that alpha was solved for
    "budget": _TEXT,  # of the target: one alpha for the model, or one a layer and alpha their mean
    "trim": _INT,  # of the null model; empty where nothing is tested
    "strategy": _TEXT,
    "variant": _TEXT,  # the strategy without its level and size: what one line of a plot joins
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
    "perplexity_stderr": _FLOAT,
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


def check(run: Run) -> None:
    """Raise whatever reading a run will raise, if it lacks something or has it wrong."""
    run.settings()
    for task in run.tasks:
        run.task_settings(task)
        row_of(run, task, run.info, None)
        layer_rows(run.summary(task))


def row_of(
    run: Run, task: str, model: RunInfo | None, context_length: int | None
) -> dict[str, Any]:
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


def _routing_of(run: Run) -> dict[str, Any]:
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
        and config.get("statistic", "logit") == "logit"
        and len(run.info["routed_layers"]) == run.info["num_layers"]
    )
    header = run.info["null_model"] or {}
    if config["rule"] not in UNTESTED and config.get("trim") is None:
        config = config | {"trim": header.get("trim") or 0}
    target = config.get("target_experts")
    null = {k: v for k, v in header.items() if k not in ("versions", "health")}
    routing = config | {"min_k": min_k, "alpha": None if fixed else config["alpha"], "null": null}
    return {
        "rule": config["rule"],
        "alpha": routing["alpha"],
        "min_k": min_k,
        "max_k": config["max_k"],
        "target_experts": target,
        "budget": None if target is None else config["budget"],
        "trim": config.get("trim"),
        "strategy": strategy_label(config),
        "variant": variant_label(config),
        "baseline": plain,
        "adaptive": min_k < config["max_k"],
        "mode": config["mode"],
        "configuration": _digest(routing),
        "native_top_k": run.info["native_top_k"],
        "num_experts": run.info["num_experts"],
    }


def _routing_of_baseline(run: Run, model: RunInfo | None) -> dict[str, Any]:
    """Describe a run of the unmodified model, whose routers give every token the native top-k."""
    k = model["native_top_k"] if model else None
    return {
        "rule": "topk",
        "min_k": k,
        "max_k": k,
        "strategy": f"top-{k} (hf)" if k else "top-k (hf)",
        "variant": "top-k",
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
        return f"{_RULE_LABELS[rule].removesuffix('k')}{max_k}{_further(config)}"
    alpha, target = config["alpha"], config.get("target_experts")
    level = f"a={alpha:.2f}" if round(alpha, 2) == alpha else f"a={alpha:.6g}"
    if target is not None:
        level = f"{_target(config)} {target:g}"
    return f"{_RULE_LABELS.get(rule, rule)} {level}, max {max_k}{_further(config)}"


def variant_label(config: Mapping[str, Any]) -> str:
    """Return the name of all configurations that differ in nothing but level and ``max_k``.

    Examples
    --------
    >>> variant_label({"rule": "bh", "alpha": 0.4, "max_k": 8, "statistic": "contribution"})
    'BH, contribution'
    """
    solved = "" if config.get("target_experts") is None else f", {_target(config)}"
    return f"{_RULE_LABELS.get(config['rule'], config['rule'])}{solved}{_further(config)}"


def _target(config: Mapping[str, Any]) -> str:
    return "layer target" if config["budget"] == "layer" else "target"


def _further(config: Mapping[str, Any]) -> str:
    """Return what of a configuration is not as usual, besides rule, level and ``max_k``."""
    label = ""
    if config["rule"] not in FIXED_COUNT and config.get("min_k", 1) != 1:
        label += f", min {config['min_k']}"
    if config.get("statistic", "logit") not in ("logit", None):
        label += f", {config['statistic']}"
    if config.get("null", "pooled") not in ("pooled", None):
        label += f", null of each {config['null']}"
    if config.get("trim"):
        label += f", trim {config['trim']}"
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


def layer_rows(summary: TaskSummary | None) -> list[dict[str, Any]]:
    """Return what the table of layers has of one task, besides whose it is."""
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


def typed(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows as a frame, of the types that :data:`COLUMNS` names."""
    frame = pd.DataFrame([{name: row[name] for name in COLUMNS} for row in rows], columns=COLUMNS)
    for name, kind in COLUMNS.items():
        if kind == _FLOAT:
            frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(_FLOAT)
        elif kind == _TEXT:
            frame[name] = frame[name].astype(object).where(frame[name].notna(), None)
        else:
            frame[name] = frame[name].astype(kind)
    return frame
