"""What says nothing in a cell of a table: one function, whatever release of pandas made the cell.

pandas 3 turns the None of a column of text into NaN, which is true: no cell is asked whether it is
true, nor whether it is None.
"""

from __future__ import annotations

from typing import Any

import pandas as pd


def is_missing(cell: Any) -> bool:
    """Return whether a cell is None, NaN, NA or NaT; a list never is."""
    return cell is None or bool(pd.api.types.is_scalar(cell) and pd.isna(cell))


def holds(cell: Any) -> bool:
    """Return whether a cell is there, and true."""
    return not is_missing(cell) and bool(cell)


def text_of(cell: Any) -> str:
    """Return a cell as text, empty where it is missing."""
    return "" if is_missing(cell) else str(cell)
