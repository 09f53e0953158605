"""The columns of the table, their types and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lm_eval_bh.analysis.table import metrics

_FLOAT, _INT, _TEXT, _BOOL = "float64", "Int64", "object", "bool"
# Workload of the speed phase -> its ratio to the unchanged model, and interval ends.
RATIO_OF = {
    "prefill": "speed_ratio",
    "decode 1": "decode_speed_ratio",
    "decode 8": "decode_8_speed_ratio",
    "decode 32": "decode_32_speed_ratio",
}
SPEED_RATIOS = [name + end for name in RATIO_OF.values() for end in ("", "_low", "_high")]
# Column names of earlier releases.
EARLIER = {
    "mean_experts": "avg_experts",
    "mean_experts_model": "avg_experts_model",
    "would_select_mean_experts": "would_select_avg_experts",
}
# The first seven are the earlier prototype's, for its readers.
COLUMNS: dict[str, str] = {
    "config_name": _TEXT,  # such as 8experts_bh_a040
    "routing_type": _TEXT,  # the rule
    "k_or_max_k": _INT,
    "alpha": _FLOAT,
    "dataset": _TEXT,
    "perplexity": _FLOAT,
    "avg_experts": _FLOAT,  # mean over the routed layers
    "perplexity_of": _TEXT,  # a token, or the unit of the task's own perplexity
    "run_id": _TEXT,
    "file": _TEXT,
    "group": "int64",
    "model": _TEXT,
    "task": _TEXT,
    "rule": _TEXT,
    "min_k": _INT,
    "max_k": _INT,
    "alpha_is": _TEXT,  # "level" of a test, or "threshold" of other rules
    "target_experts": _FLOAT,  # target for which alpha was solved
    "budget": _TEXT,  # of the target: one alpha per model, or per layer with alpha their mean
    "trim": _INT,  # of the null model; empty without a test
    "strategy": _TEXT,
    "variant": _TEXT,  # the strategy without level and size: one line of a plot
    "baseline": _BOOL,  # plain static top-k, the control of adaptive rules
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
    "evaluation_tokens_per_second": _FLOAT,  # for information; not comparable between runs
    "cached_requests": _INT,
    "std_experts": _FLOAT,
    "avg_experts_model": _FLOAT,  # mean over all layers; unrouted ones use the model's k
    "distinct_experts": _FLOAT,  # mean number of distinct experts per routed layer and step
    "decode_batch": _INT,  # rows decoded together in a step
    "would_select_avg_experts": _FLOAT,  # with mode=analyze, which runs the model's own k
    "word_perplexity": _FLOAT,
    "word_perplexity_stderr": _FLOAT,
    "byte_perplexity": _FLOAT,
    "byte_perplexity_stderr": _FLOAT,
    "target_perplexity": _FLOAT,  # lm-eval's "perplexity" of LAMBADA, per word
    "target_perplexity_stderr": _FLOAT,
    "acc": _FLOAT,
    "acc_stderr": _FLOAT,
    "acc_norm": _FLOAT,
    "acc_norm_stderr": _FLOAT,
    "accuracy": _FLOAT,  # the first of ACCURACIES that the task has
    "accuracy_stderr": _FLOAT,
    "chance_accuracy": _FLOAT,  # accuracy of guessing among the choices
    "accuracy_note": _TEXT,  # "at chance" or "all wrong": not comparable
    **dict.fromkeys(metrics.METRICS, _FLOAT),
    **dict.fromkeys(SPEED_RATIOS, _FLOAT),
    "perplexity_stderr": _FLOAT,
    "adaptive_range": _INT,
    "context_length": _INT,  # for counting FLOPs
    "matched_metric": _TEXT,
    "matched_perplexity": _FLOAT,
    "matched_accuracy": _FLOAT,
    "matched_by": _TEXT,
    "matched_k_low": _INT,
    "matched_k_high": _INT,
}
LAYER_COLUMNS = ("run_id", "task", "group", "layer", "tokens", "mean", "std", "usage", "histogram")


def typed(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    """Return rows as a frame with some columns, each of its type."""
    frame = pd.DataFrame(rows, columns=list(columns))
    for name, kind in columns.items():
        if kind == _FLOAT:
            frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(_FLOAT)
        elif kind == _TEXT:
            frame[name] = frame[name].astype(object).where(frame[name].notna(), None)
        else:
            frame[name] = frame[name].astype(kind)
    return frame
