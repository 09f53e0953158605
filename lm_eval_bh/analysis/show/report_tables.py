"""The tables of the report: their columns, and how numbers are formatted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from lm_eval_bh.analysis.table.chance import with_note
from lm_eval_bh.analysis.table.missing import holds, is_missing, text_of
from lm_eval_bh.analysis.table.perplexities import perplexity_column
from lm_eval_bh.analysis.table.speed_phase import speed_frame

if TYPE_CHECKING:
    from lm_eval_bh.analysis.compare.recommendation import Recommendation
    from lm_eval_bh.analysis.read.loaded import Loaded
    from lm_eval_bh.schema import SpeedFile

PER = {
    "perplexity": "token",
    "word_perplexity": "word",
    "target_perplexity": "target",
    "byte_perplexity": "byte",
}


@dataclass(frozen=True)
class Cell:
    """A cell: its text, its sorting value, and its shade (0 to 1)."""

    text: str
    value: float | None = None
    shade: float | None = None
    numeric: bool = False


@dataclass(frozen=True)
class Row:
    """A row: its cells by column title, and its value for filters."""

    cells: dict[str, Cell]
    anchor: str = ""
    kind: str = ""
    task: str = ""


@dataclass(frozen=True)
class Table:
    """Rows with equal columns, of which the first names them, and explanations of columns."""

    rows: list[Row]
    about: dict[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Cell]:
        """The column titles, each with one cell."""
        return self.rows[0].cells if self.rows else {}

    @property
    def tasks(self) -> list[str]:
        """The tasks to filter by."""
        return sorted({row.task for row in self.rows if row.task})


def number(value: Any, form: str = "", then: str = "") -> Cell:
    """Return a number as a cell, by default with four significant digits. Empty if unknown.

    Text after it, such as its interval, does not affect sorting.
    """
    if is_missing(value):
        return Cell("", numeric=True)
    value = float(value)
    if not math.isfinite(value):
        text = "∞" if value > 0 else "-∞"
    elif form:
        text = format(value, form)
    elif value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    else:
        digits = min(4, max(0, 3 - math.floor(math.log10(abs(value)))))
        text = f"{value:,.{digits}f}"
    return Cell(text + then, value, numeric=True)


def p_value(value: Any) -> Cell:
    """Return a p-value as a cell."""
    cell = number(value, ".3f")
    return replace(cell, text="< 0.001") if cell.value is not None and value < 0.001 else cell


def interval(row: pd.Series, name: str, form: str) -> Cell:
    """Return a number of a row with the interval in columns ``_low`` and ``_high``."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    known = not (is_missing(low) or is_missing(high))
    return number(row[name], form, f" [{low:{form}}, {high:{form}}]" if known else "")


def accuracy(row: pd.Series) -> Cell:
    """Return an accuracy with its standard error, or with a note instead."""
    error = row["accuracy_stderr"]
    cell = number(row["accuracy"], ".3f", f" ± {error:.3f}" if not is_missing(error) else "")
    return replace(cell, text=with_note(cell.text, row))


RESULTS = {
    "experts": "mean experts per token over all layers",
    "perplexity": "per token, word, target or byte; lower is better",
    "accuracy": "at chance: its binomial interval contains the accuracy of guessing",
    "static perplexity": "of static top-k at the same mean number of experts",
    "static accuracy": "of static top-k at the same mean number of experts",
    "static from": "measured, or interpolated between two measured k",
    "against static (%)": "perplexity; below 0 is better",
    "FLOPs saved (%)": "of the whole model, against its own top-k",
    "times as fast": "prefill, against the unchanged model; an interval with 1 shows no difference",
    "decoding, times as fast": "one sequence, token by token",
    "ceiling (%)": "tokens with max_k experts",
    "floor (%)": "tokens with min_k experts",
    "Gini": "0: all experts serve equally often",
}


def results_table(frame: pd.DataFrame) -> Table:
    """Return one row per experiment, with static top-k at the same budget if adaptive."""
    groups = frame["group"].nunique()
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
        cells = {
            "configuration": Cell(row["strategy"]),
            "task": Cell(row["task"]),
            **({"group": number(row["group"])} if groups > 1 else {}),
            "experts": number(row["avg_experts_model"], ".2f"),
            "perplexity": number(perplexity, then=f" / {PER[metric]}" if metric else ""),
            "accuracy": accuracy(row),
            "static perplexity": number(static),
            "static accuracy": number(row["matched_accuracy"], ".3f"),
            "static from": Cell(_how(row)),
            "against static (%)": number(against, "+.2f"),
            "FLOPs saved (%)": number(row["flops_reduction_pct"], ".1f"),
            "times as fast": interval(row, "speed_ratio", ".2f"),
            "decoding, times as fast": interval(row, "decode_speed_ratio", ".2f"),
            "ceiling (%)": number(row["ceiling_hit_rate"], ".1f"),
            "floor (%)": number(row["floor_hit_rate"], ".1f"),
            "Gini": number(row["gini_coefficient"], ".3f"),
        }
        kind = "adaptive" if holds(row["adaptive"]) else "static"
        rows.append(Row(cells, f"run-{place}", kind, row["task"]))
    return Table(rows, RESULTS)


def _how(row: pd.Series) -> str:
    if is_missing(row["matched_by"]):
        return "not measured" if holds(row["adaptive"]) else ""
    ks = sorted({int(row["matched_k_low"]), int(row["matched_k_high"])})
    return f"{row['matched_by']}, k = {' to '.join(map(str, ks))}"


