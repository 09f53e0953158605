"""Labels beside their points and lines, placed without overlaps.

Overlaps are known only once the figure is laid out: panels request labels, and
:meth:`Labels.place` positions them after the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.analysis.show.layout import settle
from lm_eval_bh.analysis.show.plots.style import SMALL, write_beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import BboxBase

GAP = 1.15  # relative to the height of a line
# Possible positions of a label: side of its point, and distance in points; best first.
PLACES = tuple(
    (x, y, distance)
    for distance in (3, 8, 14, 22)
    for x, y in ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
)


@dataclass
class Labels:
    """The labels requested by the panels of one figure."""

    _at_lines: dict[Axes, list[tuple[float, Annotation]]] = field(default_factory=dict)
    _at_points: list[tuple[Axes, Annotation]] = field(default_factory=list)

    def at_line(self, axes: Axes, y: float, text: str, colour: str) -> None:
        """Label a horizontal line at its right end, outside of the data."""
        label = write_beside(axes, text, (1, y), (3, 0), va="center", color=colour)
        self._at_lines.setdefault(axes, []).append((y, label))

    def at_point(self, axes: Axes, x: float, y: float, text: str, colour: str) -> None:
        """Label a point, on the side with free space."""
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
        label.set_in_layout(False)  # it stays inside the axes
        self._at_points.append((axes, label))

    def place(self, figure: Figure) -> None:
        """Lay the figure out, then move labels so that they do not overlap."""
        settle(figure)
        points = figure.dpi / 72
        for axes, labels in self._at_lines.items():
            labels.sort(key=lambda label: label[0])
            lines = [axes.transData.transform((0, y))[1] / points for y, _ in labels]
            for line, middle, (_, label) in zip(
                lines, spread(lines, GAP * SMALL), labels, strict=True
            ):
                label.set_position((3, middle - line))
        placed: dict[Axes, list[BboxBase]] = {}
        for axes, label in self._at_points:
            _put(axes, label, placed.setdefault(axes, []), points)


def _put(axes: Axes, label: Annotation, placed: list[BboxBase], points: float) -> None:
    """Choose the position with the smallest overlap with lines and other labels."""
    # Lines across the axes have their labels at the end.
    paths = [
        line.get_path().transformed(axes.transData)
        for line in axes.lines
        if line.get_transform() == axes.transData
    ]
    marks = np.concatenate([path.vertices for path in paths])
    half = np.array(label.get_window_extent().size) / 2 / points

    def put(place: tuple[int, int, int]) -> BboxBase:
        x, y, distance = place
        label.set_position((x * (half[0] + distance), y * (half[1] + distance)))
        return label.get_window_extent()

    def overlap(place: tuple[int, int, int]) -> int:
        box = put(place)
        inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
        around = box.padded(2 * points)
        crossed = sum(path.intersects_bbox(around, filled=False) for path in paths)
        covered = crossed + around.count_contains(marks)
        return 100 * (not inside) + 100 * box.count_overlaps(placed) + covered

    placed.append(put(min(PLACES, key=overlap)))


def spread(wanted: Sequence[float], gap: float) -> NDArray[np.float64]:
    """Return ordered positions at least ``gap`` apart, as close as possible to the wanted.

    Parameters
    ----------
    wanted : sequence of float
        Ascending.
    gap : float
        Least distance of two neighbours.

    Returns
    -------
    float64 [places]
        The least-squares solution: with ``gap`` times its index subtracted, each position must be
        no smaller than the previous one, which is isotonic regression.
    """
    from scipy.optimize import isotonic_regression

    steps = gap * np.arange(len(wanted))
    return np.asarray(isotonic_regression(np.asarray(wanted) - steps).x + steps)
