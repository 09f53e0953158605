"""Which perplexity the runs of a task are compared by: the harness has several."""

from __future__ import annotations

import pandas as pd

# Perplexities, the first one known is the one to speak of -> what of a document they divide by.
PERPLEXITIES = {
    "perplexity": "tokens",
    "word_perplexity": "words",
    "target_perplexity": "targets",
    "byte_perplexity": "bytes",
}
# What each of them is counted per, in words.
PERPLEXITY_UNITS = {
    "perplexity": "token",
    "word_perplexity": "word",
    "target_perplexity": "target word",
    "byte_perplexity": "byte",
}


def perplexity_column(frame: pd.DataFrame) -> str | None:
    """Return the perplexity to compare the rows of one task by.

    The first of :data:`PERPLEXITIES` that all rows have that have any; None if there is none.
    """
    known = frame[frame[list(PERPLEXITIES)].notna().any(axis=1)]
    return next((name for name in PERPLEXITIES if len(known) and known[name].notna().all()), None)
