"""All patterns in the logs of one configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lm_eval_bh.analysis.patterns.clusters import Clusters, cluster
from lm_eval_bh.analysis.patterns.complexity import complexity
from lm_eval_bh.analysis.patterns.log_counts import Counts
from lm_eval_bh.analysis.patterns.log_reader import (
    Ints,
    Piece,
    pieces_of,
    read_samples,
    read_token_log,
    token_files,
)
from lm_eval_bh.analysis.patterns.specialisation import lift, specialisation
from lm_eval_bh.analysis.patterns.token_classes import CLASSES, UNKNOWN, vocabulary
from lm_eval_bh.analysis.read.loaded import Loaded
from lm_eval_bh.analysis.table.perplexities import PERPLEXITIES
from lm_eval_bh.errors import DataError

DOCUMENTS = 5000  # of each task, whose use of the experts is kept and clustered
TYPICAL = 3  # experts that are named for a cluster
# Document of a task -> its loss, and what that is a loss per.
Losses = dict[tuple[int, int], tuple[float, str]]


@dataclass(frozen=True)
class Patterns:
    """What was found for one configuration.

    Attributes
    ----------
    name : str
        For files, unlike that of any other configuration.
    strategy : str
        For people.
    group : int
        Of experiments that can be compared.
    counts : Counts
        What everything was computed from.
    documents : DataFrame
        ``task, document, tokens, mean_experts, loss, loss_unit, cluster``, one row per document.
    tokens : DataFrame
        ``token_id, text, token_class, occurrences, mean_experts``, one row per token id.
    classes : DataFrame
        ``task, token_class, tokens, mean_experts``.
    complexity, specialisation : DataFrame
        See the functions of these names.
    clusters : Clusters or None
        None where there are too few documents.
    """

    name: str
    strategy: str
    group: int
    counts: Counts
    documents: pd.DataFrame
    tokens: pd.DataFrame
    classes: pd.DataFrame
    complexity: pd.DataFrame
    specialisation: pd.DataFrame
    clusters: Clusters | None

    def cluster_table(self) -> pd.DataFrame:
        """Return one row per cluster: documents by task, experts, and what it uses more."""
        if self.clusters is None:
            return pd.DataFrame()
        usage = usage_of(self.counts)
        rows = []
        for number in range(int(self.clusters.labels.max()) + 1):
            inside = self.clusters.labels == number
            some = self.documents[inside]
            more = usage[inside].mean(0) - usage.mean(0)
            top = np.argsort(-more)[:TYPICAL]
            layers, experts = np.divmod(top, self.counts.experts)
            rows.append(
                {
                    "cluster": number,
                    "documents": int(inside.sum()),
                    **{task: int((some["task"] == task).sum()) for task in self.counts.tasks},
                    "mean_experts": float(np.average(some["mean_experts"], weights=some["tokens"])),
                    "mean_loss": float(some["loss"].mean()),
                    "uses_more": ", ".join(
                        f"layer {self.counts.layers[layer]} expert {expert} "
                        f"(+{100 * more[i]:.0f} %)"
                        for i, layer, expert in zip(top, layers, experts, strict=True)
                    ),
                }
            )
        return pd.DataFrame(rows)

    def lift_of(self, experts: pd.DataFrame) -> tuple[list[str], np.ndarray]:
        """Return the token classes that occur, and each expert's lift for them.

        Parameters
        ----------
        experts : DataFrame
            Rows of ``specialisation``.

        Returns
        -------
        (list of str, float64 [experts, classes])
        """
        tokens, served = self.counts.tokens.sum(0), self.counts.served.sum(0)
        present = tokens.sum(0) > 0
        place = [self.counts.layers.index(layer) for layer in experts["layer"]]
        lifts = lift(served[place, :, experts["expert"]][:, present], tokens[place][:, present])
        return [n for n, there in zip(self.counts.classes, present, strict=True) if there], lifts


def find_patterns(
    loaded: Loaded, *, tokenizer: Path | None = None, seed: int = 0
) -> Iterator[Patterns]:
    """Yield the patterns in the routing logs, one configuration after another.

    Of a configuration, each task's first run with a log is read: its token log where there is one,
    else its internal routing log.

    Parameters
    ----------
    loaded : Loaded
        Of runs with ``log_routing=samples`` or ``full``. Logs that are damaged are added to its
        problems.
    tokenizer : Path, optional
        The ``tokenizer.json`` of the model. Without it tokens have numbers, but no text or class.
    seed : int
        Of the clusters.

    Raises
    ------
    DataError
        If no run has a log, or the tokenizer cannot be read.
    """
    texts, classes = vocabulary(tokenizer) if tokenizer else ([], [])
    names = [*CLASSES, UNKNOWN] if tokenizer else [UNKNOWN]
    class_of = np.array([names.index(name) for name in classes], dtype=np.int64)
    nothing = True
    taken: set[str] = set()
    for (group, _), rows in loaded.frame.groupby(["group", "configuration"], sort=False):
        runs = _runs_with_logs(loaded, rows)
        if not runs:
            continue
        nothing = False
        tasks = sorted(task for some in runs.values() for task in some)
        shape = loaded.layers[loaded.layers["run_id"].isin(runs)]
        counts = Counts(
            tasks,
            sorted(shape["layer"].unique().tolist()),
            len(shape["usage"].iloc[0]),
            names,
            class_of,
            DOCUMENTS,
        )
        losses: Losses = {}
        try:
            for run_id, some in runs.items():
                for piece in _read(loaded, run_id, some, tasks, losses):
                    counts.add(piece)
        except DataError as error:
            if str(error) not in (sentence for _, sentence in loaded.problems):
                loaded.leave_out(Path(rows["file"].iloc[0]), error)
            continue
        strategy = str(rows["strategy"].iloc[0])
        name = _file_name(strategy, taken)
        yield _describe(name, strategy, int(group), counts, losses, texts, seed)
    if nothing:
        raise DataError(
            "No run has a routing log: evaluate with log_routing=samples or full and a log_dir, "
            "and give the folder of the logs too if they were moved."
        )


def _runs_with_logs(loaded: Loaded, rows: pd.DataFrame) -> dict[str, list[str]]:
    """Return run id -> tasks to read of it."""
    routed = set(zip(loaded.layers["run_id"], loaded.layers["task"], strict=True))
    found: dict[str, list[str]] = {}
    for task, repeats in rows.groupby("task", sort=True):
        for run_id in repeats["run_id"]:
            logged = token_files(loaded.log_folder(run_id)) or loaded.internal_routing_file(
                run_id, str(task)
            )
            if logged and (run_id, task) in routed:
                found.setdefault(run_id, []).append(str(task))
                break
    return found


def _read(
    loaded: Loaded, run_id: str, some: list[str], tasks: list[str], losses: Losses
) -> Iterator[Piece]:
    """Yield a run's rows of some tasks, and note the losses of their documents."""
    files = token_files(loaded.log_folder(run_id))
    for task in some:
        place = tasks.index(task)
        log = loaded.internal_routing_file(run_id, task)
        samples = read_samples(log) if log else []
        known: Losses = {
            (place, sample["sample_id"]): (sample["loss"], "nats a token")
            for sample in samples
            if sample["loss"] is not None
        }
        losses |= known or _losses_of_harness(loaded, run_id, task, place)
        if not files:
            yield from pieces_of(samples, place)
    if files:
        yield from read_token_log(files, tasks, some)


