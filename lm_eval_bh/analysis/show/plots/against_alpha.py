"""Panels over the level alpha: perplexity, accuracy, mean experts, and mean experts as a map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.show.plots.data import Experiments, NoDataError
from lm_eval_bh.analysis.show.plots.labels import Labels
from lm_eval_bh.analysis.show.plots.style import (
    ALPHA,
    BASELINE_LINE,
    NEUTRAL,
    SMALL,
    Style,
    beyond,
    fit_scale,
    focus,
    interval,
    write_beside,
)
from lm_eval_bh.analysis.table.chance import AT_CHANCE, NONE_RIGHT
from lm_eval_bh.analysis.table.perplexities import PERPLEXITY_UNITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

MOST_TASKS = 3  # small multiples that stay legible in one panel
NO_ADAPTIVE = (
    "No run of an adaptive rule at a level alpha yet. Run lm_eval --model hf-bh "
    "--model_args alpha=0.4,max_k=8 and further levels."
)


def perplexity(figure: SubFigure, data: Experiments, style: Style, labels: Labels) -> None:
    """Draw perplexity against alpha, one line per ``max_k``; static top-k is dashed."""
    tasks = {task: data.perplexity_of(task) for task in data.tasks}
    shown = {task: column for task, column in tasks.items() if column is not None}
    _against_alpha(figure, data, style, labels, shown, "a perplexity", "bh_wikitext")
    figure.supylabel("perplexity", fontsize="medium")


def accuracy(figure: SubFigure, data: Experiments, style: Style, labels: Labels) -> None:
    """Draw accuracy against alpha likewise, if any document was answered correctly."""
    notes = {task: data.accuracy_notes(task) for task in data.tasks}
    shown = {task: "accuracy" for task, found in notes.items() if found - {NONE_RIGHT}}
    nothing = [data.dataset(task) for task, found in notes.items() if found == {NONE_RIGHT}]
    if nothing and not shown:
        raise NoDataError(
            "No run answered any document correctly, so there are no accuracies to compare."
        )
    _against_alpha(figure, data, style, labels, shown, "an accuracy", "bh_lambada")
    if nothing:
        axes = figure.axes[-1]
        axes.set_xlabel(f"{axes.get_xlabel()}\n({', '.join(nothing)}: {NONE_RIGHT} in every run)")
    figure.supylabel("accuracy (%)", fontsize="medium")


def _against_alpha(
    figure: SubFigure,
    data: Experiments,
    style: Style,
    labels: Labels,
    columns: dict[str, str],
    what: str,
    example: str,
) -> None:
    """Draw a column against alpha for each task, as stacked small multiples."""
    with_alpha = data.adaptive[data.adaptive["on_axis"].notna()]
    if with_alpha.empty:
        raise NoDataError(NO_ADAPTIVE)
    columns = {
        task: column
        for task, column in columns.items()
        if data.of(task, with_alpha)[column].notna().any()
    }
    if not columns:
        raise NoDataError(
            f"No run of an adaptive rule has {what} yet. Run lm_eval --model hf-bh on {example}."
        )
    titles = {task: title(data, task, column) for task, column in columns.items()}
    for task, axes in multiples(figure, titles).items():
        column = columns[task]
        percent = 100 if column == "accuracy" else 1
        rows = data.of(task, with_alpha).dropna(subset=column)
        log = column != "accuracy"
        value = percent * rows[column]
        low, high = interval(value, percent * rows[f"{column}_stderr"], log)
        _lines(axes, rows.assign(value=value, low=low, high=high), style)
        static = _baselines(data, task, style).dropna(subset=column)
        values = percent * static[column]
        core = [*low, *high, *values[static["max_k"] == data.native]]
        fit_scale(axes, "y", focus(core, list(values), log), log)
        if not log:
            bottom, top = axes.get_ylim()
            axes.set_ylim(max(bottom, -0.05 * top), top)  # shares are not negative
        for _, row in static.iterrows():
            value, error = percent * row[column], percent * row[f"{column}_stderr"]
            colour = style.colour(row["max_k"])
            axes.axhline(value, color=colour, linestyle=BASELINE_LINE, linewidth=1.1, zorder=1)
            if error > 0:
                ends = (float(end) for end in interval(value, error, log))
                axes.axhspan(*ends, color=colour, alpha=0.1, linewidth=0)
            at, further = beyond(axes, value)
            labels.at_line(axes, at, row["strategy"] + further, colour)
        alpha_ticks(axes, rows["alpha"])
    axes.set_xlabel(f"{data.alpha_is} {ALPHA}")


def _lines(axes: Axes, rows: pd.DataFrame, style: Style) -> None:
    """Draw a line for each rule and ``max_k``: ``value`` with bars from ``low`` to ``high``."""
    step = _smallest_step(rows["alpha"])
    for (variant, max_k), line in rows.groupby(["variant", "max_k"], sort=True):
        line = line.sort_values("alpha")
        bars = np.maximum([line["value"] - line["low"], line["high"] - line["value"]], 0)
        # Shifted slightly, or configurations that never reach max_k would hide each other.
        number = style.sizes.index(int(max_k)) - (len(style.sizes) - 1) / 2
        axes.errorbar(
            line["alpha"] + 0.05 * step * number,
            line["value"],
            yerr=bars if bars.any() else None,
            linestyle=style.line(variant),
            elinewidth=0.8,
            **style.point(max_k),
        )


def _smallest_step(alphas: pd.Series) -> float:
    steps = np.diff(np.unique(alphas))
    return float(steps.min()) if len(steps) else 0.1


def _baselines(data: Experiments, task: str, style: Style) -> pd.DataFrame:
    """Return static top-k of the drawn sizes, and the model's own."""
    static = data.of(task, data.static)
    named = static["max_k"].isin([*style.sizes, data.native]) | static["max_k"].isna()
    return static[named]


