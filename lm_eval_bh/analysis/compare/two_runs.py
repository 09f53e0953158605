"""Compares any two runs of lm-eval document by document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.compare.paired_measures import (
    Interval,
    check_settings,
    compare_perplexities,
    compare_scores,
)
from lm_eval_bh.analysis.compare.paired_tests import adjusted, bootstrap_interval
from lm_eval_bh.analysis.compare.power import detectable, documents_needed
from lm_eval_bh.analysis.compare.verdicts import verdict_of
from lm_eval_bh.analysis.read.averages import counted, is_checkable, ratio_confirmed, reported
from lm_eval_bh.analysis.read.documents import DIFFER, different
from lm_eval_bh.analysis.read.results_file import Notices, Run
from lm_eval_bh.analysis.read.run_folders import find_files, read_runs
from lm_eval_bh.analysis.read.sample_scores import (
    LOSSES,
    OTHER_UNITS,
    SampleScores,
    read_scores,
)
from lm_eval_bh.analysis.table.columns import typed
from lm_eval_bh.analysis.table.strategy_names import strategy_label
from lm_eval_bh.errors import DataError, ParameterError, did_you_mean

NAMED = 5  # tasks or files in a message
COLUMNS: dict[str, str] = {
    "task": "object",
    "metric": "object",
    "filter": "object",
    "documents": "Int64",
    "a": "float64",
    "b": "float64",
    "difference": "float64",  # b - a
    "difference_low": "float64",
    "difference_high": "float64",
    "ratio": "float64",  # b / a; of perplexities only
    "ratio_low": "float64",
    "ratio_high": "float64",
    "only_a": "Int64",  # documents that only A got right
    "only_b": "Int64",
    "test": "object",
    "p_value": "float64",  # null hypothesis: no difference
    "p_adjusted": "float64",
    "margin": "float64",  # relative for perplexities, absolute for others
    "equivalence_p": "float64",  # null hypothesis: a difference as large as the margin
    "equivalence_p_adjusted": "float64",
    "documents_needed": "Int64",  # number that would show a difference of this size
    "detectable": "float64",  # smallest difference that these documents would show
    "higher_is_better": "object",
    "verdict": "object",  # better, worse, higher, lower, equivalent or undecided
    "sentence": "object",
    "reason": "object",  # why there is no comparison, or None
    "note": "object",  # assumptions and omissions
}
_RENAMED = {
    "value": "b",
    "baseline_value": "a",
    "flips_worse": "only_a",
    "flips_better": "only_b",
}


@dataclass
class TwoRuns:
    """The comparison of B with A.

    Attributes
    ----------
    table : DataFrame
        One row per task, metric and filter, with the columns :data:`COLUMNS`.
    names : tuple of str
        Descriptions of A and B: model, and routing with hf-bh.
    problems, notes : list of (Path, str)
        Files that could not be used, and remarks on the comparison.
    """

    table: pd.DataFrame
    names: tuple[str, str]
    problems: Notices = field(default_factory=list)
    notes: Notices = field(default_factory=list)


def compare_runs(
    a: Path | str,
    b: Path | str,
    *,
    tasks: Sequence[str] = (),
    margin: float = 0.01,
    accuracy_margin: float = 0.01,
    confidence: float = 0.95,
    power: float = 0.8,
    resamples: int = 9999,
    seed: int = 0,
) -> TwoRuns:
    """Compare two runs of lm-eval on their common documents.

    The tests are those of :func:`~lm_eval_bh.analysis.compare.paired.compare`: a paired bootstrap
    for intervals, McNemar's exact test for binary scores, paired t tests for everything else, and
    two one-sided t tests for equivalence. P-values are adjusted by Benjamini-Hochberg over the
    whole table.

    Parameters
    ----------
    a, b : Path or str
        Results files, or folders that hold one run of each task, with ``--log_samples``.
    tasks : sequence of str
        Tasks to compare; by default all common ones.
    margin : float
        Largest relative difference of perplexity that counts as equivalent.
    accuracy_margin : float
        Largest difference of a score that counts as equivalent; for metrics beyond 1, as a share of
        the largest score.
    confidence : float
        Confidence of the intervals; ``1 - confidence`` is the level of all decisions.
    power : float
        Probability that ``documents_needed`` documents show a difference of this size.
    resamples, seed : int
        Resamples and seed of the bootstrap.

    Raises
    ------
    ParameterError
        If an argument is out of range.
    DataError
        If a folder has no run, or several of one task, or the two have no task in common.
    """
    check_settings(margin, accuracy_margin, confidence, resamples, seed)
    if not 0 < power < 1:
        raise ParameterError(f"power must be a number between 0 and 1, not {power}.")
    problems: Notices = []
    notes: Notices = []
    sides = [_runs_by_task(Path(path), problems) for path in (a, b)]
    interval = partial(bootstrap_interval, confidence=confidence, resamples=resamples, seed=seed)
    rows: list[dict[str, Any]] = []
    for task in _shared(sides, (a, b), tasks, notes):
        runs = [side[task] for side in sides]
        found = _scores_of_both(runs, task, problems)
        if isinstance(found, str):
            rows.append({"task": task, "reason": found})
            continue
        told = [
            f"of {name}, {note}"
            for name, scores in zip("AB", found, strict=True)
            for note in scores.notes
        ]
        told += _of_steps(runs, task)
        shared = _shared_documents(found, told)
        notes += [(runs[1].file, f"{task}: {note}.") for note in told]
        note = "; ".join(told) or None
        if isinstance(shared, str):
            rows.append({"task": task, "reason": shared, "note": note})
            continue
        better = (runs[1].of_task("higher_is_better", task) or {}) | {m: False for m in LOSSES}
        values = [reported(run.content["results"][task]) for run in runs]
        for row in _compared(found, values, shared, margin, accuracy_margin, interval):
            if own := row.get("note"):
                notes.append((runs[1].file, f"{task} {row['metric']}: {own}."))
            row["note"] = "; ".join(filter(None, (note, own))) or None
            rows.append({"task": task, "higher_is_better": better.get(row.get("metric"))} | row)
    table = _decided(rows, 1 - confidence, power)
    names = [", ".join(sorted({_name(run) for run in side.values()})) for side in sides]
    return TwoRuns(table, (names[0], names[1]), problems, notes)


def _runs_by_task(path: Path, problems: Notices) -> dict[str, Run]:
    """Return the run of each task below a path; refuse several of one task."""
    found = find_files([path])
    problems += found.problems
    runs = read_runs(found.results, {}, _check, problems, [], routing=False)
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        for task in run.tasks:
            by_task.setdefault(task, []).append(run)
    for task, several in by_task.items():
        if len(several) > 1:
            raise DataError(
                f"{path} has {len(several)} runs of {task}: give the one to compare, such as "
                f"{several[-1].file}."
            )
    if not by_task:
        why = f" that can be read ({problems[-1][1].rstrip('.')})" if problems else ""
        raise DataError(
            f"There is no results_*.json in or below {path}{why}: use a folder that "
            "lm_eval --output_path wrote to."
        )
    return {task: several[0] for task, several in by_task.items()}


def _check(run: Run) -> None:
    for task in run.tasks:
        run.documents(task)
    _name(run)


def _name(run: Run) -> str:
    if run.info is None or "rule" not in run.info:
        return run.model
    return f"{run.model}, {strategy_label(run.info['config'], run.info['rule'])}"


def _shared(
    sides: Sequence[dict[str, Run]],
    paths: Sequence[Path | str],
    asked: Sequence[str],
    notes: Notices,
) -> list[str]:
    """Return the tasks to compare, and note those that only one side has."""
    known = sorted(sides[0].keys() & sides[1].keys())
    if not known:
        has = " and ".join(
            f"{path} has {_listed(sorted(side))}" for path, side in zip(paths, sides, strict=True)
        )
        raise DataError(f"The two have no task in common: {has}; run the same tasks.")
    for task in asked:
        if task not in known:
            raise ParameterError(
                f"The two have no task {task!r} in common: use {_listed(known)}"
                f"{did_you_mean(task, known)}."
            )
    if any(sides[0][task].fingerprint == sides[1][task].fingerprint for task in known):
        raise ParameterError("A and B are the same run: give two different ones.")
    for name, path, only in (
        ("A", paths[0], sides[0].keys() - sides[1].keys()),
        ("B", paths[1], sides[1].keys() - sides[0].keys()),
    ):
        if only and not asked:
            notes.append((Path(path), f"Only {name} has {_listed(sorted(only))}."))
    return [task for task in known if not asked or task in asked]


def _of_steps(runs: Sequence[Run], task: str) -> list[str]:
    """Return the distinct experts per step of each run, and whether they are comparable."""
    steps: list[Any] = [run.summary(task) or {} for run in runs]
    if any(found.get("distinct_experts") is None for found in steps):
        return []
    a, b = steps
    said = (
        f"A reads {a['distinct_experts']:.1f} and B {b['distinct_experts']:.1f} distinct experts "
        "per layer and step"
    )
    rows = a["decode_batch"], b["decode_batch"]
    if None in rows:
        return [f"{said}; not comparable: an engine decided how many rows it decoded together"]
    if rows[0] == rows[1]:
        return [f"{said}, of {rows[0]} rows decoded together"]
    return [f"{said}; not comparable: A decodes {rows[0]} rows together and B {rows[1]}"]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _scores_of_both(
    runs: Sequence[Run], task: str, problems: Notices
) -> tuple[SampleScores, SampleScores] | str:
    """Return both runs' logged scores of a task, or why they are missing."""

    def read(by_content: bool) -> list[SampleScores] | str:
        found = []
        for name, run in zip("AB", runs, strict=True):
            path = run.samples_file(task)
            if path is None:
                return f"there are no samples of {name}: run it with --log_samples"
            keys = reported(run.content["results"][task])
            try:
                found.append(
                    read_scores(path, run.documents(task), keys=keys, by_content=by_content)
                )
            except DataError as error:
                problems.append((path, str(error)))
                return f"the samples of {name} could not be read"
        return found

    found = read(by_content=False)
    if not isinstance(found, str) and found[0].has_hashes != found[1].has_hashes:
        found = read(by_content=True)
    return found if isinstance(found, str) else (found[0], found[1])


