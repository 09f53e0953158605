"""Computes medians, ratios and table columns from the rounds of a speed phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lm_eval_bh.analysis.read.model_arguments import one_name
from lm_eval_bh.analysis.table import metrics
from lm_eval_bh.analysis.table.columns import RATIO_OF
from lm_eval_bh.analysis.table.rows import digest_of, routing_of
from lm_eval_bh.schema import SpeedFile, SpeedRouting

Floats = NDArray[np.float64]
CONFIDENCE, RESAMPLES, SEED = 0.95, 9999, 0
FASTER, SLOWER, UNDECIDED = "faster", "slower", "undecided"


def ratio_interval(
    native: Floats, seconds: Floats, confidence: float = CONFIDENCE
) -> tuple[float, float | None, float | None]:
    """Return a configuration's speed relative to the unchanged model, with its interval.

    The median over rounds of (native seconds / seconds) in the same round: a slowdown of a whole
    round cancels, and one disturbed round moves neither. The interval is the percentile bootstrap
    over rounds, with percentiles expanded for few rounds as in Hesterberg 2015, "What Teachers
    Should Know About the Bootstrap", section 5.3: the plain one is too narrow for seven.

    Parameters
    ----------
    native, seconds : float64 [rounds]
        Positive; equal index, equal round. The order does not matter.
    confidence : float
        Confidence of the interval.

    Returns
    -------
    ratio, low, high : float
        Above 1 is faster; no interval from a single round.
    """
    ratios = np.sort(native / seconds)
    n = len(ratios)
    if n < 2:
        return float(np.median(ratios)), None, None
    draws = np.random.default_rng(SEED).integers(0, n, (RESAMPLES, n))
    medians = np.median(ratios[draws], axis=1)
    from scipy import stats  # not needed for reading tables

    t = stats.t.ppf((1 + confidence) / 2, n - 1)
    tail = stats.norm.cdf(-np.sqrt(n / (n - 1)) * t)
    low, high = np.quantile(medians, [tail, 1 - tail], method="inverted_cdf")
    return float(np.median(ratios)), float(low), float(high)


def verdict(low: float | None, high: float | None) -> str:
    """Return the verdict of an interval: undecided if it contains 1."""
    if low is None or high is None or low <= 1 <= high:
        return UNDECIDED
    return FASTER if low > 1 else SLOWER


def speed_frame(files: Sequence[SpeedFile]) -> pd.DataFrame:
    """Return one row per configuration and workload of speed phases.

    Returns
    -------
    DataFrame
        ``model``, ``task``, ``workload``, ``strategy``, ``configuration`` (as in the table of
        results); ``tokens_per_second`` and ``ms_per_pass`` (medians over rounds); ``ratio``,
        ``ratio_low``, ``ratio_high`` (see :func:`ratio_interval`) and ``verdict``;
        ``expert_rows_per_token``, as computed, or as selected if not counted
        (``rows_counted`` is false); ``distinct_experts``, the mean number of different experts
        that a layer reads per pass; ``times_floor``, the median as a multiple of the floor. If
        several phases measured the same, the newest counts.
    """
    rows: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for file in sorted(files, key=lambda one: one["created"]):
        seconds = np.array([one["seconds"] for one in file["rounds"]])  # [rounds, configs, loads]
        routings = [one["routing"] for one in file["configurations"] if one["routing"]]
        layers = routings[0]["num_layers"] if routings else 0
        described = [_described(file, place) for place in range(len(file["configurations"]))]
        for (place, about), (at, load) in _product(described, file["workloads"]):
            mine, native = seconds[:, place, at], seconds[:, file["native"], at]
            ratio, low, high = ratio_interval(native, mine)
            work, median = file["work"][place][at], float(np.median(mine))
            counted, floor = work["expert_rows_computed"], work["floor_seconds"]
            rows_given = work["expert_rows"] if counted is None else counted
            touched, reads = work["experts_touched"], load["passes"] * layers
            row = {
                "model": one_name(file["model"]),
                "task": load["task"],
                "workload": load["name"],
                **about,
                "tokens_per_second": metrics.tokens_per_second(load["tokens"], median),
                "ms_per_pass": metrics.latency_ms_per_token(load["passes"], median),
                "ratio": ratio,
                "ratio_low": low,
                "ratio_high": high,
                "verdict": "" if place == file["native"] else verdict(low, high),
                "expert_rows_per_token": rows_given and rows_given / load["tokens"],
                "rows_counted": counted is not None,
                "distinct_experts": None if touched is None or not reads else touched / reads,
                "times_floor": median / floor if floor else None,
            }
            rows[row["model"], row["task"], row["configuration"], row["workload"]] = row
    return pd.DataFrame(list(rows.values()))


def _product(described: Sequence[Any], workloads: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [(one, load) for load in enumerate(workloads) for one in enumerate(described)]


def _described(file: SpeedFile, place: int) -> dict[str, Any]:
    """Return the strategy and the digest of a configuration, as in rows of the results."""
    routing = file["configurations"][place]["routing"]
    if routing is None:
        known = [one["routing"] for one in file["configurations"] if one["routing"]]
        k = known[0]["native_top_k"] if known else "k"
        return {"strategy": f"top-{k} (hf)", "configuration": digest_of({"model": "hf"})}
    found = routing_of(cast(SpeedRouting, routing))
    return {"strategy": found["strategy"], "configuration": found["configuration"]}


def add_speed(rows: Sequence[dict[str, Any]], files: Sequence[SpeedFile]) -> None:
    """Fill in the speed columns of rows whose configuration was measured on their task.

    ``tokens_per_second`` refers to the prefill, ``latency_ms_per_token`` to decoding one
    sequence. Rows have ``_model``, see
    :func:`~lm_eval_bh.analysis.read.model_arguments.model_of`.
    """
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for one in speed_frame(files).to_dict(orient="records"):
        key = one["model"], one["task"], one["configuration"]
        found.setdefault(key, []).append({str(name): value for name, value in one.items()})
    for row in rows:
        for one in found.get((row["_model"], row["task"], row["configuration"]), ()):
            if one["workload"] == "prefill":
                row["tokens_per_second"] = one["tokens_per_second"]
            if one["workload"] == "decode 1":
                row["latency_ms_per_token"] = one["ms_per_pass"]
            if column := RATIO_OF.get(one["workload"]):
                for end in ("", "_low", "_high"):
                    row[column + end] = one[f"ratio{end}"]


def conditions(file: SpeedFile) -> str:
    """Return the conditions of a speed phase as one sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in file["versions"].items())
    loads = file["load_before"][0], file["load_after"][0]
    return (
        f"Measured {file['created']} on {file['device']} ({file['processor']}), "
        f"{file['threads']} threads, {file['dtype']}, load {loads[0]:.1f} before and "
        f"{loads[1]:.1f} after, {versions}; {len(file['rounds'])} rounds in shuffled order; "
        f"matrix product {file['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s, memory "
        f"{file['bytes_per_second'] / 1e9:,.1f} GB/s."
    )
