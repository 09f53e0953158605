"""One row per experiment, from one results file and one of its tasks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm_eval_bh.analysis.read.documents import ACCURACIES
from lm_eval_bh.analysis.read.earlier_release import LATER, since_first_release
from lm_eval_bh.analysis.read.model_arguments import chosen_top_k, engine_of
from lm_eval_bh.analysis.read.results_file import Run
from lm_eval_bh.analysis.table import metrics
from lm_eval_bh.analysis.table.columns import COLUMNS
from lm_eval_bh.analysis.table.flops import Architecture
from lm_eval_bh.analysis.table.strategy_names import config_name, strategy_label, variant_label
from lm_eval_bh.schema import (
    RunInfo,
    SpeedRouting,
    TaskSummary,
    configuration_name,
    dataset_name,
)


def check(run: Run) -> None:
    """Raise the errors of reading a run if something in it is missing or wrong."""
    run.settings()
    for task in run.tasks:
        run.task_settings(task)
        row_of(run, task, run.info, None)
        layer_rows(run.summary(task))


def row_of(
    run: Run, task: str, model: RunInfo | None, context_length: int | None
) -> dict[str, Any]:
    """Return the row of one file and one of its tasks.

    Parameters
    ----------
    model : RunInfo or None
        Run information of the same model: results of ``--model hf`` do not contain the model's
        number of experts.
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
        "num_fewshot": shots if isinstance(shots := run.of_task("n-shot", task), int) else None,
        "documents": run.documents(task),
        "context_length": context_length,
    }
    if run.info is not None:
        engine = f" ({engine_of(run.content)})" if run.exported else ""
        known = _counts_of_fixed(run.info) if run.exported else {}
        row |= known | routing_of(run.info, engine)
    else:
        row |= _routing_of_baseline(run, model)
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
    if model is not None and context_length and row["avg_experts_model"] is not None:
        architecture = Architecture.from_config(model["model_config"], model["num_layers"])
        if architecture is not None:
            row["flops_reduction_pct"] = metrics.flops_reduction_pct(
                architecture.flops(row["avg_experts_model"], context_length),
                architecture.flops(model["native_top_k"], context_length),
            )
    row["expert_activation_ratio"] = metrics.expert_activation_ratio(
        row["avg_experts"], row["max_k"]
    )
    row |= {"routing_type": row["rule"], "k_or_max_k": row["max_k"]}
    return {name: row[name] for name in COLUMNS} | {"_date": run.content.get("date") or 0}


def _measured(values: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    """Return (value, standard error) of a metric under the first filter that has it."""
    for key, value in values.items():
        metric, comma, of_filter = key.partition(",")
        if comma and metric == name:
            error = values.get(f"{name}_stderr,{of_filter}")  # "N/A" if missing
            return _number(value), _number(error)
    return None, None


def _number(value: Any) -> float | None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    return float(value) if real else None


def routing_of(info: RunInfo | SpeedRouting, engine: str = "") -> dict[str, Any]:
    """Return the columns that describe a routing.

    Parameters
    ----------
    engine : str
        Suffix of the strategy's name for engines other than hf-bh.
    """
    config, rule = info["config"], info["rule"]
    min_k = config["max_k"] if rule["fixed_count"] else config["min_k"]
    analyze = config["mode"] == "analyze"
    plain = (
        rule["name"] == "topk"
        and not analyze
        and config.get("temperature", 1.0) == 1.0
        and config.get("renormalize", "auto") == "auto"
        and config.get("statistic", "logit") == "logit"
        and not since_first_release(config)
        and len(info["routed_layers"]) == info["num_layers"]
    )
    header = info["null_model"] or {}
    if rule["tests"] and config.get("trim") is None:
        config = config | {"trim": header.get("trim") or 0}
    target = config.get("target_experts")
    routing = config | {"min_k": min_k, "alpha": None if rule["fixed_count"] else config["alpha"]}
    # The scope of the null model is in its header. This must stay as in the first release.
    later = since_first_release(config)
    digested = {
        name: value
        for name, value in routing.items()
        if name != "null_scope" and (name not in LATER or name in later)
    }
    null = {k: v for k, v in header.items() if k not in ("versions", "health")}
    if engine:
        digested["engine"] = engine
    return {
        "rule": rule["name"],
        "alpha": routing["alpha"],
        "min_k": min_k,
        "max_k": config["max_k"],
        "alpha_is": None if rule["fixed_count"] else "level" if rule["tests"] else "threshold",
        "target_experts": target,
        "budget": None if target is None else config["budget"],
        "trim": config.get("trim"),
        "config_name": config_name(config, rule, engine),
        "strategy": strategy_label(config, rule) + engine,
        "variant": variant_label(config, rule),
        "baseline": plain,
        "adaptive": min_k < config["max_k"],
        "mode": config["mode"],
        "configuration": digest_of(digested | {"null": null}),
        "native_top_k": info["native_top_k"],
        "num_experts": info["num_experts"],
    }


def _counts_of_fixed(info: RunInfo) -> dict[str, Any]:
    """Return the means of experts fixed by the rule, since other engines do not count."""
    if not info["rule"]["fixed_count"]:
        return {}
    routed, config = len(info["routed_layers"]), info["config"]
    given = config.get("k_per_layer")
    total = sum(map(int, given.split("-"))) if given else routed * config["max_k"]
    unrouted = info["num_layers"] - routed
    whole = total + unrouted * info["native_top_k"]
    return {"avg_experts": total / routed, "avg_experts_model": whole / info["num_layers"]}


def _routing_of_baseline(run: Run, model: RunInfo | None) -> dict[str, Any]:
    """Return the columns for the unmodified model, which selects its configuration's k.

    The native k, unless the model's arguments set another.
    """
    native, chosen = model["native_top_k"] if model else None, chosen_top_k(run.content)
    k = native if chosen is None else chosen
    engine = engine_of(run.content)
    return {
        "rule": "topk",
        "min_k": k,
        "max_k": k,
        "config_name": f"{configuration_name('topk', k, None)}_{engine}" if k else None,
        "strategy": f"top-{k} ({engine})" if k else f"top-k ({engine})",
        "variant": "top-k",
        "baseline": True,
        "adaptive": False,
        "mode": "native",
        # The model's own k, given explicitly, is the same configuration.
        "configuration": digest_of({"model": engine} | ({} if k == native else {"top_k": k})),
        "native_top_k": native,
        "num_experts": model["num_experts"] if model else None,
        # By construction; metrics of expert use stay null.
        "avg_experts": k,
        "std_experts": 0.0 if k else None,
        "avg_experts_model": k,
    }


def digest_of(content: Any) -> str:
    """Return a digest that is equal for runs of one configuration."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _routing_metrics(info: RunInfo, summary: TaskSummary, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the routing metrics of one task.

    With ``mode=analyze`` they describe the observed selection while the model ran with its own
    top-k: nothing was saved, and efficiency metrics stay null.
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
        "decode_batch": summary.get("decode_batch"),
        "distinct_experts": summary.get("distinct_experts") if served else None,
        "evaluation_tokens_per_second": metrics.tokens_per_second(tokens, seconds),
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
        "would_select_avg_experts": None if served else mean,
    }
    if served and mean is not None:
        routed = len(info["routed_layers"])
        found["avg_experts"] = mean
        found["avg_experts_model"] = (mean * routed + info["native_top_k"] * unrouted) / (
            routed + unrouted
        )
    return found


def layer_rows(summary: TaskSummary | None) -> list[dict[str, Any]]:
    """Return the rows of one task in the table of layers, without run and task."""
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
