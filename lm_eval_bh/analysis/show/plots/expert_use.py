"""Panels of the routing itself: shares at the bounds, use of experts, layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.show.plots.data import (
    CONFIGURATION,
    Experiments,
    NoDataError,
    level_of,
)
from lm_eval_bh.analysis.show.plots.labels import Labels
from lm_eval_bh.analysis.show.plots.style import (
    ALPHA,
    BASELINE_LINE,
    NEUTRAL,
    SMALL,
    Style,
    fit_scale,
    write_beside,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

# Column -> name, shade, hatch: distinct without colour, which encodes max_k.
SHARES = {
    "floor_hit_rate": ("floor", "#E3E3E3", ""),
    "mid_range_rate": ("between", "#A6A6A6", "////"),
    "ceiling_hit_rate": ("ceiling", "#4D4D4D", ""),
}
NO_LOG = (
    "No routing log of an adaptive rule yet. Run lm_eval --model hf-bh "
    "--model_args alpha=0.4,max_k=8,log_routing=summary."
)
FEWEST_ROWS = 6
SAMPLE = 18.0  # points: the length of a line beside the name of a row
INCH_OF_ROWS = 2.2  # height of the rows in one of the nine panels


def constraints(figure: SubFigure, data: Experiments, style: Style, labels: Labels) -> None:
    """Draw stacked shares of tokens at the floor, in between, and at the ceiling."""
    means = data.over_tasks(data.adaptive, list(SHARES))
    if not len(means):
        raise NoDataError(NO_LOG)
    axes = figure.subplots()
    places = _rows(axes, means, style, [level_of(row) for _, row in means.iterrows()])
    left = np.zeros(len(means))
    for column, (name, shade, hatch) in SHARES.items():
        axes.barh(
            places,
            means[column],
            0.8,
            left,
            label=name,
            color=shade,
            hatch=hatch,
            edgecolor="white" if hatch else shade,
            linewidth=0,
        )
        left += means[column].to_numpy()
    axes.set_xlim(0, 100)
    axes.set_xlabel("tokens in a layer (%)")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=3,
        frameon=False,
        fontsize=SMALL,
        borderaxespad=0.2,
        handlelength=0.9,
        columnspacing=0.7,
        handletextpad=0.3,
    )


def utilization(figure: SubFigure, data: Experiments, style: Style, labels: Labels) -> None:
    """Draw the share of experts in use, static top-k above the rules of its ``max_k``."""
    columns = ["expert_utilization", "gini_coefficient"]
    sizes = [*style.sizes, data.native]
    named = data.static[data.static["max_k"].isin(sizes)]
    static = data.over_tasks(named, columns)
    adaptive = data.over_tasks(data.adaptive, columns)
    if not len(static) and not len(adaptive):
        raise NoDataError(NO_LOG)
    static, adaptive = static.assign(static=True), adaptive.assign(static=False)
    means = pd.concat([part for part in (static, adaptive) if len(part)])
    means = means.sort_values(["max_k", "static"], ascending=[True, False], kind="stable")
    names = [
        "top-k" if static else level_of(row)
        for static, (_, row) in zip(means["static"], means.iterrows(), strict=True)
    ]
    axes = figure.subplots()
    places = _rows(axes, means, style, names)
    for place, (_, row) in zip(places, means.iterrows(), strict=True):
        colour = style.colour(row["max_k"])
        axes.barh(
            place,
            100 * row["expert_utilization"],
            0.8,
            linewidth=0.8,
            edgecolor=colour,
            color="white" if row["static"] else colour,
            hatch="//////" if row["static"] else None,
        )
        gini, size = f"{row['gini_coefficient']:.2f}", _size_of(len(means))
        write_beside(axes, gini, (1, place), (4, 0), va="center", fontsize=size)
    write_beside(axes, "Gini", (1, 1), (4, 3), xycoords="axes fraction")
    axes.set_xlim(0, 100)
    axes.set_xlabel("experts in use (%)")


def _rows(axes: Axes, means: pd.DataFrame, style: Style, names: list[str]) -> list[float]:
    """Give every configuration a row, grouped by ``max_k``; return positions from the top."""
    places: list[float] = []
    of_size = dict(list(means.groupby("max_k", sort=False)))
    for rows in of_size.values():
        start = places[-1] + 1.5 if places else 0.0
        places += [start + number for number in range(len(rows))]
    size = _size_of(len(means))
    axes.set_yticks(places, names, fontsize=size)
    widest = max(len(name) for name in names)
    left = -10 - 0.6 * size * widest  # points from the axis
    if style.several:
        for place, (_, row) in zip(places, means.iterrows(), strict=True):
            if not row.get("static"):
                _line_sample(axes, place, left - SAMPLE, style, row)
        left -= SAMPLE + 4
    start = 0
    for max_k, rows in of_size.items():
        middle = float(np.mean(places[start : start + len(rows)]))
        start += len(rows)
        write_beside(
            axes,
            f"max {max_k:.0f}",
            (0, middle),
            (left, 0),
            ha="right",
            va="center",
            color=style.colour(max_k),
            fontweight="bold",
            fontsize=SMALL + 0.5,
        )
    room = 0.6 + max(0.0, FEWEST_ROWS - places[-1] - 1) / 2  # so that two bars do not become blocks
    axes.set_ylim(places[-1] + room, -room)
    write_beside(axes, ALPHA, (0, 1), (-4, 3), xycoords="axes fraction", ha="right")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    return places


def _line_sample(axes: Axes, place: float, left: float, style: Style, row: pd.Series) -> None:
    """Draw a rule's line of the other panels beside the name of its row."""
    across: Any = ("axes points", "data")
    line = {
        "arrowstyle": "-",
        "linestyle": style.line(row["variant"]),
        "color": style.colour(row["max_k"]),
        "linewidth": 1.4,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    axes.annotate(
        "",
        (left, place),
        xytext=(left + SAMPLE, place),
        xycoords=across,
        textcoords=across,
        arrowprops=line,
        annotation_clip=False,
    )


def _size_of(rows: int) -> float:
    """Return the font size in points that fits this many rows."""
    return float(min(SMALL + 0.5, 0.9 * 72 * INCH_OF_ROWS / (rows + 2)))


def layers(figure: SubFigure, data: Experiments, style: Style, labels: Labels) -> None:
    """Draw each layer's mean experts: the middle level in full, the others thin."""
    if data.layers is None:
        raise NoDataError(
            "The means of single layers are not in this table. Draw the folder of the runs: "
            "lm-eval-bh report FOLDER --figure."
        )
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    levels = np.unique(data.layers["on_axis"].dropna())
    middle = levels[(len(levels) - 1) // 2 :][:1]
    of_line = [*CONFIGURATION, "on_axis"]
    for (max_k, variant, *_, alpha), line in data.layers.groupby(of_line, dropna=False):
        faint = {"color": style.colour(max_k), "alpha": 0.45, "linewidth": 0.6, "zorder": 2}
        full = style.point(max_k) | {"zorder": 3}
        how = full if np.isnan(alpha) or alpha in middle else faint
        axes.plot(line["layer"], line["mean"], linestyle=style.line(variant), **how)
    drawn = list(data.layers["mean"])
    if data.native:
        colour = style.colour(data.native)
        axes.axhline(data.native, color=colour, linestyle=BASELINE_LINE, linewidth=1.1)
        labels.at_line(axes, data.native, f"top-{data.native}", colour)
        drawn.append(float(data.native))
    fit_scale(axes, "y", drawn)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("experts per token")
    shown = [f"{ALPHA} = {level:g}" for level in middle]
    thin = ", ".join(f"{level:g}" for level in levels if level not in middle)
    axes.set_title(
        "; ".join([*shown, *([f"thin: {thin}"] if thin else [])]),
        loc="left",
        fontsize=SMALL + 0.5,
        color=NEUTRAL,
    )
