"""The columns of the table, their types and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lm_eval_bh.analysis.table import metrics

_FLOAT, _INT, _TEXT, _BOOL = "float64", "Int64", "object", "bool"
# Workload of the speed phase -> its ratio to the model as it is, with the ends of its interval.
RATIO_OF = {
    "prefill": "speed_ratio",
    "decode 1": "decode_speed_ratio",
    "decode 8": "decode_8_speed_ratio",
    "decode 32": "decode_32_speed_ratio",
}
SPEED_RATIOS = [name + end for name in RATIO_OF.values() for end in ("", "_low", "_high")]
# Names that columns had in tables of earlier releases.
EARLIER = {
    "mean_experts": "avg_experts",
    "mean_experts_model": "avg_experts_model",
    "would_select_mean_experts": "would_select_avg_experts",
}
# The first seven are the earlier prototype's, whose readers know them.
COLUMNS: dict[str, str] = {
    "config_name": _TEXT,  # such as 8experts_bh_a040
    "routing_type": _TEXT,  # the rule, for those readers
    "k_or_max_k": _INT,
    "alpha": _FLOAT,
    "dataset": _TEXT,
    "perplexity": _FLOAT,
    "avg_experts": _FLOAT,  # over the routed layers
    "perplexity_of": _TEXT,  # a token, or else what the task's own perplexity is of
    "run_id": _TEXT,
    "file": _TEXT,
    "group": "int64",
    "model": _TEXT,
    "task": _TEXT,
    "rule": _TEXT,
    "min_k": _INT,
    "max_k": _INT,
    "alpha_is": _TEXT,  # "level" of a test, or "threshold" of a rule that tests nothing
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
    "evaluation_tokens_per_second": _FLOAT,  # for information: no two runs can be compared by it
    "cached_requests": _INT,
    "std_experts": _FLOAT,
    "avg_experts_model": _FLOAT,  # over all layers; those that are not routed take the model's k
    "distinct_experts": _FLOAT,  # mean number of different ones a routed layer and step
    "decode_batch": _INT,  # rows that are decoded together in a step
    "would_select_avg_experts": _FLOAT,  # with mode=analyze, where the model's own k served
    "word_perplexity": _FLOAT,
    "word_perplexity_stderr": _FLOAT,
    "byte_perplexity": _FLOAT,
    "byte_perplexity_stderr": _FLOAT,
    "target_perplexity": _FLOAT,  # lm-eval's "perplexity" of LAMBADA: a whole word each
    "target_perplexity_stderr": _FLOAT,
    "acc": _FLOAT,
    "acc_stderr": _FLOAT,
    "acc_norm": _FLOAT,
    "acc_norm_stderr": _FLOAT,
    "accuracy": _FLOAT,  # the first of ACCURACIES that the task has
    "accuracy_stderr": _FLOAT,
    "chance_accuracy": _FLOAT,  # of guessing among the choices
    "accuracy_note": _TEXT,  # "at chance" or "all wrong": it compares nothing
    **dict.fromkeys(metrics.METRICS, _FLOAT),
    **dict.fromkeys(SPEED_RATIOS, _FLOAT),
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
