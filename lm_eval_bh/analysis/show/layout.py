"""Reproducible layout of figures, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lm_eval_bh.analysis.show.names import show_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def settle(figure: Figure) -> None:
    """Lay a figure out once, with literal names and rounded positions.

    The solver of matplotlib's constrained layout orders its variables by memory address: the last
    bits differ from run to run, and so do the names that SVG derives from such numbers.
    """
    show_names(figure)  # before the layout, which makes room for names
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    parts = list(figure.subfigs)
    for part in parts:
        part.bbox_relative.set_points(part.bbox_relative.get_points().round(6))
        parts += part.subfigs
    for axes in figure.axes:
        axes.set_position(np.round(axes.get_position().bounds, 6))
