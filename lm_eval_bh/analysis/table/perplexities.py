"""Chooses among lm-eval's perplexities for the comparison of a task's runs."""

from __future__ import annotations

import pandas as pd

# Perplexity -> divisor of a document's loss. The first known one is preferred.
PERPLEXITIES = {
    "perplexity": "tokens",
    "word_perplexity": "words",
    "target_perplexity": "targets",
    "byte_perplexity": "bytes",
}
# The unit of each, in words.
PERPLEXITY_UNITS = {
    "perplexity": "token",
    "word_perplexity": "word",
    "target_perplexity": "target word",
    "byte_perplexity": "byte",
}
TOKEN = PERPLEXITY_UNITS["perplexity"]
FILLED = ("perplexity", "perplexity_stderr")


def perplexity_column(frame: pd.DataFrame) -> str | None:
    """Return the perplexity with which to compare the rows of one task.

    The first of :data:`PERPLEXITIES` known for every row with a perplexity, or None.
    """
    frame = own_perplexities(frame)
    known = frame[frame[list(PERPLEXITIES)].notna().any(axis=1)]
    return next((name for name in PERPLEXITIES if len(known) and known[name].notna().all()), None)


def own_perplexities(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table in which ``perplexity`` is only the token perplexity."""
    if "perplexity_of" not in frame:  # from an earlier release
        return frame
    of_tokens = frame["perplexity_of"].isna() | (frame["perplexity_of"] == TOKEN)
    masked = {name: frame[name].where(of_tokens) for name in FILLED if name in frame}
    return frame.assign(**masked)


def fill_perplexity(frame: pd.DataFrame) -> None:
    """Use a task's own perplexity if it has no token perplexity, and name its unit.

    A task has one kind: rows without it stay empty.

    Parameters
    ----------
    frame : DataFrame
        The results; changed in place.
    """
    for _, rows in frame.groupby(["group", "task"], sort=False):
        column = perplexity_column(rows)
        if column is None:
            continue
        if rows["perplexity"].notna().any():
            column = "perplexity"
        for name in FILLED:
            frame.loc[rows.index, name] = rows[name.replace("perplexity", column)]
        known = rows.index[rows[column].notna()]
        frame.loc[known, "perplexity_of"] = PERPLEXITY_UNITS[column]