SPEEDS = {
    "tokens/s": "median over rounds",
    "ms per pass": "median over rounds; when decoding, a pass gives each sequence one token",
    "times as fast": "against the unchanged model in the same round, with its interval",
    "verdict": "undecided where the interval contains 1",
    "distinct experts": "the different ones that a layer reads in a pass",
    "expert rows per token": "one expert applied to one token, as computed",
    "times the floor": "the floor: arithmetic, or reading the weights that are needed",
}


def speed_table(speeds: Sequence[SpeedFile]) -> Table:
    """Return the results of speed phases: one row per configuration and workload."""
    rows = []
    for _, row in speed_frame(speeds).iterrows():
        counted = "" if holds(row["rows_counted"]) else " (selected)"
        cells = {
            "configuration": Cell(row["strategy"]),
            "task": Cell(row["task"]),
            "workload": Cell(row["workload"]),
            "tokens/s": number(row["tokens_per_second"], ",.0f"),
            "ms per pass": number(row["ms_per_pass"], ".3g"),
            "times as fast": interval(row, "ratio", ".2f"),
            "verdict": Cell(text_of(row["verdict"])),
            "distinct experts": number(row["distinct_experts"], ".1f"),
            "expert rows per token": number(row["expert_rows_per_token"], ".2f", counted),
            "times the floor": number(row["times_floor"], ".1f"),
        }
        rows.append(Row(cells, task=row["task"]))
    return Table(rows, SPEEDS)


COMPARISONS = {
    "difference": "value - baseline's, with its interval",
    "change (%)": "of a perplexity, with its interval",
    "flips worse / better": "documents that only one of the two answers correctly",
    "p of a difference": "corrected for all rows by Benjamini-Hochberg",
    "p of equivalence": "two one-sided tests, corrected likewise",
    "equivalent": "the difference is within the margin",
}


def comparison_table(comparisons: pd.DataFrame) -> Table:
    """Return the paired differences from the model's own top-k."""
    ends = ("", "_low", "_high")
    changes = {f"change{end}": 100 * (comparisons[f"ratio{end}"] - 1) for end in ends}
    rows = []
    for _, row in comparisons.assign(**changes).iterrows():
        metric, flips = text_of(row["metric"]), (row["flips_worse"], row["flips_better"])
        named = f"{PER[metric]} perplexity" if metric in PER else metric.replace("_", " ")
        cells = {
            "configuration": Cell(row["strategy"]),
            "task": Cell(row["task"]),
            "metric": Cell(named),
            "documents": number(row["documents"]),
            "value": number(row["value"]),
            "baseline's": number(row["baseline_value"]),
            "difference": interval(row, "difference", "+.3g"),
            "change (%)": interval(row, "change", "+.2f"),
            "flips worse / better": Cell(
                "" if is_missing(flips[0]) else f"{flips[0]} / {flips[1]}"
            ),
            "p of a difference": p_value(row["p_adjusted"]),
            "p of equivalence": p_value(row["equivalence_p_adjusted"]),
            "equivalent": Cell(
                "" if is_missing(row["equivalent"]) else "yes" if row["equivalent"] else "not shown"
            ),
            "remark": Cell(text_of(row["reason"])),
        }
        rows.append(Row(cells))
    return Table(rows, COMPARISONS)


def verdict_table(found: Recommendation) -> Table:
    """Return the criterion's verdict on every configuration."""
    rows = []
    for one in found.candidates:
        cells = {
            "configuration": Cell(one.strategy),
            "experts": number(one.experts, ".2f"),
            "perplexity change (%)": number(100 * (math.exp(one.log_ratio) - 1), "+.2f"),
            "qualifies": Cell("yes" if one.qualifies else "no"),
            "because": Cell(one.verdict),
        }
        rows.append(Row(cells))
    about = {"perplexity change (%)": "from the model's own top-k, mean over the tasks"}
    return Table(rows, about)


def health_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Return a null model's fit on held-out text, one row per layer.

    Parameters
    ----------
    layers : sequence of mapping
        See :func:`~lm_eval_bh.analysis.show.health_figure.draw_health`.
    """
    rows = []
    for layer in layers:
        distance = number(layer["ks_distance"], ".4f")
        cells = {
            "layer": number(layer["layer"]),
            "KS distance from uniform": replace(distance, shade=distance.value),
            "p = 0 (%)": number(100 * layer["ceiling_share"], ".3f"),
            "p = 1 (%)": number(100 * layer["floor_share"], ".3f"),
            "tokens": number(layer["tokens"]),
        }
        rows.append(Row(cells))
    about = {
        "KS distance from uniform": "of the p-values; 0 is a perfect fit",
        "p = 0 (%)": "logits above the null distribution: rejected at every level",
        "p = 1 (%)": "logits below it",
    }
    return Table(rows, about)


def layer_table(loaded: Loaded) -> Table:
    """Return the mean experts of every routed layer, one row per experiment."""
    # A log without tokens has no mean.
    means = loaded.layers.dropna(subset="mean").pivot(
        index=["run_id", "task"], columns="layer", values="mean"
    )
    most = float(means.max(axis=None)) if len(means) else 1.0
    rows = []
    for _, row in loaded.frame.iterrows():
        if (row["run_id"], row["task"]) not in means.index:
            continue
        cells = {"configuration": Cell(row["strategy"]), "task": Cell(row["task"])}
        for layer, mean in means.loc[(row["run_id"], row["task"])].items():
            cell = number(mean, ".2f")
            shade = None if cell.value is None else cell.value / most
            cells[f"layer {layer}"] = replace(cell, shade=shade)
        rows.append(Row(cells))
    return Table(rows)