def _losses_of_harness(loaded: Loaded, run_id: str, task: str, place: int) -> Losses:
    """Return the losses of a task's documents from ``--log_samples``, where it scores texts."""
    documents = loaded.documents(run_id, task)
    if documents is None:
        return {}
    for unit in PERPLEXITIES.values():
        if {"loglikelihood", unit} <= set(documents):
            loss = -documents["loglikelihood"] / documents[unit].where(documents[unit] > 0)
            return {
                (place, int(document)): (float(value), f"nats a {unit.removesuffix('s')}")
                for document, value in loss.dropna().items()
            }
    return {}


def _describe(
    name: str,
    strategy: str,
    group: int,
    counts: Counts,
    losses: Losses,
    texts: list[str],
    seed: int,
) -> Patterns:
    tasks, length, served = counts.document_counts()
    clusters = cluster(usage_of(counts), tasks, seed)
    documents = pd.DataFrame(
        {
            "task": [counts.tasks[task] for task in tasks],
            "document": [document for _, document in counts.documents],
            "tokens": length,
            "mean_experts": served.sum(-1) / (length * len(counts.layers)),
            "loss": [losses.get(key, (np.nan, None))[0] for key in counts.documents],
            "loss_unit": [losses.get(key, (np.nan, None))[1] for key in counts.documents],
            "cluster": pd.array(
                [pd.NA] * len(tasks) if clusters is None else clusters.labels, dtype="Int64"
            ),
        }
    )
    tokens = _token_table(counts, texts)
    return Patterns(
        name=name,
        strategy=strategy,
        group=group,
        counts=counts,
        documents=documents,
        tokens=tokens,
        classes=_class_table(counts),
        complexity=complexity(documents, tokens),
        specialisation=specialisation(counts, seed),
        clusters=clusters,
    )


def usage_of(counts: Counts) -> NDArray[np.float32]:
    """Return the share of each document's tokens that each expert served.

    Returns
    -------
    float32 [documents, layers * experts]
    """
    _, tokens, served = counts.document_counts()
    return (served / tokens[:, None]).astype(np.float32)


def _token_table(counts: Counts, texts: list[str]) -> pd.DataFrame:
    ids = np.flatnonzero(counts.occurrences)
    number = counts.occurrences[ids]
    return pd.DataFrame(
        {
            "token_id": ids,
            "text": [texts[i] if i < len(texts) else None for i in ids],
            "token_class": [counts.classes[i] for i in counts.class_of(ids)],
            "occurrences": number,
            "mean_experts": counts.experts_of[ids] / (number * len(counts.layers)),
        }
    )


def _class_table(counts: Counts) -> pd.DataFrame:
    rows: Ints = counts.tokens.sum(1)
    experts = counts.served.sum((1, 3))
    task, kind = np.nonzero(rows)
    return pd.DataFrame(
        {
            "task": np.array(counts.tasks)[task],
            "token_class": np.array(counts.classes)[kind],
            "tokens": rows[task, kind] // len(counts.layers),
            "mean_experts": experts[task, kind] / rows[task, kind],
        }
    )


def _file_name(strategy: str, taken: set[str]) -> str:
    """Return a unique name for the files of a configuration."""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", strategy).strip("_").lower()
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}_{number}", number + 1
    taken.add(name)
    return name
