"""Perplexity over the mean number of experts: policies beside static top-k, and who is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_bh.analysis.show.plots.style import BASELINE_LINE, MARKERS, NEUTRAL, PALETTE, RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """A policy at one mean number of experts.

    Attributes
    ----------
    mean_experts, perplexity : float
        Where it stands.
    difference, low, high : float
        From static top-k at the same mean, with its 95 % interval.
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
) -> Figure:
    """Draw policies and static top-k: their perplexities, and the differences with intervals.

    Parameters
    ----------
    static : mapping of number of experts to perplexity
        At least two.
    policies : mapping of name to points
        In the order of the legend; neighbours in the mean are joined by a line.
    title : str
        Over both panels.
    best : str, optional
        The policy to draw heavier.
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
        right.axhline(0, color=NEUTRAL, linestyle=BASELINE_LINE)
        for number, (name, points) in enumerate(policies.items()):
            _draw(left, right, number, name, sorted(points, key=lambda p: p.mean_experts), best)
        # Static top-k with very few experts is far off: what is looked at is around the policies.
        shown = [point.mean_experts for points in policies.values() for point in points]
        if shown:
            lowest = min(shown) - 0.6
            seen = [p for k, p in static.items() if k >= lowest]
            seen += [point.perplexity for points in policies.values() for point in points]
            margin = 0.05 * (max(seen) - min(seen) or 1.0)
            left.set_ylim(min(seen) - margin, max(seen) + margin)
            left.set_xlim(lowest, max(rungs) + 0.2)
        left.set(xlabel="Experts a token (mean)", ylabel="Perplexity")
        right.set(xlabel="Experts a token (mean)", ylabel="Perplexity minus static top-k's")
        left.set_title("Lower and further left is better", loc="left")
        right.set_title("Below 0: better than static top-k at the same mean", loc="left")
        figure.suptitle(title, fontsize=10)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw(
    left: Axes, right: Axes, number: int, name: str, points: Sequence[Point], best: str | None
) -> None:
    style: dict[str, Any] = {
        "color": PALETTE[number % len(PALETTE)],
        "marker": "*" if name == best else MARKERS[number // len(PALETTE) % len(MARKERS)],
        "markersize": 11 if name == best else 5,
        "linewidth": 2.0 if name == best else 1.0,
        "zorder": 4 if name == best else 3,
    }
    means = [point.mean_experts for point in points]
    left.plot(means, [point.perplexity for point in points], label=name, **style)
    right.errorbar(
        means,
        [point.difference for point in points],
        yerr=[
            [point.difference - point.low for point in points],
            [point.high - point.difference for point in points],
        ],
        **style,
    )
