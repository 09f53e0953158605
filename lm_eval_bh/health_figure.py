"""Draws how well a null model fits held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_bh.files import replacing

if TYPE_CHECKING:
    from lm_eval_bh.routing.calibration import LayerHealth


def draw_health(health: Sequence[LayerHealth], title: str, path: Path) -> None:
    """Draw the distribution of held-out p-values, and how far each layer's is from uniform.

    Parameters
    ----------
    health : sequence of LayerHealth
        From :func:`lm_eval_bh.routing.calibration.health`.
    title : str
        Above the figure.
    path : Path
        Image file; its ending says of what format, PNG where it has none.
    """
    from matplotlib.figure import Figure  # no pyplot: nobody's backend is touched

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    uniform = np.linspace(0, 1, len(health[0].quantiles))
    colours = _colours(len(health))
    for row, colour in zip(health, colours, strict=True):
        curves.plot(row.quantiles, uniform, color=colour, linewidth=1.5, label=f"layer {row.layer}")
    curves.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="uniform")
    curves.set(
        title="Distribution of the p-values",
        xlabel="p-value",
        ylabel="share of p-values up to it",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    curves.legend(fontsize=8, ncols=1 + len(health) // 9)
    curves.grid(alpha=0.3)

    place = np.arange(len(health))
    for at, (name, values, hatch) in enumerate(
        (
            ("Kolmogorov-Smirnov distance", [row.ks_distance for row in health], ""),
            ("share of p = 0 (above the null)", [row.ceiling_share for row in health], "//"),
            ("share of p = 1 (below the null)", [row.floor_share for row in health], ".."),
        )
    ):
        bars.bar(
            place + 0.27 * (at - 1),
            values,
            0.25,
            color=("#0072B2", "#D55E00", "#009E73")[at],  # Okabe and Ito
            hatch=hatch,
            edgecolor="white",
            label=name,
        )
    bars.set(
        title="Distance from uniform",
        xlabel="layer",
        ylabel="share (0 to 1)",
        xticks=place,
        xticklabels=[str(row.layer) for row in health],
    )
    bars.legend(fontsize=8)
    bars.grid(alpha=0.3, axis="y")
    figure.suptitle(f"{title}: {health[0].tokens} held-out tokens")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=200)


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    import matplotlib

    return [
        tuple(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0, 0.92, count))
    ]
