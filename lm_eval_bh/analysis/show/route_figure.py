"""Draws the differences of two routing logs: where, how much, which experts, which loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_bh.analysis.compare.route_diff import NOBODY, RouteDiff
from lm_eval_bh.analysis.show.layout import settle
from lm_eval_bh.analysis.show.plots.style import MARKERS, NEUTRAL, PALETTE, RC
from lm_eval_bh.files import figure_format, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_SWAPS = 12
DPI = 200


def draw_routes(diff: RouteDiff, names: tuple[str, str], path: Path) -> None:
    """Draw a comparison of two logs.

    Parameters
    ----------
    diff : RouteDiff
        The differences.
    names : tuple of str
        Names of A and B.
    path : Path
        Image file; its suffix is png, pdf or svg.

    Raises
    ------
    ParameterError
        If it has another suffix.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    suffix = figure_format(path)
    with rc_context(RC):
        figure = Figure(figsize=(11, 7), dpi=DPI, layout="constrained")
        (grid, layers), (swaps, losses) = figure.subplots(2, 2)
        _draw_grid(figure, grid, diff)
        _draw_layers(layers, diff)
        _draw_swaps(swaps, diff)
        _draw_losses(losses, diff)
        figure.suptitle(
            f"{100 * diff.share:.2g} % of {diff.pairs:,} pairs of a token and a layer have "
            f"different experts\nA: {names[0]}\nB: {names[1]}",
            fontsize=9,
        )
        settle(figure)
        undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # same data, same file
        with replacing(path) as temporary:
            figure.savefig(temporary, format=suffix, dpi=DPI, metadata=undated.get(suffix))


def _draw_grid(figure: Figure, axes: Axes, diff: RouteDiff) -> None:
    image = axes.imshow(100 * diff.grid, aspect="auto", cmap="cividis", vmin=0, origin="lower")
    figure.colorbar(image, ax=axes, label="% of the tokens")
    first, last = diff.positions["first"], diff.positions["last"]
    names = [f"{a}" if a == b else f"{a} to {b}" for a, b in zip(first, last, strict=True)]
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    _name_layers(axes.set_yticks, diff)
    axes.grid(visible=False)
    axes.set(xlabel="position in the request", ylabel="layer")
    axes.set_title("Tokens with different experts", loc="left")


def _draw_layers(axes: Axes, diff: RouteDiff) -> None:
    place = np.arange(len(diff.layers))
    shown = (
        ("pairs with different experts", diff.layers["differ"]),
        ("1 - Jaccard index of the experts", 1 - diff.layers["jaccard"]),
        ("weight of A's experts that B lacks", diff.layers["weight_a"]),
    )
    for at, ((name, values), colour) in enumerate(zip(shown, PALETTE, strict=False), start=-1):
        if values.notna().any():  # a trace may have no weights
            axes.bar(place + 0.27 * at, 100 * values, 0.25, color=colour, label=name)
    _name_layers(axes.set_xticks, diff)
    axes.set(xlabel="layer", ylabel="%")
    axes.set_title("How much differs", loc="left")
    axes.margins(y=0.4)  # for the legend
    axes.legend(frameon=False, loc="upper left")


def _name_layers(set_ticks: Callable[..., object], diff: RouteDiff) -> None:
    """Name the layers, or only some of many."""
    places = np.unique(np.linspace(0, len(diff.layers) - 1, min(len(diff.layers), 16)).astype(int))
    set_ticks(places, [str(diff.layers["layer"][place]) for place in places])


def _draw_swaps(axes: Axes, diff: RouteDiff) -> None:
    most = diff.swaps.head(MOST_SWAPS).iloc[::-1]
    names = [swap_name(*row) for row in most[["layer", "a", "b"]].itertuples(index=False)]
    axes.barh(range(len(most)), most["times"], color=PALETTE[0])
    axes.set_yticks(range(len(most)), names)
    axes.set(xlabel="times")
    axes.set_title(f"Experts in place of others: the {len(most)} most frequent", loc="left")


def swap_name(layer: int, a: int, b: int) -> str:
    """Return the name of a swap: the layer, and which expert replaces which."""
    kind = f"{a} dropped" if b == NOBODY else f"{b} added" if a == NOBODY else f"{b} for {a}"
    return f"layer {layer}: {kind}"


def _draw_losses(axes: Axes, diff: RouteDiff) -> None:
    axes.set_title("Loss of reading a token, by how much of its routing differs", loc="left")
    axes.set(xlabel="layers with different experts", ylabel="nats (mean)")
    if not len(diff.losses):
        axes.text(0.5, 0.5, "not logged in both", ha="center", color=NEUTRAL)
        return
    for side, marker, line, colour in zip("ab", MARKERS, ("-", "--"), PALETTE, strict=False):
        known = diff.losses["layers_differ"], diff.losses[f"loss_{side}"]
        axes.plot(*known, marker=marker, linestyle=line, color=colour, label=side.upper())
    axes.set_xticks(diff.losses["layers_differ"])
    axes.legend(frameon=False)
