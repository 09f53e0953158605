"""The tables of the report: their columns, and how numbers are formatted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from lm_eval_bh.analysis.table.perplexities import perplexity_column

if TYPE_CHECKING:
    from lm_eval_bh.analysis.compare.recommendation import Recommendation
    from lm_eval_bh.analysis.read.loaded import Loaded

PER = {
    "perplexity": "token",
    "word_perplexity": "word",
    "target_perplexity": "target",
    "byte_perplexity": "byte",
}


@dataclass(frozen=True)
class Column:
    """A column: its title, whether it contains numbers, and what it means."""

    title: str
    numeric: bool = False
    about: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell: what is shown, what it is sorted by, and how deeply it is shaded (0 to 1)."""

    text: str
    value: float | None = None
    shade: float | None = None


@dataclass(frozen=True)
class Row:
    """A row: its cells, and what it can be filtered by."""

    cells: tuple[Cell, ...]
    anchor: str = ""
    kind: str = ""
    task: str = ""


@dataclass(frozen=True)
class Table:
    """Columns and rows; the first column names the row."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def tasks(self) -> list[str]:
        """The tasks to filter by."""
        return sorted({row.task for row in self.rows if row.task})

    @property
    def explained(self) -> list[Column]:
        """The columns that need an explanation."""
        return [column for column in self.columns if column.about]


def number(value: Any, form: str = "") -> Cell:
    """Return a number as a cell; by default with four significant digits. Empty if unknown."""
    if value is None or pd.isna(value):
        return Cell("")
    value = float(value)
    if not math.isfinite(value):
        return Cell("∞" if value > 0 else "-∞", value)
    if form:
        return Cell(format(value, form), value)
    if value == int(value) and abs(value) < 1e15:
        return Cell(f"{int(value):,}", value)
    digits = min(4, max(0, 3 - math.floor(math.log10(abs(value)))))
    return Cell(f"{value:,.{digits}f}", value)


def p_value(value: Any) -> Cell:
    """Return a p-value as a cell."""
    if value is None or pd.isna(value):
        return Cell("")
    return Cell("< 0.001" if value < 0.001 else f"{value:.3f}", float(value))


def interval(value: Any, low: Any, high: Any, form: str = "+.3g") -> Cell:
    """Return a number with its interval as a cell, sorted by the number."""
    if value is None or pd.isna(value):
        return Cell("")
    ends = f" [{low:{form}}, {high:{form}}]" if not (pd.isna(low) or pd.isna(high)) else ""
    return Cell(f"{value:{form}}{ends}", float(value))


def results_table(frame: pd.DataFrame) -> Table:
    """Return one row per experiment, each adaptive one with static top-k at the same budget."""
    columns = (
        Column("configuration"),
        Column("task"),
        *([Column("group", numeric=True)] if frame["group"].nunique() > 1 else []),
        Column("experts", True, "mean experts per token over all layers"),
        Column("perplexity", True, "per token, word, target or byte; lower is better"),
        Column("accuracy", True),
        Column("static perplexity", True, "of static top-k at the same mean number of experts"),
        Column("static accuracy", True, "of static top-k at the same mean number of experts"),
        Column("static from", about="measured, or interpolated between two measured k"),
        Column("against static (%)", True, "perplexity; below 0 is better"),
        Column("FLOPs saved (%)", True, "of the whole model, against its own top-k"),
        Column("tokens/s", True, "forward passes only"),
        Column("ceiling (%)", True, "tokens with max_k experts"),
        Column("floor (%)", True, "tokens with min_k experts"),
        Column("Gini", True, "0: all experts serve equally often"),
    )
    metrics = {
        key: perplexity_column(rows) for key, rows in frame.groupby(["group", "task"], sort=False)
    }
    rows = []
    for place, (_, row) in enumerate(frame.iterrows(), start=1):
        metric = metrics[row["group"], row["task"]]
        perplexity = row[metric] if metric else None
        same = metric is not None and metric == row["matched_metric"]
        static = row["matched_perplexity"] if same else None
        against = 100 * (perplexity / static - 1) if perplexity and static else None
        rows.append(
            Row(
                (
                    Cell(row["strategy"]),
                    Cell(row["task"]),
                    *([number(row["group"])] if frame["group"].nunique() > 1 else []),
                    number(row["mean_experts_model"], ".2f"),
                    _with_unit(number(perplexity), metric),
                    interval_of_error(row["accuracy"], row["accuracy_stderr"]),
                    number(static),
                    number(row["matched_accuracy"], ".3f"),
                    Cell(_how(row)),
                    number(against, "+.2f"),
                    number(row["flops_reduction_pct"], ".1f"),
                    number(row["tokens_per_second"], ",.0f"),
                    number(row["ceiling_hit_rate"], ".1f"),
                    number(row["floor_hit_rate"], ".1f"),
                    number(row["gini_coefficient"], ".3f"),
                ),
                anchor=f"run-{place}",
                kind="adaptive" if row["adaptive"] else "static",
                task=row["task"],
            )
        )
    return Table(columns, tuple(rows))


def interval_of_error(value: Any, error: Any) -> Cell:
    """Return an accuracy with its standard error."""
    if value is None or pd.isna(value):
        return Cell("")
    return Cell(f"{value:.3f}" + ("" if pd.isna(error) else f" ± {error:.3f}"), float(value))


def _with_unit(cell: Cell, metric: str | None) -> Cell:
    return Cell(f"{cell.text} / {PER[metric]}", cell.value) if metric and cell.text else cell


def _how(row: pd.Series) -> str:
    if row["matched_by"] is None:
        return "not measured" if row["adaptive"] else ""
    ks = sorted({int(row["matched_k_low"]), int(row["matched_k_high"])})
    return f"{row['matched_by']}, k = {' to '.join(map(str, ks))}"


def comparison_table(comparisons: pd.DataFrame) -> Table:
    """Return the paired differences from the model's own top-k."""
    columns = (
        Column("configuration"),
        Column("task"),
        Column("metric"),
        Column("documents", True),
        Column("value", True),
        Column("baseline's", True),
        Column("difference", True, "value - baseline's, with its interval"),
        Column("change (%)", True, "of a perplexity, with its interval"),
        Column("flips worse / better", about="documents that only one of them got right"),
        Column("p of a difference", True, "corrected for all rows by Benjamini-Hochberg"),
        Column("p of equivalence", True, "two one-sided tests, corrected likewise"),
        Column("equivalent", about="the difference is within the margin"),
        Column("remark"),
    )
    rows = []
    for _, row in comparisons.iterrows():
        flips = row["flips_worse"], row["flips_better"]
        change = [100 * (row[name] - 1) for name in ("ratio", "ratio_low", "ratio_high")]
        rows.append(
            Row(
                (
                    Cell(row["strategy"]),
                    Cell(row["task"]),
                    Cell(_metric_name(row["metric"])),
                    number(row["documents"]),
                    number(row["value"]),
                    number(row["baseline_value"]),
                    interval(row["difference"], row["difference_low"], row["difference_high"]),
                    interval(change[0], change[1], change[2], form="+.2f"),
                    Cell("" if pd.isna(flips[0]) else f"{flips[0]} / {flips[1]}"),
                    p_value(row["p_adjusted"]),
                    p_value(row["equivalence_p_adjusted"]),
                    Cell({True: "yes", False: "not shown"}.get(row["equivalent"], "")),
                    Cell(row["reason"] or ""),
                )
            )
        )
    return Table(columns, tuple(rows))


