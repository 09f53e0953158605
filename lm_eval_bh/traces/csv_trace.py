"""Reads a plain table of routing: one row for each expert of a token in a layer.

The columns ``document, token, layer, expert`` are needed, ``weight`` and ``token_id`` are read
where they are there, and others ignored. A token is named by its position in the document. The rows
may come in any order; documents may be numbers or names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import UNUSED
from lm_eval_bh.traces.trace_document import MOST_EXPERTS, MOST_LAYERS, TraceDocument

NEEDED = ("document", "token", "layer", "expert")


def read_csv(file: Path, first: int) -> Iterator[TraceDocument]:
    """Yield the documents of a table, numbered in the order in which they occur.

    Parameters
    ----------
    file : Path
        A ``.csv`` file with a header.
    first : int
        Number of the first document.

    Raises
    ------
    DataError
        If a column is missing, or holds something else than whole numbers.
    """
    try:
        table = pd.read_csv(file)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        reason = " ".join(str(error).split())
        raise DataError(f"{file} could not be read: {reason}; give a table with a header.") from (
            error
        )
    missing = [name for name in NEEDED if name not in table]
    if missing:
        raise DataError(
            f"{file} has no column {missing[0]}: it must have {', '.join(NEEDED)}, one row for "
            "each expert of a token in a layer."
        )
    if not len(table):
        raise DataError(f"{file} has no rows: it must have one for each expert of a token.")
    for name in ("token", "layer", "expert", "token_id"):
        if name in table and not pd.api.types.is_integer_dtype(table[name]):
            raise DataError(f"{file} is damaged: {name} must be whole numbers in every row.")
    if table["document"].isna().any():
        raise DataError(f"{file} is damaged: every row must name its document.")
    if "weight" in table and not pd.api.types.is_numeric_dtype(table["weight"]):
        raise DataError(f"{file} is damaged: weight must be numbers in every row.")
    for number, (name, rows) in enumerate(table.groupby("document", sort=False)):
        yield _document(rows, f"Document {name} of {file}", first + number)


def _document(rows: pd.DataFrame, where: str, document: int) -> TraceDocument:
    for name, most in (("layer", MOST_LAYERS), ("expert", MOST_EXPERTS)):
        if not rows[name].between(0, most - 1).all():
            raise DataError(f"{where} is damaged: {name} must be from 0 to {most - 1}.")
    positions, token = np.unique(rows["token"], return_inverse=True)
    layers, layer = np.unique(rows["layer"], return_inverse=True)
    slot = rows.groupby(["token", "layer"]).cumcount().to_numpy()
    shape = len(positions), len(layers), int(slot.max()) + 1
    if shape[-1] > MOST_EXPERTS:
        raise DataError(f"{where} is damaged: a token has {shape[-1]} experts in a layer.")
    experts = np.full(shape, UNUSED, dtype=np.int64)
    experts[token, layer, slot] = rows["expert"]
    weights: Any = None
    if "weight" in rows:
        weights = np.zeros(shape)
        weights[token, layer, slot] = rows["weight"]
    tokens = None
    if "token_id" in rows:
        tokens = np.zeros(len(positions), dtype=np.int64)
        tokens[token] = rows["token_id"]
    found = TraceDocument.of(
        where,
        document,
        experts,
        layers=[int(number) for number in layers],
        positions=positions,
        tokens=tokens,
        weights=weights,
    )
    assert found is not None  # a row names an expert
    return found
