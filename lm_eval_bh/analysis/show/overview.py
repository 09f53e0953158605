"""The table on the terminal: one row per experiment, with the most important numbers."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import pandas as pd

from lm_eval_bh.analysis.table.chance import NONE_RIGHT, with_note
from lm_eval_bh.analysis.table.missing import holds, is_missing
from lm_eval_bh.analysis.table.perplexities import PERPLEXITIES, PERPLEXITY_UNITS, perplexity_column

if TYPE_CHECKING:
    from rich.table import Table

WIDEST = 24  # characters of a strategy's name; longer ones wrap


def overview(frame: pd.DataFrame, compared: pd.DataFrame, level: float) -> list[Table]:
    """Return one table per task, and per group if there are several.

    Parameters
    ----------
    frame : DataFrame
        From :func:`~lm_eval_bh.analysis.table.experiments.load_experiments`.
    compared : DataFrame
        From :func:`~lm_eval_bh.analysis.compare.paired.compare`.
    level : float
        Level of the tests, for stars at adjusted p-values.
    """
    several = frame["group"].nunique() > 1
    tables = [
        _table(rows, compared, level, f"{task}, group {group}" if several else task)
        for (group, task), rows in frame.groupby(["group", "task"], sort=False)
    ]
    for table in tables[-1:]:
        table.caption = (
            "In brackets: difference from the baseline (* significant, = equivalent, both "
            "corrected for all comparisons). (i): interpolated between two static top-k."
            + (
                " Times as fast: prefill, against the unchanged model; an interval that contains "
                "1 shows no difference."
                if frame["speed_ratio"].notna().any()
                else ""
            )
        )
    return tables


def _table(rows: pd.DataFrame, compared: pd.DataFrame, level: float, title: str) -> Table:
    from rich import box
    from rich.table import Table

    metric = perplexity_column(rows)
    cells: dict[str, list[str]] = {}
    for _, row in rows.iterrows():
        of_row = compared[(compared["run_id"] == row["run_id"]) & (compared["task"] == row["task"])]
        of_perplexity = of_row["metric"].isin(PERPLEXITIES)
        perplexity = _perplexity(row[metric] if metric else None)
        for name, cell in {
            "experts": _number(row["avg_experts"], ".2f"),
            "distinct\nexperts": _number(row["distinct_experts"], ".1f"),
            f"perplexity\nper {PERPLEXITY_UNITS[metric] if metric else ''}": perplexity
            + _change(of_row[of_perplexity], level),
            "accuracy": with_note(
                _number(row["accuracy"], ".3f") + _change(of_row[~of_perplexity], level), row
            ),
            "top-k at\nequal\nexperts": _matched(row),
            "FLOPs\nsaved\n(%)": _number(row["flops_reduction_pct"], ".1f"),
            "times\nas\nfast": _speed(row),
        }.items():
            cells.setdefault(name, []).append(cell)
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.caption_justify = "left"
    table.add_column("strategy", no_wrap=True)
    shown = {name: column for name, column in cells.items() if any(column)}
    for name in shown:
        width = 10 if name.startswith("perplexity") else None  # "(+219.2%*)" unbroken
        table.add_column(name, justify="right", overflow="fold", min_width=width)
    for strategy, *row in zip(rows["strategy"], *shown.values(), strict=True):
        table.add_row(textwrap.fill(strategy, WIDEST), *row)
    return table


def _number(value: Any, how: str) -> str:
    return "" if is_missing(value) else f"{value:{how}}"


def _perplexity(value: Any) -> str:
    """Return a perplexity with two decimals, or none from 1000 on."""
    return _number(value, ",.0f" if not is_missing(value) and value >= 1000 else ".2f")


def _change(rows: pd.DataFrame, level: float) -> str:
    """Return the difference from the baseline: percent of perplexity, or points of accuracy."""
    rows = rows[rows["difference"].notna()]
    if not len(rows):
        return ""
    row = rows.iloc[0]
    relative = not is_missing(row["ratio"])
    change = 100 * (row["ratio"] - 1 if relative else row["difference"])
    mark = "*" if row["p_adjusted"] <= level else ""
    equal = "=" if holds(row["equivalent"]) else ""
    return f" ({change:+.1f}{'%' if relative else ''}{mark}{equal})"


def _speed(row: pd.Series) -> str:
    """Return the ratio to the unchanged model, with its interval."""
    ratio, low, high = (row[f"speed_ratio{end}"] for end in ("", "_low", "_high"))
    known = not (is_missing(low) or is_missing(high))
    return _number(ratio, ".2f") + (f"\n[{low:.2f},\n{high:.2f}]" if known else "")


def _matched(row: pd.Series) -> str:
    if is_missing(row["matched_by"]):
        return "" if holds(row["baseline"]) else "not run"
    interpolated = row["matched_by"] == "interpolated"
    nothing = row.get("accuracy_note") == NONE_RIGHT and row["matched_accuracy"] == 0
    values = (
        _perplexity(row["matched_perplexity"]),
        "" if nothing else _number(row["matched_accuracy"], ".3f"),
    )
    return ", ".join(value for value in values if value) + (" (i)" if interpolated else "")
