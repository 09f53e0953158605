"""The verdict on a comparison of two runs, as a word and as a sentence."""

from __future__ import annotations

import pandas as pd

from lm_eval_bh.analysis.table.missing import is_missing

WORDS = ("better", "worse", "higher", "lower", "equivalent", "undecided")


def verdict_of(row: pd.Series, level: float, power: float) -> tuple[str | None, str]:
    """Return the verdict on one row of a comparison.

    Parameters
    ----------
    row : Series
        A row with the columns of :data:`~lm_eval_bh.analysis.compare.two_runs.COLUMNS`.
    level : float
        Level of the adjusted p-values.
    power : float
        Power of ``documents_needed`` and ``detectable``.

    Returns
    -------
    str or None
        One of :data:`WORDS` about B: "higher" or "lower" if it is unknown which is better;
        "equivalent" also if B differs by less than the margin. None without a comparison.
    str
        The sentence.
    """
    parts = [str(row[name]) for name in ("task", "metric") if not is_missing(row[name])]
    if not is_missing(row["filter"]) and row["filter"] != "none":
        parts.append(f"({row['filter']})")
    subject = " ".join(parts)
    if not is_missing(row["reason"]):
        return None, f"{subject}: not compared, {row['reason']}."
    differs = row["p_adjusted"] <= level
    equal = row["equivalence_p_adjusted"] <= level
    word = _direction(row)
    size = f"B is {size_of(row, change_of(row))} {word} than A" if word else "B is the same as A"
    size += f" {interval_of(row)}, {row['documents']:,} documents"
    tests = f"p = {row['p_adjusted']:.2g}"
    within = f"the margin of {size_of(row, row['margin'])}"
    if equal:
        return "equivalent", (
            f"{subject}: equivalent: {size}, less than {within} (p of a difference that large: "
            f"{row['equivalence_p_adjusted']:.2g}){', though not the same' if differs else ''}."
        )
    if differs:
        return word, f"{subject}: {size} ({tests})."
    shown = ""
    if not is_missing(row["detectable"]):
        shown = (
            f"; with {100 * power:g} % power this many documents show a difference of "
            f"{size_of(row, row['detectable'])} or more"
        )
    if not is_missing(row["documents_needed"]):
        shown += f", and a difference of the measured size needs {row['documents_needed']:,}"
    return "undecided", (
        f"{subject}: undecided: {size}, which shows neither a difference ({tests}) nor equivalence "
        f"within {within}{shown}."
    )


def change_of(row: pd.Series) -> float:
    """Return the relative change of a perplexity, the difference of anything else."""
    return float(row["difference"] if is_missing(row["ratio"]) else row["ratio"] - 1)


def _direction(row: pd.Series) -> str | None:
    """Return B's direction by sign alone; None if it is the same."""
    if not row["difference"]:
        return None
    higher = row["difference"] > 0
    if is_missing(row["higher_is_better"]):
        return "higher" if higher else "lower"
    return "better" if higher == row["higher_is_better"] else "worse"


def size_of(row: pd.Series, value: float) -> str:
    """Return a difference in words, without its sign."""
    return f"{abs(value):.3g}" if is_missing(row["ratio"]) else f"{100 * abs(value):.3g} %"


def interval_of(row: pd.Series) -> str:
    """Return the interval of :func:`change_of` in words."""
    if is_missing(row["ratio"]):
        return f"[{row['difference_low']:+.3g}, {row['difference_high']:+.3g}]"
    low, high = (100 * (row[name] - 1) for name in ("ratio_low", "ratio_high"))
    return f"[{low:+.3g} %, {high:+.3g} %]"
