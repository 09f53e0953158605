"""Perplexity over the mean number of experts: policies compared with static top-k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_bh.analysis.show.names import show_names
from lm_eval_bh.analysis.show.plots.style import BASELINE_LINE, MARKERS, NEUTRAL, PALETTE, RC

ONE_MEAN = 0.06  # share of the model's own k; policies with closer means are drawn as rows
EXPERTS, DISTINCT = "Experts per token (mean)", "Distinct experts per layer and step (mean)"

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """A policy at one mean number of experts.

    Attributes
    ----------
    mean_experts, perplexity : float
        Its mean number of experts, or another cost, and its perplexity.
    difference, low, high : float
        Difference from static top-k at the same mean, with its 95 % interval.
    """

    mean_experts: float
    perplexity: float
    difference: float
    low: float
    high: float


def draw_pareto(
    static: Mapping[float, float],
    policies: Mapping[str, Sequence[Point]],
    *,
    title: str,
    best: str | None = None,
    cost: str = EXPERTS,
) -> Figure:
    """Draw policies and static top-k: their perplexities, and the differences with intervals.

    Parameters
    ----------
    static : mapping of number of experts to perplexity
        Perplexities of static top-k, at least two.
    policies : mapping of name to points
        Policies in the order of the legend; lines join neighbouring means.
    title : str
        Title over both panels.
    best : str, optional
        The policy to draw heavier.
    cost : str
        Label of the cost.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(RC):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        rungs = sorted(static)
        left.plot(
            rungs,
            [static[k] for k in rungs],
            color=NEUTRAL,
            linestyle=BASELINE_LINE,
            marker="s",
            markersize=3.5,
            label="static top-k",
        )
        styles = [_style(number, name == best) for number, name in enumerate(policies)]
        for style, (name, points) in zip(styles, policies.items(), strict=True):
            ordered = sorted(points, key=lambda point: point.mean_experts)
            means = [point.mean_experts for point in ordered]
            left.plot(means, [point.perplexity for point in ordered], label=name, **style)
        # Static top-k with very few experts is far off, so the view is around the policies.
        points = [point for found in policies.values() for point in found]
        means = [point.mean_experts for point in points]
        if points:
            unit = max(rungs) / 8
            seen = [p for k, p in static.items() if k >= min(means) - 0.6 * unit]
            seen += [point.perplexity for point in points]
            margin = 0.05 * (max(seen) - min(seen) or 1.0)
            left.set_ylim(min(seen) - margin, max(seen) + margin)
            left.set_xlim(min(means) - 0.6 * unit, max(rungs) + 0.2 * unit)
        left.set(xlabel=cost, ylabel="Perplexity")
        left.set_title("Lower and further left is better", loc="left")
        if points and max(means) - min(means) < ONE_MEAN * max(rungs):
            _draw_forest(right, policies, styles)
        else:
            _draw_over_means(right, policies, styles, cost)
        right.set_title("Below 0: better than static top-k at the same mean", loc="left")
        figure.suptitle(title, fontsize=10)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        show_names(figure)
    return figure


def _style(number: int, best: bool) -> dict[str, Any]:
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": "*" if best else MARKERS[number % len(MARKERS)],
        "markersize": 11 if best else 5,
        "linewidth": 2.0 if best else 1.0,
        "zorder": 4 if best else 3,
    }


def _draw_forest(
    axes: Axes, policies: Mapping[str, Sequence[Point]], styles: Sequence[dict[str, Any]]
) -> None:
    """Draw one row per policy, at a common mean."""
    axes.axvline(0, color=NEUTRAL, linestyle=BASELINE_LINE)
    for row, (style, points) in enumerate(zip(styles, policies.values(), strict=True)):
        for point in points:
            error = [[point.difference - point.low], [point.high - point.difference]]
            axes.errorbar(point.difference, row, xerr=error, **style)
    axes.set_yticks(range(len(policies)), list(policies))
    axes.invert_yaxis()
    axes.set_xlabel("Perplexity minus static top-k's")


def _draw_over_means(
    axes: Axes,
    policies: Mapping[str, Sequence[Point]],
    styles: Sequence[dict[str, Any]],
    cost: str,
) -> None:
    axes.axhline(0, color=NEUTRAL, linestyle=BASELINE_LINE)
    for style, points in zip(styles, policies.values(), strict=True):
        ordered = sorted(points, key=lambda point: point.mean_experts)
        axes.errorbar(
            [point.mean_experts for point in ordered],
            [point.difference for point in ordered],
            yerr=[
                [point.difference - point.low for point in ordered],
                [point.high - point.difference for point in ordered],
            ],
            **style,
        )
    axes.set(xlabel=cost, ylabel="Perplexity minus static top-k's")