def _shared_documents(found: tuple[SampleScores, SampleScores], notes: list[str]) -> pd.Index | str:
    """Return the common document ids, or why there are none; add notes."""
    one, other = (scores.hashes for scores in found)
    shared = one.index.intersection(other.index).sort_values()
    if len(shared) < 2:
        return "fewer than two documents in common: raise --limit"
    if reason := different(one["doc"][shared], other["doc"][shared]):
        return f"{reason}: run both on the same data set with the same release of lm_eval"
    if len(shared) < max(len(one), len(other)):
        notes.append(
            f"A has {len(one)} documents and B {len(other)}; the {len(shared)} common ones are "
            "compared"
        )
    prompts = different(one["prompt"][shared], other["prompt"][shared])
    if prompts == DIFFER:
        notes.append(
            "the prompts differ (few-shot examples, chat template or version of the "
            "task), so the comparison is not of the models alone"
        )
    elif prompts:
        notes.append(
            "the samples do not contain the prompts, so whether they are equal is not known"
        )
    return shared


def _compared(
    found: tuple[SampleScores, SampleScores],
    values: Sequence[dict[tuple[str, str], Any]],
    shared: pd.Index,
    margin: float,
    accuracy_margin: float,
    interval: Interval,
) -> Iterator[dict[str, Any]]:
    """Yield one row per metric and filter: common ones, then those left out."""
    keys = [key for key in found[0].scores if key in found[1].scores]
    for key in keys:
        row: dict[str, Any] = {"metric": key[0], "filter": key[1]}
        pair = [scores.scores[key] for scores in found]
        said = [of_run.get(key) for of_run in values]
        if key[0] in LOSSES:
            row |= _losses(pair, said, shared, key[0], margin, interval)
        else:
            row |= _means(pair, said, shared, accuracy_margin, interval)
        if row.get("reason") is None and (missing := _unchecked(said)):
            row["note"] = "; ".join(filter(None, (row.get("note"), missing)))
        yield {_RENAMED.get(name, name): value for name, value in row.items()}
    left_out = list(_left_out(found, values, keys))
    yield from left_out
    if not keys and not left_out:
        yield {"reason": "no common metric of single documents"}


