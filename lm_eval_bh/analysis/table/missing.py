"""Missing cells of tables, in all releases of pandas.

pandas 3 turns None in a text column into NaN, which is truthy: cells are never tested for truth or
for None directly.
"""

from __future__ import annotations

from typing import Any

import pandas as pd


def is_missing(cell: Any) -> bool:
    """Return whether a cell is None, NaN, NA or NaT; a list never is."""
    return cell is None or bool(pd.api.types.is_scalar(cell) and pd.isna(cell))


def holds(cell: Any) -> bool:
    """Return whether a cell is present and true."""
    return not is_missing(cell) and bool(cell)


def text_of(cell: Any) -> str:
    """Return a cell as text, empty if it is missing."""
    return "" if is_missing(cell) else str(cell)
