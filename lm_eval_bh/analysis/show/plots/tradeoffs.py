"""Panels of trade-offs: the Pareto front, and speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lm_eval_bh.analysis.show.plots.against_alpha import multiples, title
from lm_eval_bh.analysis.show.plots.data import Experiments, NoDataError, level_of
from lm_eval_bh.analysis.show.plots.labels import Labels
from lm_eval_bh.analysis.show.plots.style import (
    BASELINE_LINE,
    FRONT,
    NEUTRAL,
    Floats,
    Style,
    beyond,
    fit_scale,
    focus,
    interval,
)
from lm_eval_bh.analysis.table.perplexities import PERPLEXITIES

MOST_NAMED = 2  # lines with at most this many points have them named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure


def pareto(figure: SubFigure, data: Experiments, style: Style, labels: Labels) -> None:
    """Draw perplexity against mean experts, with every baseline and the Pareto front.

    Each adaptive point is compared with static top-k at the same number of experts, from the table:
    measured, or interpolated between two measured k.
    """
    missing = (
        "No perplexity with a number of experts yet. Run lm_eval --model hf-bh on bh_wikitext, "
        "with rule=topk too."
    )
    for axes, rows, column in _perplexity_axes(figure, data, "avg_experts_model", missing):
        matched = rows[rows["matched_by"].notna() & (rows["matched_metric"] == column)]
        beside = matched["matched_perplexity"]
        _scatter(axes, rows, "avg_experts_model", column, style, labels, list(beside))
        front = pareto_front(rows["avg_experts_model"].to_numpy(), rows[column].to_numpy())
        axes.step(
            *rows.iloc[front][["avg_experts_model", column]].to_numpy().T,
            where="post",
            zorder=1,
            solid_capstyle="butt",
            **FRONT,
        )
        for _, row in matched.iterrows():
            x, ours, theirs = row["avg_experts_model"], row[column], row["matched_perplexity"]
            axes.plot([x, x], [ours, theirs], color=NEUTRAL, linewidth=0.6, zorder=1)
            face = NEUTRAL if row["matched_by"] == "measured" else "white"
            axes.plot(x, theirs, "d", color=NEUTRAL, markerfacecolor=face, markersize=3.5, zorder=2)
    axes.set_xlabel("mean experts per token" + _unmatched(data))
    figure.supylabel("perplexity", fontsize="medium")


def _unmatched(data: Experiments) -> str:
    """Return the static top-k to run, if some points have none to compare with."""
    scored = data.adaptive[list(PERPLEXITIES)].notna().any(axis=1)
    scored &= data.adaptive["avg_experts_model"].notna()  # unknown without a log
    alone = data.adaptive[scored & data.adaptive["matched_by"].isna()]
    if not len(alone):
        return ""
    low, high = alone["avg_experts_model"].min(), alone["avg_experts_model"].max()
    wanted = sorted({max(1, math.floor(low)), math.ceil(high)})
    return "\n(static top-k to compare with: run " + " and ".join(f"k={k}" for k in wanted) + ")"


def speed(figure: SubFigure, data: Experiments, style: Style, labels: Labels) -> None:
    """Draw perplexity against the speed relative to the unchanged model.

    Horizontal bars are the intervals of the ratios: one that crosses 1 shows no difference. Ratios
    only come from the speed phase.
    """
    missing = (
        "No perplexity with a speed ratio yet. Run lm-eval-bh sweep with --speed, or lm-eval-bh "
        "bench on the task, and aggregate both."
    )
    drawn = _perplexity_axes(figure, data, "speed_ratio", missing)
    ratios = ["speed_ratio", "speed_ratio_low", "speed_ratio_high"]
    along = [1.0, *np.concatenate([rows[ratios].to_numpy().ravel() for _, rows, _ in drawn])]
    for axes, rows, column in drawn:
        _scatter(axes, rows, "speed_ratio", column, style, labels)
        for _, row in rows.dropna(subset=["speed_ratio_low", "speed_ratio_high"]).iterrows():
            at, _ = beyond(axes, row[column])
            axes.plot(
                [row["speed_ratio_low"], row["speed_ratio_high"]],
                [at, at],
                color=style.colour(row["max_k"]),
                linewidth=0.9,
                marker="|",
                markersize=4,
                zorder=2,
            )
        axes.axvline(1.0, color=NEUTRAL, linewidth=0.8, zorder=1)
        fit_scale(axes, "x", along)  # shared by all tasks
    axes.set_xlabel("times as fast as the stock model (prefill)")
    figure.supylabel("perplexity", fontsize="medium")


def _perplexity_axes(
    figure: SubFigure, data: Experiments, along: str, missing: str
) -> list[tuple[Axes, pd.DataFrame, str]]:
    """Return axes for every task with a perplexity, the rows to draw there, and its column."""
    columns, rows_of = {}, {}
    for task in data.tasks:
        column = data.perplexity_of(task)
        if column is None:
            continue
        rows = data.of(task, data.rows).dropna(subset=[column, along])
        if len(rows):
            columns[task], rows_of[task] = column, rows.sort_values(along, kind="stable")
    if not columns:
        raise NoDataError(missing)
    titles = {task: title(data, task, column) for task, column in columns.items()}
    shown = multiples(figure, titles)
    together = [value for task in shown for value in rows_of[task][along]]
    for axes in shown.values():
        fit_scale(axes, "x", together)
    return [(axes, rows_of[task], columns[task]) for task, axes in shown.items()]


def _bars(rows: pd.DataFrame, y: str) -> list[float]:
    """Return both ends of all error bars."""
    low, high = interval(rows[y], rows[f"{y}_stderr"])
    return [*low, *high]


def _scatter(
    axes: Axes,
    rows: pd.DataFrame,
    x: str,
    y: str,
    style: Style,
    labels: Labels,
    further: Sequence[float] = (),
) -> None:
    """Draw adaptive rules filled, static top-k hollow and named on a dashed line.

    Points of an adaptive rule are named if its line has at most :data:`MOST_NAMED`. The y axis
    shows all adaptive rules, the model's own top-k and the rows ``further``; outliers that would
    flatten them are drawn at its edge.
    """
    adaptive, static = rows[rows["adaptive"]], rows[rows["baseline"]].sort_values("max_k")
    own = static["max_k"] == static["native_top_k"]
    core = [*_bars(adaptive, y), *_bars(static[own], y), *further]
    fit_scale(axes, "y", focus(core, list(rows[y])) if len(adaptive) else rows[y])
    for (variant, max_k), line in adaptive.groupby(["variant", "max_k"]):
        line = line.sort_values(["alpha", "target_experts"])
        axes.plot(
            line[x],
            line[y],
            linestyle=style.line(variant),
            linewidth=0.7,
            zorder=3,
            **style.point(max_k),
        )
        _error_bars(axes, line, x, y, style.colour(max_k))
        if len(line) <= MOST_NAMED:
            for _, row in line.iterrows():
                name = f"{variant.partition(',')[0]} {level_of(row)}"
                labels.at_point(axes, row[x], row[y], name, style.colour(max_k))
    axes.plot(static[x], static[y], color=NEUTRAL, linestyle=BASELINE_LINE, linewidth=0.9, zorder=2)
    _error_bars(axes, static, x, y, NEUTRAL)
    for _, row in rows[~rows["adaptive"]].iterrows():
        colour = style.colour(row["max_k"])
        how = style.hollow(row["max_k"]) if row["baseline"] else {"color": colour, "marker": "x"}
        at, value = beyond(axes, row[y])
        axes.plot(row[x], at, zorder=4, clip_on=False, **how)
        labels.at_point(axes, row[x], at, row["strategy"] + value, colour)


def _error_bars(axes: Axes, rows: pd.DataFrame, x: str, y: str, colour: str) -> None:
    known = rows[rows[f"{y}_stderr"] > 0]
    low, high = interval(known[y], known[f"{y}_stderr"])
    axes.errorbar(
        known[x],
        known[y],
        (known[y] - low, high - known[y]),
        fmt="none",
        ecolor=colour,
        elinewidth=0.7,
        zorder=2,
    )


def pareto_front(cost: Floats, loss: Floats) -> NDArray[np.intp]:
    """Return the Pareto-optimal points: no other is as good in both and better in one.

    Parameters
    ----------
    cost, loss : float64 [points]
        Both are better if smaller.

    Returns
    -------
    intp [front]
        Indices by ascending cost; the first of equal points.
    """
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    improves = np.concatenate(([True], best[1:] < best[:-1])) if len(order) else np.array([], bool)
    return np.asarray(order[improves])