def _losses(
    pair: Sequence[pd.DataFrame],
    said: Sequence[Any],
    shared: pd.Index,
    metric: str,
    margin: float,
    interval: Interval,
) -> dict[str, Any]:
    for name, side, value in zip("AB", pair, said, strict=True):
        if reason := ratio_confirmed(side["value"], side["size"], value):
            return {"reason": f"{reason} in {name}"}
    both = [side.reindex(shared) for side in pair]
    a, b = (side["value"].to_numpy(np.float64) for side in both)
    sizes = [side["size"].to_numpy(np.float64) for side in both]
    if not np.array_equal(*sizes):
        return {"reason": f"the {LOSSES[metric]} of the documents differ"}
    return compare_perplexities(-b, -a, sizes[0], margin, interval)


def _means(
    pair: Sequence[pd.DataFrame],
    said: Sequence[Any],
    shared: pd.Index,
    margin: float,
    interval: Interval,
) -> dict[str, Any]:
    """Compare the documents whose mean is the value in each run's results.json."""
    kept = shared
    for name, side, value in zip("AB", pair, said, strict=True):
        every = side["value"].reindex(side.index.union(shared))
        documents = counted(every, value)
        if isinstance(documents, str):
            return {"reason": f"{documents} in {name}"}
        kept = kept.intersection(documents)
    if len(kept) < 2:
        return {"reason": "fewer than two documents in common count for this metric"}
    a, b = (side["value"].loc[kept].to_numpy(np.float64) for side in pair)
    row = _scores(b, a, margin, interval)
    if len(kept) < len(shared):
        row["note"] = f"{len(kept)} of {len(shared)} documents; the task leaves out the others"
    return row


