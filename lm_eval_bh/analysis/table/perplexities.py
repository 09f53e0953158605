"""Which perplexity the runs of a task are compared by: lm-eval has several."""

from __future__ import annotations

import pandas as pd

# Perplexity -> what a document's loss is divided by. The first one known is preferred.
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


def perplexity_column(frame: pd.DataFrame) -> str | None:
    """Return the perplexity to compare the rows of one task by.

    The first of :data:`PERPLEXITIES` known for every row with a perplexity, or None.
    """
    known = frame[frame[list(PERPLEXITIES)].notna().any(axis=1)]
    return next((name for name in PERPLEXITIES if len(known) and known[name].notna().all()), None)
