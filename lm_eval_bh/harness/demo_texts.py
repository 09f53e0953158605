"""Loads the texts of the ``bh_demo_*`` tasks, which are shipped with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from lm_eval_bh.errors import DataError
from lm_eval_bh.resources import shipped

FIELDS: dict[str, dict[str, type]] = {
    "wikitext": {"page": str},
    "lambada": {"text": str},
    "hellaswag": {
        "activity_label": str,
        "ctx_a": str,
        "ctx_b": str,
        "endings": list,
        "label": str,
    },
}


def load_demo(bh_demo_text: str, **_: Any) -> DatasetDict:
    """Return one of the demo texts as the split ``test``.

    Parameters
    ----------
    bh_demo_text
        ``wikitext``, ``lambada`` or ``hellaswag``: the data set whose format the text follows.
    **_
        Metadata of the task and arguments of the model, from lm-eval; unused.

    Raises
    ------
    DataError
        If the file is missing or a line of it is damaged.
    """
    path = shipped("tasks") / "demo" / f"{bh_demo_text}.jsonl"
    return DatasetDict({"test": Dataset.from_list(_read(path, FIELDS[bh_demo_text]))})


def demo_documents(count: int) -> list[str]:
    """Return the first documents of all demo texts in turn, fewer if there are fewer."""
    texts = [load_demo(name)["test"] for name in FIELDS]
    longest = max(map(len, texts))
    found = [_whole(rows[row]) for row in range(longest) for rows in texts if row < len(rows)]
    return found[:count]


def _whole(row: dict[str, Any]) -> str:
    if "endings" in row:  # HellaSwag: with the correct ending
        return f"{row['ctx_a']} {row['ctx_b']} {row['endings'][int(row['label'])]}"
    return str(row.get("page") or row["text"])


def _read(path: Path, fields: dict[str, type]) -> list[dict[str, Any]]:
    mend = "reinstall lm-eval-bh"
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The demo text {path} cannot be read ({error}): {mend}.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"Line {number} of the demo text {path}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON ({error}): {mend}.") from error
        for field, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise DataError(f"{where} lacks a {kind.__name__} {field!r}: {mend}.")
        rows.append(row)
    return rows
