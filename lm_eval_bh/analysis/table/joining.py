"""Columns that need several runs: token perplexity, average accuracy, stability."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_bh.analysis.read.documents import scored_tokens
from lm_eval_bh.analysis.table import metrics, stability
from lm_eval_bh.analysis.table.perplexities import PERPLEXITIES

if TYPE_CHECKING:
    from lm_eval_bh.analysis.read.loaded import Loaded


def add_token_perplexity(rows: Sequence[dict[str, Any]], loaded: Loaded) -> None:
    """Fill in ``perplexity`` if the number of scored tokens is known.

    lm-eval logs a document's loglikelihood but not its number of tokens; an internal routing log
    has the loss per scored token, so their quotient is that number. It only depends on the text and
    the tokenizer: one log serves all runs of a group, including those of ``--model hf``. Without
    the number for every document there is no token-level perplexity: one over the first documents
    would be shown beside a word-level perplexity over all.
    """
    for alike in _alike(rows, "group", "task"):
        if all(row[name] is None for row in alike for name in PERPLEXITIES):
            continue
        logs = [
            (path, row)
            for row in alike
            if (path := loaded.internal_routing_file(row["run_id"], row["task"]))
            and loaded.documents(row["run_id"], row["task"]) is not None
        ]
        scored: dict[int, int] = {}
        for _, row in sorted(logs, key=lambda log: (log[0].stat().st_size, log[0].as_posix())):
            if len(scored) < (row["documents"] or math.inf):
                documents = loaded.documents(row["run_id"], row["task"])
                assert documents is not None
                log = loaded.internal_routing(row["run_id"], row["task"])
                scored |= scored_tokens(log["samples"] if log else (), documents)
        for row in alike:
            documents = loaded.documents(row["run_id"], row["task"]) if scored else None
            if documents is None or "loglikelihood" not in documents:
                continue
            tokens = documents.index.map(scored)
            if not tokens.hasnans:
                documents["tokens"] = np.asarray(tokens, dtype=np.float64)
                of_documents = documents["loglikelihood"], documents["tokens"].astype(int)
                row["perplexity"] = metrics.perplexity(*of_documents)
                row["perplexity_stderr"] = metrics.perplexity_stderr(*of_documents)


def add_average_accuracy(rows: Sequence[dict[str, Any]]) -> None:
    """Fill in ``avg_task_accuracy`` for configurations that ran all tasks with an accuracy."""
    for group in _alike(rows, "group"):
        tasks = {row["task"] for row in group if row["accuracy"] is not None}
        for configured in _alike(group, "configuration"):
            found = {
                task: float(np.mean([row["accuracy"] for row in repeats]))
                for (task,), repeats in _by(configured, "task").items()
                if all(row["accuracy"] is not None for row in repeats)
            }
            if found.keys() == tasks:
                for row in configured:
                    row["avg_task_accuracy"] = metrics.avg_task_accuracy(found)


def add_stability(rows: Sequence[dict[str, Any]], loaded: Loaded) -> None:
    """Fill in both stability metrics of repeated configurations: means over pairs of runs."""
    for repeats in _alike(rows, "group", "task", "configuration"):
        overlaps, equal = [], []
        for first, second in combinations(repeats, 2):
            runs = [(row["run_id"], row["task"]) for row in (first, second)]
            one, other = (loaded.documents(*run) for run in runs)
            if one is not None and other is not None:
                equal.append(
                    stability.output_determinism(one["output"].to_dict(), other["output"].to_dict())
                )
            logs = [loaded.internal_routing(*run) for run in runs]
            if logs[0] and logs[1]:
                overlaps.append(
                    stability.expert_overlap_score(logs[0]["samples"], logs[1]["samples"])
                )
        for row in repeats:
            row["expert_overlap_score"] = _mean(overlaps)
            row["output_determinism"] = _mean(equal)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _by(
    rows: Iterable[dict[str, Any]], *columns: str
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def _alike(rows: Iterable[dict[str, Any]], *columns: str) -> list[list[dict[str, Any]]]:
    return list(_by(rows, *columns).values())


def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sort baselines before rules, then by level and size, repeats by time."""
    return (
        row["group"],
        row["task"],
        not row["baseline"],
        row["rule"],
        row["max_k"] or 0,
        row["alpha"] or 0.0,
        row["strategy"],
        row["configuration"],
        row["_date"],
        row["file"],
    )
