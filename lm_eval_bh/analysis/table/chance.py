"""Accuracies that say nothing: those of guessing, and those of a model that has nothing right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from lm_eval_bh.analysis.read.loaded import Loaded

AT_CHANCE, NONE_RIGHT = "at chance", "all wrong"


def add_chance(rows: Iterable[dict[str, Any]], loaded: Loaded) -> None:
    """Fill in ``chance_accuracy`` and ``accuracy_note``.

    Multiple choice has an accuracy of chance, the mean over documents of 1 / number of choices. An
    accuracy is "at chance" where its exact binomial interval (95 %, Clopper and Pearson 1934)
    holds that. Where an answer has to be produced, as LAMBADA's last word, nothing is guessed; an
    accuracy of 0 is then "all wrong", and two of them side by side compare nothing.
    """
    for row in rows:
        if row["accuracy"] is None or not row["documents"]:
            continue
        documents = loaded.documents(row["run_id"], row["task"])
        if documents is not None and "choices" in documents and documents["choices"].min() > 1:
            row["chance_accuracy"] = float((1 / documents["choices"]).mean())
        row["accuracy_note"] = note(row["accuracy"], row["documents"], row["chance_accuracy"])


def note(accuracy: float, documents: int, chance: float | None) -> str | None:
    """Return what an accuracy is of: "at chance", "all wrong", or None where it tells something.

    Parameters
    ----------
    accuracy : float
        From 0 to 1.
    documents : int
        That it is the mean over.
    chance : float or None
        The accuracy of guessing; None where nothing can be guessed.
    """
    if chance is None:
        return NONE_RIGHT if accuracy == 0 else None
    from scipy import stats  # reading tables does without

    found = stats.binomtest(round(accuracy * documents), documents)
    interval = found.proportion_ci(confidence_level=0.95, method="exact")
    return AT_CHANCE if interval.low <= chance <= interval.high else None


def with_note(cell: str, row: pd.Series) -> str:
    """Return a cell of an accuracy with its note: instead of nothing right, behind chance."""
    said = row.get("accuracy_note")
    if said == NONE_RIGHT:
        return NONE_RIGHT
    return f"{cell} {said}" if said == AT_CHANCE and cell else cell