def title(data: Experiments, task: str, column: str) -> str:
    """Return the title of a task: its data set, and the unit of its perplexity."""
    if column == "accuracy" and data.accuracy_notes(task) == {AT_CHANCE}:
        return f"{data.dataset(task)}, all {AT_CHANCE}"
    unit = PERPLEXITY_UNITS.get(column)
    return f"{data.dataset(task)}, per {unit}" if unit else data.dataset(task)


def multiples(figure: SubFigure, titles: dict[str, str]) -> dict[str, Axes]:
    """Return stacked axes with titles for the first :data:`MOST_TASKS` tasks."""
    shown = list(titles)[:MOST_TASKS]
    grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False)
    found = dict(zip(shown, grid[:, 0], strict=True))
    for task, axes in found.items():
        axes.set_title(titles[task], loc="left", fontsize=SMALL + 0.5)
    if further := len(titles) - len(shown):
        axes.set_title(f"+ {further} more: see --tasks", loc="right", fontsize=SMALL)
    return found


def alpha_ticks(axes: Axes, alphas: pd.Series) -> None:
    """Put a tick at every measured level, unless there are too many."""
    levels = np.unique(alphas)
    step = _smallest_step(alphas)
    axes.set_xlim(levels[0] - step / 2, levels[-1] + step / 2)
    if len(levels) <= 7:
        axes.set_xticks(levels, [f"{level:g}" for level in levels])


def experts(figure: SubFigure, data: Experiments, style: Style, labels: Labels) -> None:
    """Draw mean experts against alpha; the right axis shows the saving against native top-k."""
    means = data.over_tasks(data.adaptive[data.adaptive["on_axis"].notna()], ["avg_experts"])
    if not len(means):
        raise NoDataError(NO_ADAPTIVE)
    axes = figure.subplots()
    _lines(axes, means.assign(value=means["avg_experts"]), style)
    drawn = [*means["low"], *means["high"]]
    if data.native:
        colour = style.colour(data.native)
        axes.axhline(data.native, color=colour, linestyle=BASELINE_LINE, linewidth=1.1)
        write_beside(axes, f"top-{data.native}", (0, data.native), (3, 2), color=colour)
        drawn.append(float(data.native))
    fit_scale(axes, "y", drawn)
    alpha_ticks(axes, means["alpha"])
    axes.set_xlabel(f"{data.alpha_is} {ALPHA}")
    axes.set_ylabel("experts per token")
    if data.native:
        _savings(axes, data.native)
    if (means["count"] > 1).any():
        axes.set_title("mean over tasks; bars: their range", loc="left", fontsize=SMALL + 0.5)


def _savings(axes: Axes, native: int) -> None:
    """Label the right axis with the saving in percent."""
    right = axes.secondary_yaxis("right")
    low, high = axes.get_ylim()
    ticks = [float(tick) for tick in axes.get_yticks() if low <= tick <= high]
    right.set_yticks(ticks, [f"{100 * (1 - tick / native):.0f}" for tick in ticks])
    right.set_yticks([], minor=True)
    right.set_ylabel(f"fewer than top-{native} (%)")


def heat_map(figure: SubFigure, data: Experiments, style: Style, labels: Labels) -> None:
    """Draw mean experts as a map of alpha and ``max_k``, with the numbers in the cells."""
    from matplotlib.colors import LogNorm

    rows = data.adaptive[data.adaptive["on_axis"].notna()]
    if not len(rows):
        raise NoDataError(NO_ADAPTIVE)
    variant = rows["variant"].value_counts().index[0]
    means = data.over_tasks(rows[rows["variant"] == variant], ["avg_experts"])
    if not len(means):
        raise NoDataError("No routing log yet. Run lm_eval --model hf-bh with log_routing=summary.")
    table = means.pivot(index="max_k", columns="alpha", values="avg_experts")
    axes = figure.subplots()
    axes.grid(visible=False)
    low, high = float(np.nanmin(table)), float(np.nanmax(table))
    image: Any = axes.imshow(
        np.ma.masked_invalid(table.to_numpy()),
        aspect="auto",
        origin="lower",
        cmap="cividis",
        norm=LogNorm(low, max(high, 1.01 * low)),
    )
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        known = bool(np.isfinite(value))
        light = known and image.norm(value) > 0.55
        axes.text(
            column,
            row,
            (f"{value:.2f}" if value < 10 else f"{value:.1f}") if known else "not run",
            ha="center",
            va="center",
            color="black" if light else "white" if known else NEUTRAL,
            fontsize=8.5 if known else SMALL,
        )
    axes.set_xticks(range(len(table.columns)), [f"{alpha:g}" for alpha in table.columns])
    axes.set_yticks(range(len(table.index)), [f"{k:.0f}" for k in table.index])
    for tick, max_k in zip(axes.get_yticklabels(), table.index, strict=True):
        tick.set_color(style.colour(max_k))
        tick.set_fontweight("bold")
    axes.set_xlabel(f"{data.alpha_is} {ALPHA}")
    axes.set_ylabel("max_k")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if len(data.variants) > 1:
        axes.set_title(f"rule: {variant}", loc="left", fontsize=SMALL + 0.5)
