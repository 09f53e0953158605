"""Text that stands beside what it names, moved until nothing lies on anything else.

Where text overlaps is known only once the figure is laid out. So panels ask for labels, and after
the layout :meth:`Labels.place` puts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.analysis.show.plots.style import SMALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

GAP = 1.15  # of the height of a line
# Where a label may stand: on which side of its point, and how far off in points; best places first.
PLACES = tuple(
    (x, y, distance)
    for distance in (3, 8, 14, 22)
    for x, y in ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
)


@dataclass
class Labels:
    """The labels that the panels of one figure asked for."""

    _at_lines: dict[Axes, list[tuple[float, Annotation]]] = field(default_factory=dict)
    _at_points: list[tuple[Axes, Annotation]] = field(default_factory=list)

    def at_line(self, axes: Axes, y: float, text: str, colour: str) -> None:
        """Name a horizontal line at its right end, outside of the data."""
        label = axes.annotate(
            text,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=SMALL,
            annotation_clip=False,
        )
        self._at_lines.setdefault(axes, []).append((y, label))

    def at_point(self, axes: Axes, x: float, y: float, text: str, colour: str) -> None:
        """Name a point, on whatever side of it there is room."""
        label = axes.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            color=colour,
            fontsize=SMALL,
        )
        label.set_in_layout(False)  # it stays within the axes
        self._at_points.append((axes, label))

    def place(self, figure: Figure) -> None:
        """Move every label to where it lies on nothing else; the layout stays as it is then."""
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.execute(figure)
        figure.set_layout_engine("none")
        points = figure.dpi / 72
        for axes, labels in self._at_lines.items():
            labels.sort(key=lambda label: label[0])
            lines = [axes.transData.transform((0, y))[1] / points for y, _ in labels]
            for line, middle, (_, label) in zip(
                lines, spread(lines, GAP * SMALL), labels, strict=True
            ):
                label.set_position((3, middle - line))
        for axes, label in self._at_points:
            self._put(axes, label, points)

    def _put(self, axes: Axes, label: Annotation, points: float) -> None:
        """Choose the place that overlaps least with the points of the axes and other labels."""
        number = self._at_points.index((axes, label))
        boxes = [other.get_window_extent() for at, other in self._at_points[:number] if at is axes]
        marks = drawn_points(axes)
        reach = 2 * points

        half = np.array([label.get_window_extent().width, label.get_window_extent().height]) / 2

        def put(place: tuple[int, int, int]) -> None:
            x, y, distance = place
            width, height = half / points
            label.set_position((x * (width + distance), y * (height + distance)))

        def overlap(place: tuple[int, int, int]) -> float:
            put(place)
            box = label.get_window_extent()
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            covered = (
                (marks[:, 0] > box.x0 - reach)
                & (marks[:, 0] < box.x1 + reach)
                & (marks[:, 1] > box.y0 - reach)
                & (marks[:, 1] < box.y1 + reach)
            )
            others = sum(box.overlaps(other) for other in boxes)
            return 100.0 * (not inside) + 100 * others + float(covered.sum())

        put(min(PLACES, key=overlap))


def drawn_points(axes: Axes, step: float = 4.0) -> NDArray[np.float64]:
    """Return what the markers and lines of axes cover, in pixels.

    Parameters
    ----------
    step : float
        How far apart the points of a line are, in pixels.

    Returns
    -------
    float64 [points, 2]
        Every marker, and points along every line.
    """
    found = [np.empty((0, 2))]
    for line in axes.lines:
        if line.get_transform() != axes.transData:
            continue  # lines across the axes, which have their labels at their end
        data = np.asarray(line.get_xydata(), dtype=float)
        pixels = axes.transData.transform(data[np.isfinite(data).all(axis=1)])
        found.append(pixels)
        if line.get_linestyle() == "None":
            continue
        for start, end in pairwise(pixels):
            count = int(np.hypot(*(end - start)) // step)
            found.append(np.linspace(start, end, count, endpoint=False))
    return np.concatenate(found)


def spread(wanted: Sequence[float], gap: float) -> NDArray[np.float64]:
    """Return places at least ``gap`` apart, in the same order and as near as can be to the wanted.

    Parameters
    ----------
    wanted : sequence of float
        Ascending.
    gap : float
        Least distance of two neighbours.

    Returns
    -------
    float64 [places]
        With the least sum of squared distances: less ``gap`` times its number, each place must be
        no smaller than the one before, which is isotonic regression.
    """
    from scipy.optimize import isotonic_regression

    steps = gap * np.arange(len(wanted))
    return np.asarray(isotonic_regression(np.asarray(wanted) - steps).x + steps)
