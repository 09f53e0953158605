"""The style of figures: colour and marker per ``max_k``, line style per rule, axes, text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure
    from matplotlib.text import Annotation

Floats = NDArray[np.float64]

# Okabe and Ito 2008, Color Universal Design, without yellow, which is invisible on white.
# Neighbours differ in lightness and marker, so they can be told apart in grey.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
MARKERS = "os^DvPX*"
LINES: tuple[Any, ...] = ("-", "-.", (0, (4, 1, 1, 1, 1, 1)), (0, (1, 1)))
BASELINE_LINE = (0, (4, 2))
NEUTRAL = "#4D4D4D"
FAINT = "#BFBFBF"
LARGEST_ERROR = 3.0  # in values: an interval of a factor of 20 either way
FRONT: dict[str, Any] = {"color": "#9A9A9A", "linewidth": 2.6, "alpha": 0.5}
SMALL = 7.0  # points

RC: dict[Any, Any] = {
    "font.size": 8.5,
    "font.family": "sans-serif",
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": SMALL + 0.5,
    "ytick.labelsize": SMALL + 0.5,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.0,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,  # text in a PDF can be searched and edited
    "svg.hashsalt": "lm-eval-bh",  # equal figures give equal files
}

# An axis is logarithmic from this ratio of largest to smallest value.
WIDE = 2.5
# Factor by which an axis may be extended beyond the core to show other values.
STRETCH = 2.0


class Style:
    """Colours, markers and lines, the same in every panel of a figure.

    Parameters
    ----------
    sizes : sequence of int
        Every drawn ``max_k``, ascending.
    variants : sequence of str
        Every drawn kind of rule.
    """

    def __init__(self, sizes: Sequence[int], variants: Sequence[str]) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        self.sizes = tuple(sizes)
        self.several = len(variants) > 1  # then lines distinguish them
        colours: Sequence[str] = PALETTE
        if len(sizes) > len(PALETTE):
            shades = colormaps["viridis"](np.linspace(0, 0.9, len(sizes)))
            colours = [to_hex(shade) for shade in shades]
        self._colours: dict[float, str] = dict(zip(sizes, colours, strict=False))
        self._markers: dict[float, str] = dict(zip(sizes, cycle(MARKERS), strict=False))
        self._lines = dict(zip(variants, cycle(LINES), strict=False))

    def colour(self, max_k: float) -> str:
        """Return the colour of a ``max_k``; neutral if no adaptive run has it."""
        return self._colours.get(max_k, NEUTRAL)

    def line(self, variant: str) -> Any:
        """Return the line style of a kind of rule."""
        return self._lines.get(variant, LINES[0])

    def point(self, max_k: float) -> dict[str, Any]:
        """Return the style of an adaptive configuration."""
        return {"color": self.colour(max_k), "marker": self._markers.get(max_k, "o")}

    def hollow(self, max_k: float) -> dict[str, Any]:
        """Return the style of static top-k."""
        return self.point(max_k) | {"markerfacecolor": "white", "markeredgewidth": 1.2}


def interval(values: Any, errors: Any, log: bool = True) -> tuple[Floats, Floats]:
    """Return the ends of error bars; without an error, both are the value.

    Parameters
    ----------
    values, errors : float64 [points] or float
        Standard errors of the values.
    log : bool
        Whether the values are positive like perplexities, which are exp of a mean: then the
        interval is symmetric in their logarithm (the delta method) and never reaches zero. An
        error of more than :data:`LARGEST_ERROR` times its value, as a bootstrap over a few
        documents may give, is meaningless and left out.

    Returns
    -------
    low, high : float64 [points]
    """
    value = np.asarray(values, dtype=float)
    error = np.nan_to_num(np.asarray(errors, dtype=float))
    if not log:
        return value - error, value + error
    relative = np.where(error <= LARGEST_ERROR * value, error / value, 0.0)
    return value * np.exp(-relative), value * np.exp(relative)


def focus(core: Sequence[float], others: Sequence[float], log: bool = True) -> list[float]:
    """Return the values that an axis should show: the core, and others that do not flatten it.

    Parameters
    ----------
    core : sequence of float
        Values to show in any case, at least one.
    others : sequence of float
        Values to include, the nearest first, as long as the axis is not longer than
        :data:`STRETCH` times the core.
    log : bool
        Whether distances are logarithmic, if the core is positive.
    """
    log = log and min(core) > 0  # an error bar may reach below 0
    scale = np.log if log else np.asarray
    low, high = float(scale(min(core))), float(scale(max(core)))
    least = 0.02 if log else 0.02 * abs(high)
    longest = STRETCH * max(high - low, least)
    shown = list(core)
    for other in sorted(others, key=lambda value: max(low - scale(value), scale(value) - high)):
        wider = min(low, float(scale(other))), max(high, float(scale(other)))
        if wider[1] - wider[0] <= longest:
            low, high = wider
            shown.append(other)
    return shown


def fit_scale(axes: Axes, which: str, values: Iterable[float], log: bool = True) -> None:
    """Set the limits and the ticks of an axis, logarithmic if the values span a wide range.

    Parameters
    ----------
    axes : Axes
        Axes with the data drawn.
    which : "x" or "y"
        The axis.
    values : iterable of float
        All values to show along it.
    log : bool
        Whether the axis may be logarithmic.
    """
    from matplotlib import ticker

    drawn = np.array([value for value in values if np.isfinite(value)], dtype=float)
    axis = axes.xaxis if which == "x" else axes.yaxis
    set_limits = axes.set_xlim if which == "x" else axes.set_ylim
    low, high = drawn.min(), drawn.max()
    if not log or low <= 0 or high / low < WIDE:
        room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        set_limits(low - room, high + room)
        axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
        return
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    room = (high / low) ** 0.08
    set_limits(low / room, high * room)
    dense = (1, 1.5, 2, 3, 4, 6, 8) if high / low < 8 else (1, 2, 5)
    axis.set_major_locator(ticker.LogLocator(subs=dense if high / low < 100 else (1,)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def beyond(axes: Axes, value: float) -> tuple[float, str]:
    """Return the position of a value on the y axis, and a suffix for its name if out of range.

    An outlier is shown at the edge, with an arrow and its value.
    """
    low, high = axes.get_ylim()
    if low <= value <= high:
        return value, ""
    arrow = "\N{UPWARDS ARROW}" if value > high else "\N{DOWNWARDS ARROW}"
    return (high if value > high else low), f" {value:.3g} {arrow}"


def write_beside(
    axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], **how: Any
) -> Annotation:
    """Write a text some points off a position, by default axes fraction in x and data in y."""
    usual: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "fontsize": SMALL}
    return axes.annotate(
        text,
        place,
        xytext=offset,
        textcoords="offset points",
        annotation_clip=False,
        **(usual | how),
    )


def write_message(figure: SubFigure, sentence: str) -> None:
    """Write a wrapped message in place of a panel."""
    size = 8.5
    width = figure.bbox.width / figure.figure.dpi * 72
    letters = max(20, int(0.85 * width / (0.55 * size)))
    figure.text(
        0.5,
        0.5,
        "\n".join(textwrap.wrap(sentence, letters, break_on_hyphens=False)),
        ha="center",
        va="center",
        color=NEUTRAL,
        bbox={"boxstyle": "round,pad=0.8", "facecolor": "#F7F7F7", "edgecolor": FAINT},
    )
