"""Merges the counters of all processes into the routing summary of the results file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.schema import RoutingSummary, StepSummary, TaskSummary


def merge_summaries(
    states: Sequence[dict[str, Any]], layers: Sequence[int], cached_requests: int
) -> RoutingSummary:
    """Merge the states of all processes and describe the experts per token.

    Parameters
    ----------
    states : sequence of dict
        Results of :meth:`~lm_eval_bh.harness.logs.summary_log.SummaryLog.state`, one per process.
    layers : sequence of int
        The routed layers; the others are not described.
    cached_requests : int
        Requests that a cache answered.

    Returns
    -------
    RoutingSummary
        Plain Python values: means and standard deviations over tokens and layers, over all tasks
        and per task, without padding, batch-size probes and repeated requests. Values without
        tokens are None.
    """
    names = sorted({task for state in states for task in state["tasks"]})
    tasks = {
        name: [state["tasks"][name] for state in states if name in state["tasks"]] for name in names
    }
    everything = [part for parts in tasks.values() for part in parts]
    return {
        **_describe(everything, layers),
        "computed_tokens": sum(state["computed_tokens"] for state in states),
        "padding_tokens": sum(state["padding_tokens"] for state in states),
        "expert_rows_computed": None
        if any(state["expert_rows"] is None for state in states)
        else sum(state["expert_rows"] for state in states),
        "cached_requests": cached_requests,
        "tasks": {name: _describe(parts, layers) for name, parts in tasks.items()},
    }


def _describe(parts: Sequence[dict[str, Any]], layers: Sequence[int]) -> TaskSummary:
    chosen = list(layers)
    if not parts:
        return {
            "seconds": 0.0,
            "tokens": 0,
            "mean_experts_per_token": None,
            "std_experts_per_token": None,
            "layers": [],
        }
    histogram = np.sum([part["histogram"] for part in parts], axis=0)[chosen]
    usage = np.sum([part["usage"] for part in parts], axis=0)[chosen]
    cross = np.sum([part["cross"] for part in parts], axis=0)[chosen]
    mean, deviation = moments(histogram.sum(0))
    return {
        **_describe_steps(parts, chosen),
        "tokens": int(histogram[0].sum()),
        "seconds": float(sum(part["seconds"] for part in parts)),
        "mean_experts_per_token": mean,
        "std_experts_per_token": deviation,
        "layers": [
            {
                "layer": layer,
                "mean_experts": moments(histogram[row])[0],
                "std_experts": moments(histogram[row])[1],
                "histogram": histogram[row].tolist(),
                "usage": usage[row].tolist(),
                "cross": int(cross[row]),
            }
            for row, layer in enumerate(chosen)
        ],
    }


def _describe_steps(parts: Sequence[dict[str, Any]], layers: list[int]) -> StepSummary:
    """Describe the steps of decode batches, if there were any."""
    if "distinct" not in parts[0]:
        return {}
    distinct = np.sum([part["distinct"] for part in parts], axis=0)[layers]
    sizes = np.sum([part["sizes"] for part in parts], axis=0)[layers]
    steps = sizes[:, 1:].sum(-1)
    return {
        "decode_batch": parts[0]["decode_batch"],
        "distinct_experts": float(distinct.sum() / steps.sum()) if steps.sum() else None,
        "layer_distinct_experts": [
            float(d / n) if n else None for d, n in zip(distinct, steps, strict=True)
        ],
        "steps_by_rows": {
            str(rows): int(number) for rows, number in enumerate(sizes[0]) if rows and number
        },
    }


def moments(histogram: NDArray[np.int64]) -> tuple[float | None, float | None]:
    """Return (mean, population standard deviation) of a histogram over 0, 1, ...; None if empty."""
    total = int(histogram.sum())
    if total == 0:
        return None, None
    counts = np.arange(len(histogram))
    mean = float(histogram @ counts) / total
    return mean, float(np.sqrt(histogram @ (counts - mean) ** 2 / total))
