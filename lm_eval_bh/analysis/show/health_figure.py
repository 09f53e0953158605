"""Draws how well a null model fits held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_bh.analysis.show.layout import settle
from lm_eval_bh.files import figure_format, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One layer's health, as measured by a calibration and kept in a null model's header.
Health = Mapping[str, Any]


def draw_health(health: Sequence[Health], title: str, path: Path) -> None:
    """Draw the distribution of held-out p-values, and each layer's distance from uniform.

    Parameters
    ----------
    health : sequence of mapping
        One per layer: ``layer``, ``tokens``, ``ks_distance``, ``floor_share``, ``ceiling_share``
        and ``quantiles``, as measured by a calibration.
    title : str
        Title of the figure.
    path : Path
        Image file; its suffix is png, pdf or svg.

    Raises
    ------
    ParameterError
        If it has another suffix.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot, which would change the backend

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(1, 2))
    uniform = np.linspace(0, 1, len(health[0]["quantiles"]))
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(health)))
    for row, colour in zip(health, colours, strict=True):
        curves.plot(
            row["quantiles"], uniform, color=colour, linewidth=1.5, label=f"layer {row['layer']}"
        )
    curves.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="uniform")
    curves.set(title="Distribution of the p-values", xlim=(0, 1), ylim=(0, 1))
    curves.set(xlabel="p-value", ylabel="share of p-values up to it")
    curves.legend(fontsize=8, ncols=1 + len(health) // 9)
    curves.grid(alpha=0.3)

    _draw_distances(bars, health)
    figure.suptitle(f"{title}: {health[0]['tokens']} held-out tokens")
    settle(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=figure_format(path), dpi=200)


def draw_distances(layers: Sequence[Health]) -> Figure:
    """Draw the layers' distances from uniform, from a null model's header.

    Parameters
    ----------
    layers : sequence of mapping
        As for :func:`draw_health`; quantiles are not needed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    _draw_distances(figure.subplots(), layers)
    settle(figure)
    return figure


def _draw_distances(axes: Axes, layers: Sequence[Health]) -> None:
    place = np.arange(len(layers))
    shown = (  # in colours of Okabe and Ito
        ("Kolmogorov-Smirnov distance", "ks_distance", "#0072B2", ""),
        ("share of p = 0 (above the null)", "ceiling_share", "#D55E00", "//"),
        ("share of p = 1 (below the null)", "floor_share", "#009E73", ".."),
    )
    for at, (name, field, colour, hatch) in enumerate(shown, start=-1):
        heights = [layer[field] for layer in layers]
        how: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": name}
        drawn = axes.bar(place + 0.27 * at, heights, 0.25, **how)
        axes.bar_label(drawn, fmt="%.2g", fontsize=7, rotation=90, padding=3)
    axes.margins(y=0.25)  # for the numbers
    axes.set_axisbelow(True)
    axes.set(
        title="Distance from uniform",
        xlabel="layer",
        ylabel="share (0 to 1)",
        xticks=place,
        xticklabels=[f"{layer['layer']:.0f}" for layer in layers],
    )
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    axes.grid(alpha=0.3, axis="y")