def _metric_name(metric: str | None) -> str:
    if metric in PER:
        return f"{PER[metric]} perplexity"
    return (metric or "").replace("_", " ")


def verdict_table(found: Recommendation) -> Table:
    """Return what the rule says of every configuration."""
    columns = (
        Column("configuration"),
        Column("experts", True),
        Column("perplexity change (%)", True, "from the model's own top-k, mean over the tasks"),
        Column("qualifies"),
        Column("because"),
    )
    rows = []
    for candidate in found.candidates:
        change = 100 * (math.exp(candidate.log_ratio) - 1)
        cells = (
            Cell(candidate.strategy),
            number(candidate.experts, ".2f"),
            number(change, "+.2f"),
            Cell("yes" if candidate.qualifies else "no"),
            Cell(candidate.verdict),
        )
        rows.append(Row(cells))
    return Table(columns, tuple(rows))


def health_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Return how well a null model fits held-out text, one row per layer.

    Parameters
    ----------
    layers : sequence of mapping
        See :func:`~lm_eval_bh.analysis.show.health_figure.draw_health`.
    """
    columns = (
        Column("layer", True),
        Column("KS distance from uniform", True, "of the p-values; 0 is a perfect fit"),
        Column("p = 0 (%)", True, "logits above the null distribution: rejected at every level"),
        Column("p = 1 (%)", True, "logits below it"),
        Column("tokens", True),
    )
    rows = []
    for layer in layers:
        distance = number(layer["ks_distance"], ".4f")
        cells = (
            number(layer["layer"]),
            Cell(distance.text, distance.value, shade=distance.value),
            number(100 * layer["ceiling_share"], ".3f"),
            number(100 * layer["floor_share"], ".3f"),
            number(layer["tokens"]),
        )
        rows.append(Row(cells))
    return Table(columns, tuple(rows))


def layer_table(loaded: Loaded) -> Table:
    """Return the mean experts of every routed layer, one row per experiment."""
    layers = sorted(loaded.layers["layer"].unique())
    columns = (
        Column("configuration"),
        Column("task"),
        *(Column(f"layer {layer}", True) for layer in layers),
    )
    # A log without a token has no mean.
    means = loaded.layers.dropna(subset="mean")
    most = float(means["mean"].max()) if len(means) else 1.0
    of_run = {key: rows for key, rows in means.groupby(["run_id", "task"], sort=False)}
    rows = []
    for _, row in loaded.frame.iterrows():
        if (row["run_id"], row["task"]) in of_run:
            mean = of_run[row["run_id"], row["task"]].set_index("layer")["mean"]
            shaded = _shaded((mean.get(layer) for layer in layers), most)
            rows.append(Row((Cell(row["strategy"]), Cell(row["task"]), *shaded)))
    return Table(columns, tuple(rows))


def _shaded(values: Iterable[float | None], most: float) -> list[Cell]:
    cells = [number(value, ".2f") for value in values]
    return [Cell(c.text, c.value, None if c.value is None else c.value / most) for c in cells]
