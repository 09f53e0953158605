"""Recommends a configuration, by a stated criterion."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pandas as pd

from lm_eval_bh.analysis.table.missing import holds, is_missing
from lm_eval_bh.analysis.table.perplexities import PERPLEXITIES
from lm_eval_bh.errors import ParameterError

# Means of experts this close (relatively) count as equal; matched_budget has the same tolerance.
SAME_EXPERTS = 0.02


@dataclass(frozen=True)
class Candidate:
    """The verdict on one configuration.

    Attributes
    ----------
    strategy, run_id : str
        Its name, and its first run.
    experts : float
        Mean experts per token over all layers, averaged over the tasks.
    adaptive : bool
        Whether the number of experts depends on the token.
    log_ratio : float
        Log of its perplexity over the native model's, averaged over the tasks; NaN if unknown.
    worst : float
        The largest upper end of an interval of that ratio over the tasks; NaN if unknown.
    native : bool
        Whether it is the model's own top-k.
    verdict : str
        Why it qualifies or does not.
    qualifies : bool
        Whether the rule allows it.
    """

    strategy: str
    run_id: str
    experts: float
    adaptive: bool
    native: bool
    log_ratio: float = math.nan
    worst: float = math.nan
    verdict: str = ""
    qualifies: bool = False


@dataclass(frozen=True)
class Recommendation:
    """The recommendation for one group of comparable experiments.

    Attributes
    ----------
    group : int
        The column ``group`` of the experiments.
    rule : str
        The criterion in words.
    chosen : Candidate or None
        None if no configuration qualifies.
    sentence : str
        The recommendation in words.
    candidates : tuple of Candidate
        All judged configurations, those with the fewest experts first.
    tasks : tuple of str
        The tasks with a perplexity, on each of which the rule must hold.
    """

    group: int
    rule: str
    chosen: Candidate | None
    sentence: str
    candidates: tuple[Candidate, ...] = ()
    tasks: tuple[str, ...] = ()


def recommend(
    frame: pd.DataFrame,
    comparisons: pd.DataFrame,
    *,
    margin: float = 0.01,
    confidence: float = 0.95,
) -> list[Recommendation]:
    """Recommend one configuration for each group of experiments.

    The one with the fewest experts whose perplexity is at most ``margin`` worse than that of the
    model's own top-k: on every task with a perplexity, the paired interval of the ratio ends at or
    below ``1 + margin``. An adaptive rule is not recommended if a static top-k with as many or
    fewer experts (within 2 %) measured better.

    Parameters
    ----------
    frame : DataFrame
        Experiments, see :func:`~lm_eval_bh.analysis.table.experiments.load_experiments`.
    comparisons : DataFrame
        What :func:`~lm_eval_bh.analysis.compare.paired.compare` returned for them with
        ``baseline="native"``; its ``ratio_high`` is the upper end at ``confidence``.
    margin : float
        Relative: 0.01 is 1 %.
    confidence : float
        Confidence of the comparisons.

    Raises
    ------
    ParameterError
        If the margin or the confidence is not between 0 and 1.
    """
    for name, value in (("margin", margin), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ParameterError(f"{name} must be a number between 0 and 1, not {value}.")
    return [
        _recommend(int(group), rows, comparisons[comparisons["group"] == group], margin, confidence)
        for group, rows in frame.groupby("group", sort=True)
    ]


def _recommend(
    group: int, rows: pd.DataFrame, compared: pd.DataFrame, margin: float, confidence: float
) -> Recommendation:
    rule = (
        f"The fewest experts with a perplexity at most {100 * margin:g} % worse than that of the "
        f"model's own top-k: on every task with a perplexity, the paired {100 * confidence:g} % "
        "interval of the ratio must end there. An adaptive rule does not qualify if a static top-k "
        "with as many or fewer experts measured better."
    )
    measured = rows[rows["mode"] != "analyze"]  # those ran with the model's own k
    tasks = tuple(sorted(measured.loc[_has_perplexity(measured), "task"].unique()))
    if not tasks:
        return Recommendation(
            group, rule, None, "No task has a perplexity, so there is no recommendation."
        )
    judged = [
        _judge(some, compared, tasks, margin)
        for _, some in measured.groupby("configuration", sort=False)
    ]
    judged = [_unless_beaten(candidate, judged) for candidate in judged]
    judged.sort(key=lambda c: (c.experts, c.adaptive, c.log_ratio))
    chosen = next((candidate for candidate in judged if candidate.qualifies), None)
    return Recommendation(group, rule, chosen, _sentence(chosen, judged), tuple(judged), tasks)


def _has_perplexity(rows: pd.DataFrame) -> pd.Series:
    return rows[list(PERPLEXITIES)].notna().any(axis=1)


def _judge(
    rows: pd.DataFrame, compared: pd.DataFrame, tasks: tuple[str, ...], margin: float
) -> Candidate:
    """Judge one configuration by its interval on every task."""
    first = rows.iloc[0]
    candidate = Candidate(
        strategy=first["strategy"],
        run_id=first["run_id"],
        experts=float(rows["avg_experts_model"].mean()),
        adaptive=bool(first["adaptive"]),
        native=first["mode"] == "native" or _takes_the_native_k(first),
    )
    if math.isnan(candidate.experts):
        return replace(candidate, verdict="its number of experts is not known")
    if candidate.native:
        verdict = "the others are compared with it"
        return replace(candidate, log_ratio=0.0, worst=1.0, qualifies=True, verdict=verdict)
    found = compared[
        compared["run_id"].isin(rows["run_id"])
        & (compared["metric"].isin(PERPLEXITIES) | compared["metric"].isna())
    ].set_index("task")
    for task in tasks:
        if task not in found.index:
            return replace(candidate, verdict=f"{task} was not run")
        if reason := found.loc[task, "reason"]:
            return replace(candidate, verdict=f"{task}: {reason}")
    found = found.loc[list(tasks)]
    worst = float(found["ratio_high"].max())
    return replace(
        candidate,
        log_ratio=float(found["ratio"].map(math.log).mean()),
        worst=worst,
        qualifies=worst <= 1 + margin,
        verdict=f"interval ends at {as_change(worst)} on {found['ratio_high'].idxmax()}",
    )


def _takes_the_native_k(row: pd.Series) -> bool:
    known = not is_missing(row["max_k"])
    return holds(row["baseline"]) and known and bool(row["max_k"] == row["native_top_k"])


def _unless_beaten(candidate: Candidate, others: list[Candidate]) -> Candidate:
    """Return the candidate, disqualified if a static top-k is better with no more experts."""
    if not (candidate.adaptive and candidate.qualifies):
        return candidate
    for other in others:
        if (
            not other.adaptive
            and other.experts <= candidate.experts * (1 + SAME_EXPERTS)
            and other.log_ratio < candidate.log_ratio
        ):
            verdict = (
                f"{candidate.verdict}, but {other.strategy} is better with {other.experts:.2f} "
                "experts"
            )
            return replace(candidate, qualifies=False, verdict=verdict)
    return candidate


def _sentence(chosen: Candidate | None, judged: list[Candidate]) -> str:
    native = next((candidate for candidate in judged if candidate.native), None)
    if native is None:
        return (
            "No configuration qualifies, because the model's own top-k is missing: "
            "run it too, with --log_samples."
        )
    if chosen is None:
        return "The unchanged model is the only configuration: run --model hf-bh too."
    if chosen.native:
        return (
            f"No configuration with fewer experts qualifies: stay with {chosen.strategy}, "
            "the model's own top-k."
        )
    fewer = 100 * (1 - chosen.experts / native.experts)
    return (
        f"Use {chosen.strategy}: {chosen.experts:.2f} experts per token instead of "
        f"{native.experts:g} ({fewer:.0f} % fewer), perplexity "
        f"{as_change(math.exp(chosen.log_ratio))} on average over the tasks and "
        f"{as_change(chosen.worst)} at the worst end of an interval."
    )


def as_change(ratio: float) -> str:
    """Return a ratio of perplexities in words: ``"0.50 % worse"``."""
    percent = 100 * (ratio - 1)
    return f"{abs(percent):.2f} % {'worse' if percent > 0 else 'better'}"
