"""The nine panels, in one figure or separately.

A panel is a function ``(figure, data, style, labels) -> None`` that draws into a part of a figure,
or raises :class:`~lm_eval_bh.analysis.show.plots.data.NoDataError` with a message to show instead.
To add a panel, add it to :data:`PANELS`. matplotlib is loaded on use, pyplot never: no window, no
global state.
"""

from __future__ import annotations

from lm_eval_bh.analysis.show.plots.figure import (
    PANELS,
    Panel,
    create_comprehensive_visualization,
    create_single_panel,
)

__all__ = ["PANELS", "Panel", "create_comprehensive_visualization", "create_single_panel"]