def _unchecked(said: Sequence[Any]) -> str | None:
    names = [name for name, value in zip("AB", said, strict=True) if not is_checkable(value)]
    if not names:
        return None
    return (
        f"results.json of {' and '.join(names)} has no value for it, so it may not be "
        "a mean over documents"
    )


def _left_out(
    found: Sequence[SampleScores],
    values: Sequence[dict[tuple[str, str], Any]],
    compared: Sequence[tuple[str, str]],
) -> Iterator[dict[str, Any]]:
    """Yield a row for each metric and filter that is not compared."""
    has_loss = {of_filter for metric, of_filter in compared if metric in LOSSES}
    known = [
        {**dict.fromkeys(side.scores), **of_run} for side, of_run in zip(found, values, strict=True)
    ]
    for key in dict.fromkeys([*known[0], *known[1]]):
        if key in compared or (key[0] in OTHER_UNITS and key[1] in has_loss):
            continue
        only = [name for name, side in zip("AB", known, strict=True) if key in side]
        if len(only) == 1:
            reason = f"only {only[0]} has it"
        else:
            reason = "only the task has it, not single documents"
        yield {"metric": key[0], "filter": key[1], "reason": reason}


def _scores(b: Any, a: Any, margin: float, interval: Interval) -> dict[str, Any]:
    """Compare scores of any scale, those beyond 1 as shares of the largest."""
    scale = max(1.0, float(np.abs([a, b]).max()))
    row = compare_scores(b / scale, a / scale, margin, interval)
    scaled = ("value", "baseline_value", "difference", "difference_low", "difference_high")
    return row | {name: row[name] * scale for name in (*scaled, "margin", "effect", "spread")}


def _decided(rows: list[dict[str, Any]], level: float, power: float) -> pd.DataFrame:
    """Return the table, with adjusted p-values, power and verdicts."""
    for row in rows:
        if row.get("reason") is None:
            row["documents_needed"] = documents_needed(row["effect"], row["spread"], level, power)
            least = detectable(row["spread"], row["documents"], level, power)
            if least is not None and row["metric"] in LOSSES:
                least = float(np.expm1(least))  # the test was on the log ratio
            row["detectable"] = least
    table = typed(rows, COLUMNS)
    table["p_adjusted"] = adjusted(table["p_value"])
    table["equivalence_p_adjusted"] = adjusted(table["equivalence_p"])
    told = [verdict_of(row, level, power) for _, row in table.iterrows()]
    table["verdict"], table["sentence"] = (
        pd.Series([part[i] for part in told], table.index, dtype=object) for i in (0, 1)
    )
    return table
