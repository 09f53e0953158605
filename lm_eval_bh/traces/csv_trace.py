"""Reads a plain table of routing: one row for each expert of a token in a layer.

The columns ``document, token, layer, expert`` are required, ``weight`` and ``token_id`` optional,
and others ignored. A token is named by its position in the document. Rows may come in any order; a
document's name is taken as text, even if it looks like a number.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import UNUSED
from lm_eval_bh.traces.notes import Notes
from lm_eval_bh.traces.trace_document import MOST_EXPERTS, MOST_LAYERS, TraceDocument

NEEDED = ("document", "token", "layer", "expert")
OPTIONAL = ("weight", "token_id")
MOST_CELLS = 256  # slots per row of a document, in the array that all its tokens share
FEW_CELLS = 2**20  # always allowed, however few the rows are


def read_csv(files: Sequence[Path], first: int, notes: Notes) -> Iterator[TraceDocument]:
    """Yield the documents of the tables, numbered in order of appearance.

    Parameters
    ----------
    files : sequence of Path
        ``.csv`` files with a header.
    first : int
        Number of the first document.
    notes : Notes
        Filled with the columns that are not read.

    Raises
    ------
    DataError
        If a column is missing, or holds anything but whole numbers.
    """
    for file in files:
        table = _table(file, notes)
        # Within a token and layer, slots are numbered in the order of the rows.
        table["slot"] = table.groupby(["document", "token", "layer"]).cumcount()
        for name, rows in table.groupby("document", sort=False):
            yield _document(rows, f"Document {name} of {file}", first)
            first += 1


def _table(file: Path, notes: Notes) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            # pandas would cut rows longer than the header, or take their first field as an index.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                file, dtype={"document": str}, keep_default_na=False, index_col=False
            )
    except pd.errors.ParserWarning as error:
        raise DataError(
            f"{file} is damaged: rows have more fields than its header; give a table in which "
            "every column has a name."
        ) from error
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
    if table["document"].isna().any() or (table["document"].str.strip() == "").any():
        raise DataError(f"{file} is damaged: every row must name its document.")
    if "weight" in table and not (
        pd.api.types.is_numeric_dtype(table["weight"]) and np.isfinite(table["weight"]).all()
    ):
        raise DataError(f"{file} is damaged: weight must be numbers in every row.")
    others = [str(name) for name in table if name not in NEEDED + OPTIONAL]
    if others:
        notes.add(f"{file}: the columns {', '.join(others)} are not read.")
    return table[[name for name in NEEDED + OPTIONAL if name in table]]


def _document(rows: pd.DataFrame, where: str, document: int) -> TraceDocument:
    for name, most in (("layer", MOST_LAYERS), ("expert", MOST_EXPERTS)):
        if not rows[name].between(0, most - 1).all():
            raise DataError(f"{where} is damaged: {name} must be from 0 to {most - 1}.")
    positions, token = np.unique(rows["token"], return_inverse=True)
    layers, layer = np.unique(rows["layer"], return_inverse=True)
    slot = rows["slot"].to_numpy()
    shape = len(positions), len(layers), int(slot.max()) + 1
    if shape[-1] > MOST_EXPERTS:
        raise DataError(f"{where} is damaged: a token has {shape[-1]} experts in one layer.")
    if shape[0] * shape[1] * shape[2] > max(FEW_CELLS, MOST_CELLS * len(rows)):
        raise DataError(
            f"{where} is damaged: {len(rows)} rows name {shape[0]} tokens, {shape[1]} layers and "
            f"up to {shape[2]} experts, so most of the table would be empty; write one "
            "row for each expert of every token in every layer."
        )
    experts = np.full(shape, UNUSED, dtype=np.int16)
    experts[token, layer, slot] = rows["expert"]
    weights: Any = None
    if "weight" in rows:
        weights = np.zeros(shape)
        weights[token, layer, slot] = rows["weight"]
    tokens = None
    if "token_id" in rows:
        tokens = np.zeros(len(positions), dtype=np.int64)
        tokens[token] = rows["token_id"]
        if (tokens[token] != rows["token_id"]).any():
            raise DataError(f"{where} is damaged: rows of one token have different token ids.")
    return TraceDocument.of(
        where,
        document,
        experts,
        layers=layers,
        positions=positions,
        tokens=tokens,
        weights=weights,
    )
