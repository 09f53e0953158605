"""Combines panels into figures with one legend outside of the data, and saves them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.show.plots import against_alpha, expert_use, tradeoffs
from lm_eval_bh.analysis.show.plots.data import Experiments, NoDataError
from lm_eval_bh.analysis.show.plots.labels import Labels
from lm_eval_bh.analysis.show.plots.style import (
    ALPHA,
    BASELINE_LINE,
    FRONT,
    NEUTRAL,
    RC,
    Style,
    write_message,
)
from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.files import figure_format, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

DPI = 300
SIZE, SINGLE_SIZE = (10.0, 9.8), (4.2, 3.1)  # inches, without the legend
LEGEND_ROW = 0.24  # inches


@dataclass(frozen=True)
class Panel:
    """One of the nine panels.

    Attributes
    ----------
    title : str
        Title of the panel.
    draw : callable
        Function that draws it.
    legend : tuple of str
        Parts of the figure's legend that it needs: "sizes", "kinds", "front", "matched".
    """

    title: str
    draw: Callable[[SubFigure, Experiments, Style, Labels], None]
    legend: tuple[str, ...] = ()


LINES = ("sizes", "kinds")
PANELS: dict[str, Panel] = {
    "perplexity": Panel("Perplexity", against_alpha.perplexity, LINES),
    "accuracy": Panel("Task accuracy", against_alpha.accuracy, LINES),
    "experts": Panel("Mean experts", against_alpha.experts, LINES),
    "heatmap": Panel(f"Mean experts by {ALPHA} and max_k", against_alpha.heat_map),
    "pareto": Panel("Perplexity against experts", tradeoffs.pareto, (*LINES, "front", "matched")),
    "constraints": Panel("Floor, mid-range, ceiling", expert_use.constraints),
    "utilization": Panel("Expert utilisation", expert_use.utilization),
    "layers": Panel("Mean experts of each layer", expert_use.layers, LINES),
    "speed": Panel("Perplexity against speed", tradeoffs.speed, LINES),
}


def create_comprehensive_visualization(
    results_df: pd.DataFrame,
    output_path: Path | str | None = None,
    *,
    layers: pd.DataFrame | None = None,
) -> Figure:
    """Draw all nine panels.

    Parameters
    ----------
    results_df : DataFrame
        One row per experiment of one group: the frame of ``load_experiments``, or a
        ``bh_routing_results.csv`` read back.
    output_path : Path or str, optional
        A file to write: png (300 dots an inch), pdf or svg, by its suffix.
    layers : DataFrame, optional
        The layers of ``load_experiments``; without them the panel of layers says so.

    Returns
    -------
    Figure
        Displayed by notebooks.

    Raises
    ------
    DataError
        If the table lacks columns or mixes groups.
    ParameterError
        If the suffix is not a supported format.
    """
    return _create(results_df, list(PANELS), output_path, layers, SIZE)


def create_single_panel(
    results_df: pd.DataFrame,
    panel: str,
    output_path: Path | str | None = None,
    *,
    layers: pd.DataFrame | None = None,
) -> Figure:
    """Draw one of :data:`PANELS`, at a size for one column of a page.

    Parameters
    ----------
    panel : str
        Name of the panel.
    results_df, output_path, layers
        As for :func:`create_comprehensive_visualization`.

    Raises
    ------
    ParameterError
        If there is no such panel.
    """
    if panel not in PANELS:
        raise ParameterError(
            f"There is no panel {panel!r}: use one of {', '.join(PANELS)}"
            f"{did_you_mean(panel, PANELS)}."
        )
    return _create(results_df, [panel], output_path, layers, SINGLE_SIZE)


def _create(
    frame: pd.DataFrame,
    names: Sequence[str],
    output_path: Path | str | None,
    layers: pd.DataFrame | None,
    size: tuple[float, float],
) -> Figure:
    import matplotlib as mpl

    suffix = "png" if output_path is None else figure_format(output_path)
    data = Experiments(frame, layers)
    style = Style(data.sizes, data.variants)
    with mpl.rc_context(RC):
        needed = {part for name in names for part in PANELS[name].legend}
        rows = _legend_rows(data, style, needed, 6 if len(names) > 1 else 4)
        foot_height = LEGEND_ROW * len(rows) + 0.06
        heights = [size[1], foot_height]
        figure = _figure((size[0], sum(heights)))
        body, foot = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
        across = min(3, len(names))
        parts = body.subfigures(
            -(-len(names) // across), across, squeeze=False, wspace=0.04, hspace=0.05
        )
        labels = Labels()
        for name, part in zip(names, parts.flat, strict=True):
            panel = PANELS[name]
            part.suptitle(panel.title, x=0.02, ha="left", fontsize="large", fontweight="bold")
            try:
                panel.draw(part, data, style, labels)
            except NoDataError as missing:
                write_message(part, str(missing))
        for number, handles in enumerate(rows):
            foot.legend(
                handles=handles,
                loc="center",
                bbox_to_anchor=(0.5, 1 - (number + 0.5) / len(rows)),
                ncols=len(handles),
                frameon=False,
                handlelength=2.4,
                columnspacing=1.4,
            )
        labels.place(figure)
        if output_path is not None:
            with replacing(output_path) as temporary:
                _write(figure, temporary, suffix)
    return figure


def _figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure that notebooks can show without pyplot."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png")
            return content.getvalue()

    return NotebookFigure(figsize=size, dpi=100, layout="constrained")


def _write(figure: Figure, path: Path, suffix: str) -> None:
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # same data, same file
    figure.savefig(path, format=suffix, dpi=DPI, metadata=undated.get(suffix))


def _legend_rows(data: Experiments, style: Style, needed: set[str], most: int) -> list[list[Any]]:
    """Return the rows of the figure's legend, sizes first, with at most ``most`` entries."""
    from matplotlib.lines import Line2D

    def entry(label: str, **how: Any) -> Line2D:
        return Line2D([], [], label=label, **({"color": NEUTRAL} | how))

    sizes, kinds = [], []
    if len(data.adaptive):
        first = style.line(data.variants[0])
        name = f"{data.variants[0]}, " if len(data.variants) == 1 else ""
        sizes = [
            entry(f"{name}max {size}", linestyle=first, **style.point(size)) for size in style.sizes
        ]
        if len(data.variants) > 1:
            kinds += [entry(variant, linestyle=style.line(variant)) for variant in data.variants]
    if len(data.static):
        kinds.append(entry("static top-k", **style.hollow(np.nan), linestyle=BASELINE_LINE))
    if len(data.controls):
        kinds.append(entry("other control", linestyle="", marker="x"))
    front = [entry("Pareto front", **FRONT)]
    matched = [
        entry(
            f"top-k at equal experts, {how}",
            linestyle="",
            marker="d",
            markersize=4,
            markerfacecolor=face,
        )
        for how, face in (("measured", NEUTRAL), ("interpolated", "white"))
        if (data.rows["matched_by"] == how).any()
    ]
    kinds = [*(kinds if "kinds" in needed else ()), *(front if "front" in needed else ())]
    parts = (
        (sizes if "sizes" in needed else [], most),
        (kinds, most - 2),
        (matched if "matched" in needed else [], most // 3),
    )
    return [part[i : i + width] for part, width in parts for i in range(0, len(part), width)]
