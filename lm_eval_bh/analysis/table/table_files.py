"""Writes the results table for programs (CSV, JSON) and for people (Markdown, LaTeX)."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.table.columns import EARLIER
from lm_eval_bh.analysis.table.missing import is_missing
from lm_eval_bh.analysis.table.perplexities import own_perplexities
from lm_eval_bh.errors import DataError
from lm_eval_bh.files import replacing_all

if TYPE_CHECKING:
    from lm_eval_bh.analysis.read.loaded import Loaded

TABLE = "bh_routing_results"
LAYERS = "bh_routing_layers"
COMPARISONS = "bh_routing_comparisons"

# Shown for adaptive rows even if empty, so that readers notice what is missing.
STATIC = ("matched_perplexity", "matched_accuracy", "matched_by")

# Columns of Markdown and LaTeX; CSV and JSON contain everything.
READABLE = {
    "group": "group",
    "task": "task",
    "strategy": "strategy",
    "avg_experts": "experts",
    "distinct_experts": "distinct experts per step",
    "perplexity": "token ppl",
    "word_perplexity": "word ppl",
    "target_perplexity": "target ppl",
    "accuracy": "accuracy",
    "accuracy_note": "which is",
    "matched_perplexity": "ppl of top-k at equal experts",
    "matched_accuracy": "accuracy of top-k at equal experts",
    "matched_by": "how",
    "flops_reduction_pct": "FLOPs saved (%)",
    "speed_ratio": "times as fast",
    "ceiling_hit_rate": "ceiling (%)",
    "floor_hit_rate": "floor (%)",
    "gini_coefficient": "Gini",
}


def write_tables(frame: pd.DataFrame, folder: Path | str) -> list[Path]:
    """Write ``bh_routing_results`` as CSV, JSON, Markdown and LaTeX, all four or none.

    CSV and JSON contain every column at full precision, empty or null if something was not
    measured; Markdown and LaTeX only the columns that people compare. Rows keep the order of the
    frame.

    Returns
    -------
    list of Path
        The four files.
    """
    with _replacing_texts(_texts(frame), Path(folder)) as paths:
        return paths


@contextmanager
def replacing_tables(
    loaded: Loaded, compared: pd.DataFrame, folder: Path | str
) -> Iterator[list[Path]]:
    """Write results, layers and comparisons, and put them in place together after the block.

    If the block raises, none of them changes.

    Parameters
    ----------
    loaded : Loaded
        The results, written like :func:`write_tables`, and the layers, as CSV and JSON.
    compared : DataFrame
        From :func:`~lm_eval_bh.analysis.compare.paired.compare`, written as CSV and JSON.
    folder : Path or str
        Output folder, made if missing.

    Yields
    ------
    list of Path
        The files, to which the block may add others.
    """
    texts = _texts(loaded.frame) | _records(loaded.layers, LAYERS) | _records(compared, COMPARISONS)
    with _replacing_texts(texts, Path(folder)) as paths:
        yield paths


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file written by this module.

    Raises
    ------
    DataError
        If it cannot be read, or is not a table.
    """
    try:
        return of_this_release(pd.read_csv(path))
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise DataError(
            f"The table {path} could not be read ({reason}); write it again with aggregate."
        ) from error


def of_this_release(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table with this release's column names.

    ``tokens_per_second`` of earlier releases came from an evaluation's passes, and is not compared
    with anything.
    """
    if set(EARLIER) & set(frame):
        frame = frame.rename(columns=EARLIER)
    if "tokens_per_second" not in frame or "evaluation_tokens_per_second" in frame:
        return frame
    return frame.rename(columns={"tokens_per_second": "evaluation_tokens_per_second"}).drop(
        columns="latency_ms_per_token", errors="ignore"
    )


def _texts(frame: pd.DataFrame) -> dict[str, str]:
    """Return the files of the results: name -> content."""
    return _records(frame, TABLE) | {
        f"{TABLE}.md": _markdown(_readable(frame)),
        f"{TABLE}.tex": _latex(_readable(frame)),
    }


def _records(frame: pd.DataFrame, name: str) -> dict[str, str]:
    """Return every column of a frame as ``<name>.csv`` and ``<name>.json``, a list of objects."""
    records = [
        {column: plain(value) for column, value in record.items()}
        for record in frame.to_dict(orient="records")
    ]
    return {
        f"{name}.csv": frame.to_csv(index=False, lineterminator="\n"),
        f"{name}.json": json.dumps(records, indent=1, allow_nan=False, ensure_ascii=False) + "\n",
    }


@contextmanager
def _replacing_texts(texts: Mapping[str, str], folder: Path) -> Iterator[list[Path]]:
    paths = [folder / name for name in texts]
    with replacing_all(paths) as temporaries:
        for temporary, text in zip(temporaries, texts.values(), strict=True):
            # A path that is not UTF-8 holds lone surrogates.
            temporary.write_text(text, "utf-8", "backslashreplace", newline="\n")
        yield paths


def plain(value: Any) -> Any:
    """Return a frame's value for JSON; null if it is not finite."""
    if is_missing(value):
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
    """Return header and rows of the columns that people compare, without empty ones."""
    frame = own_perplexities(frame)
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
    if "speed_ratio" in shown:  # a ratio needs its interval
        at = list(shown).index("speed_ratio")
        ratios = frame[["speed_ratio", "speed_ratio_low", "speed_ratio_high"]]
        for row, (ratio, low, high) in zip(cells, ratios.to_numpy(float), strict=True):
            if not (np.isnan(ratio) or np.isnan(low)):
                row[at] = f"{ratio:.2f} [{low:.2f}, {high:.2f}]"
    return [list(shown.values()), *cells]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[_escaped(cell) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(cell: str) -> str:
    """Return a cell that Markdown shows literally: no column break, no HTML, one line."""
    return " ".join(html.escape(cell, quote=False).replace("|", "\\|").splitlines())


def _latex(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    styler = pd.DataFrame(body, columns=head, dtype=object).style.hide(axis="index")
    special = {"\\": r"\textbackslash{}"} | {c: f"\\{c}" for c in "&%$#_{}"}

    def escaped(cell: Any) -> str:
        return "".join(special.get(character, character) for character in str(cell))

    styler = styler.format(escaped).format_index(escaped, axis="columns")
    return str(styler.to_latex(hrules=True, column_format="l" * len(head)))
