"""Writes the results table for programs (CSV, JSON) and for people (Markdown, LaTeX)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_bh.files import replacing

TABLE = "bh_routing_results"
LAYERS = "bh_routing_layers"
COMPARISONS = "bh_routing_comparisons"

# Shown beside adaptive rows even where empty: a reader should notice what is missing.
STATIC = ("matched_perplexity", "matched_accuracy", "matched_by")

# What Markdown and LaTeX show; CSV and JSON contain everything.
READABLE = {
    "group": "group",
    "task": "task",
    "strategy": "strategy",
    "mean_experts": "experts",
    "perplexity": "token ppl",
    "word_perplexity": "word ppl",
    "target_perplexity": "target ppl",
    "accuracy": "accuracy",
    "matched_perplexity": "ppl of top-k at equal experts",
    "matched_accuracy": "accuracy of top-k at equal experts",
    "matched_by": "how",
    "flops_reduction_pct": "FLOPs saved (%)",
    "tokens_per_second": "tokens/s",
    "ceiling_hit_rate": "ceiling (%)",
    "floor_hit_rate": "floor (%)",
    "gini_coefficient": "Gini",
}


def write_tables(frame: pd.DataFrame, folder: Path | str) -> list[Path]:
    """Write ``bh_routing_results`` as CSV, JSON, Markdown and LaTeX, each whole or not at all.

    CSV and JSON contain every column at full precision, empty or null where something was not
    measured; Markdown and LaTeX the columns that people compare. Rows keep the order of the
    frame.

    Returns
    -------
    list of Path
        The four files.
    """
    contents = {"md": _markdown(_readable(frame)), "tex": _latex(_readable(frame))}
    return [
        *write_records(frame, folder, TABLE),
        *(_write(Path(folder) / f"{TABLE}.{suffix}", text) for suffix, text in contents.items()),
    ]


def write_records(frame: pd.DataFrame, folder: Path | str, name: str) -> list[Path]:
    """Write every column of a frame as ``<name>.csv`` and ``<name>.json``, a list of objects."""
    records = [
        {column: plain(value) for column, value in record.items()}
        for record in frame.to_dict(orient="records")
    ]
    contents = {
        "csv": frame.to_csv(index=False, lineterminator="\n"),
        "json": json.dumps(records, indent=1, allow_nan=False, ensure_ascii=False) + "\n",
    }
    return [_write(Path(folder) / f"{name}.{suffix}", text) for suffix, text in contents.items()]


def _write(path: Path, content: str) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="\n")
    return path


def plain(value: Any) -> Any:
    """Return a value of a frame as JSON knows it; what is not finite is null."""
    if value is None or value is pd.NA:
        return None
    if isinstance(value, list):
        return [plain(element) for element in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _readable(frame: pd.DataFrame) -> list[list[str]]:
    """Return the header and the rows of the columns that people compare and that hold something."""
    shown = {
        name: title
        for name, title in READABLE.items()
        if name in frame
        and (frame[name].notna().any() or (name in STATIC and frame["adaptive"].any()))
        and not (name == "group" and frame[name].nunique() == 1)
    }
    cells = [
        [_cell(plain(value)) for value in record]
        for record in frame[list(shown)].itertuples(index=False, name=None)
    ]
    return [list(shown.values()), *cells]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _latex(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    styler = pd.DataFrame(body, columns=head, dtype=object).style.hide(axis="index")
    special = {"\\": r"\textbackslash{}"} | {c: f"\\{c}" for c in "&%$#_{}"}

    def escaped(cell: Any) -> str:
        return "".join(special.get(character, character) for character in str(cell))

    styler = styler.format(escaped).format_index(escaped, axis="columns")
    return str(styler.to_latex(hrules=True, column_format="l" * len(head)))
