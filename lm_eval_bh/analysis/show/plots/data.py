"""The data of the panels: the table of one group with averaged repeats, and its layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.table.matched_budget import matched_budget
from lm_eval_bh.analysis.table.perplexities import PERPLEXITIES, own_perplexities, perplexity_column
from lm_eval_bh.errors import DataError

REQUIRED = ("task", "strategy", "rule", "max_k", "baseline", "adaptive")
NUMBERS = (
    "alpha",
    "target_experts",
    "max_k",
    "native_top_k",
    "avg_experts",
    "avg_experts_model",
    "accuracy",
    "accuracy_stderr",
    "speed_ratio",
    "speed_ratio_low",
    "speed_ratio_high",
    "expert_utilization",
    "gini_coefficient",
    "floor_hit_rate",
    "mid_range_rate",
    "ceiling_hit_rate",
    "matched_perplexity",
    *PERPLEXITIES,
    *(f"{name}_stderr" for name in PERPLEXITIES),
)
CONFIGURATION = ["max_k", "variant", "alpha", "target_experts"]
TEXTS = (
    "run_id",
    "dataset",
    "variant",
    "mode",
    "alpha_is",
    "accuracy_note",
    "matched_by",
    "matched_metric",
)


class NoDataError(Exception):
    """A panel has no data; the message says which run would provide it."""


class Experiments:
    """The experiments of one figure.

    Attributes
    ----------
    rows : DataFrame
        One row per task and configuration.
    adaptive, static, controls : DataFrame
        Rows of adaptive rules, of plain static top-k, and of other fixed numbers of experts.
    layers : DataFrame or None
        One row per task, configuration and layer: ``max_k``, ``alpha``, ``variant``, ``layer``,
        ``mean``, ``on_axis``.
    alpha_is : str
        Meaning of the alpha axis, "level" or "threshold": that of most adaptive rows. One axis
        cannot show both; ``on_axis`` is alpha if it has that meaning, else NaN.
    tasks : list of str
        Tasks in the order of the table.
    sizes : list of int
        Every ``max_k`` of adaptive rules, or without any of static top-k, ascending.
    variants : list of str
        The kinds of adaptive rule, for instance "BH" and "BH, contribution".
    native : int or None
        The model's own top-k.

    Raises
    ------
    DataError
        If columns are missing, or if the table holds several groups.
    """

    def __init__(self, frame: pd.DataFrame, layers: pd.DataFrame | None) -> None:
        if missing := [name for name in REQUIRED if name not in frame]:
            raise DataError(
                f"The table has no column {', '.join(missing)}: "
                "use the frame of load_experiments, or a bh_routing_results.csv."
            )
        if "group" in frame and frame["group"].nunique() > 1:
            raise DataError(
                f"The table holds {frame['group'].nunique()} groups that cannot be compared: "
                "draw one, for instance frame[frame['group'] == 1]."
            )
        rows = _typed(frame)
        rows = rows[rows["mode"] != "analyze"]  # those ran with the model's own k
        self.alpha_is = _what_alpha_is(rows)
        rows["on_axis"] = rows["alpha"].where(rows["alpha_is"] == self.alpha_is)
        self.rows = _repeats_averaged(rows)
        self.tasks = list(dict.fromkeys(self.rows["task"]))
        self.adaptive = self.rows[self.rows["adaptive"]]
        self.static = self.rows[self.rows["baseline"]].sort_values("max_k", kind="stable")
        self.controls = self.rows[~self.rows["adaptive"] & ~self.rows["baseline"]]
        sized = self.adaptive if len(self.adaptive) else self.static
        self.sizes = sorted({int(k) for k in sized["max_k"].dropna()})
        self.variants = list(dict.fromkeys(self.adaptive["variant"]))
        known = self.rows["native_top_k"].dropna()
        self.native = int(known.iloc[0]) if len(known) else None
        self.layers = _layers_averaged(layers, rows)

    def of(self, task: str, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of one task."""
        return rows[rows["task"] == task]

    def perplexity_of(self, task: str) -> str | None:
        """Return the column of the perplexity that all runs of a task have."""
        return perplexity_column(self.of(task, self.rows))

    def dataset(self, task: str) -> str:
        """Return the displayed name of a task's data set."""
        return str(self.of(task, self.rows)["dataset"].iloc[0] or task)

    def accuracy_notes(self, task: str) -> set[str | None]:
        """Return the notes on a task's accuracies; None for informative ones."""
        return set(self.of(task, self.rows).dropna(subset="accuracy")["accuracy_note"])

    def over_tasks(self, rows: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
        """Return each configuration's means over tasks, sorted by rule, size and level.

        Only configurations that ran all tasks of these rows: means over different tasks cannot be
        compared.
        """
        rows = rows.dropna(subset=columns[0])
        of_configuration = rows.groupby(CONFIGURATION, dropna=False)
        means = of_configuration[columns].mean()
        spread = of_configuration[columns[0]].agg(["min", "max", "count"])
        means = means.assign(low=spread["min"], high=spread["max"], count=spread["count"])
        complete = spread["count"] == (spread["count"].max() if len(spread) else 0)
        return means[complete].reset_index().sort_values(CONFIGURATION)


def level_of(row: pd.Series) -> str:
    """Return a configuration's control: ``"0.4"``, or ``"target 4"`` if solved."""
    target = row["target_experts"]
    return f"{row['alpha']:g}" if np.isnan(target) else f"target {target:g}"


def _what_alpha_is(rows: pd.DataFrame) -> str:
    kinds = rows.loc[rows["adaptive"] & rows["alpha"].notna(), "alpha_is"].value_counts()
    return "level" if kinds.empty else str(kinds.index[0])


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the columns for panels, with the types that a CSV loses."""
    frame = own_perplexities(frame)
    rows = frame.reindex(
        columns=list(dict.fromkeys((*REQUIRED, *NUMBERS, *TEXTS, "configuration")))
    )
    for name in NUMBERS:
        numbers = pd.to_numeric(rows[name], errors="coerce").astype("float64")
        if len(wrong := rows[name][numbers.isna() & rows[name].notna()]):
            raise DataError(
                f"The column {name} of the table must be numbers, not {wrong.iloc[0]!r}: "
                "write the table again with aggregate."
            )
        rows[name] = numbers.where(np.isfinite(numbers))  # an axis cannot show infinity
    # A solved level is a result, not a coordinate on the axis of levels.
    rows["alpha"] = rows["alpha"].where(rows["target_experts"].isna())
    for name in ("baseline", "adaptive"):
        rows[name] = frame[name].astype(bool)
    rows["dataset"] = rows["dataset"].where(rows["dataset"].notna(), rows["task"])
    rows["variant"] = rows["variant"].where(rows["variant"].notna(), rows["rule"])
    rows["accuracy_note"] = rows["accuracy_note"].where(rows["accuracy_note"].notna(), None)
    rows["alpha_is"] = rows["alpha_is"].where(rows["alpha_is"].notna(), "level")
    rows["mode"] = rows["mode"].where(rows["mode"].notna(), "patch")
    known = rows["avg_experts_model"].notna()
    rows["avg_experts_model"] = rows["avg_experts_model"].where(known, rows["avg_experts"])
    if "matched_by" not in frame:
        matched = matched_budget(rows.assign(group=1))
        for name in ("matched_by", "matched_metric"):
            rows[name] = matched[name]
        rows["matched_perplexity"] = pd.to_numeric(matched["matched_perplexity"])
    # Static top-k is the same in the stock model and in hf-bh.
    top = rows["max_k"].map(lambda k: "top-k" if np.isnan(k) else f"top-{k:.0f}").astype(object)
    known = rows["configuration"].notna()
    rows["configuration"] = rows["configuration"].where(known, rows["strategy"])
    rows["configuration"] = rows["configuration"].where(~rows["baseline"], top)
    rows["strategy"] = rows["strategy"].where(~rows["baseline"], top)
    return rows


def _repeats_averaged(rows: pd.DataFrame) -> pd.DataFrame:
    how: dict[str, Any] = {
        name: "mean" if name in (*NUMBERS, "on_axis") else "first"
        for name in rows
        if name not in ("task", "configuration")
    }
    return rows.groupby(["task", "configuration"], sort=False).agg(how).reset_index()


def _layers_averaged(layers: pd.DataFrame | None, rows: pd.DataFrame) -> pd.DataFrame | None:
    """Return the mean experts per configuration and layer, pooled over tasks and repeats."""
    if layers is None or layers.empty:
        return None
    adaptive = rows[rows["adaptive"]]
    of_run = adaptive[["run_id", "task", *CONFIGURATION, "on_axis"]].drop_duplicates()
    joined = layers[["run_id", "task", "layer", "tokens", "mean"]].merge(
        of_run, on=["run_id", "task"]
    )
    joined["total"] = joined["mean"] * joined["tokens"]
    of_layer = joined.groupby([*CONFIGURATION, "on_axis", "layer"], dropna=False)
    pooled = of_layer[["total", "tokens"]].sum()
    pooled["mean"] = pooled["total"] / pooled["tokens"]
    return pooled.reset_index() if len(pooled) else None
