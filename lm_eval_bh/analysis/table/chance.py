"""Marks uninformative accuracies: those at chance level, and zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from lm_eval_bh.analysis.read.loaded import Loaded

AT_CHANCE, NONE_RIGHT = "at chance", "all wrong"


def add_chance(rows: Iterable[dict[str, Any]], loaded: Loaded) -> None:
    """Fill in ``chance_accuracy`` and ``accuracy_note``.

    The chance accuracy of multiple choice is the mean over documents of 1 / number of choices. An
    accuracy is "at chance" if its exact binomial interval (95 %, Clopper and Pearson 1934) contains
    the chance accuracy. If an answer has to be produced, such as LAMBADA's last word, there is no
    chance level; an accuracy of 0 is then "all wrong", and comparing two of them is meaningless.
    """
    for row in rows:
        if row["accuracy"] is None or not row["documents"]:
            continue
        documents = loaded.documents(row["run_id"], row["task"])
        if documents is not None and "choices" in documents and documents["choices"].min() > 1:
            row["chance_accuracy"] = float((1 / documents["choices"]).mean())
        row["accuracy_note"] = note(row["accuracy"], row["documents"], row["chance_accuracy"])


def note(accuracy: float, documents: int, chance: float | None) -> str | None:
    """Return the note on an accuracy: "at chance", "all wrong", or None if informative.

    Parameters
    ----------
    accuracy : float
        From 0 to 1.
    documents : int
        Number of documents.
    chance : float or None
        The accuracy of guessing; None without a chance level.
    """
    if chance is None:
        return NONE_RIGHT if accuracy == 0 else None
    from scipy import stats  # not needed for reading tables

    found = stats.binomtest(round(accuracy * documents), documents)
    interval = found.proportion_ci(confidence_level=0.95, method="exact")
    return AT_CHANCE if interval.low <= chance <= interval.high else None


def with_note(cell: str, row: pd.Series) -> str:
    """Return an accuracy's cell with its note: replaced if all wrong, appended at chance."""
    said = row.get("accuracy_note")
    if said == NONE_RIGHT:
        return NONE_RIGHT
    return f"{cell} {said}" if said == AT_CHANCE and cell else cell
