"""The nine panels: one figure of all, or each by itself.

A panel is a function ``(figure, data, style, labels) -> None`` that draws into a part of a figure,
or raises :class:`~lm_eval_bh.analysis.show.plots.data.NoDataError` with a message to show instead.
A new panel is one more in :data:`PANELS`. matplotlib is loaded on use, pyplot never: no window, no
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
