"""Finds all patterns in the logs of each configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.compare.paired_tests import adjusted
from lm_eval_bh.analysis.patterns.clusters import Clusters, cluster, cluster_table
from lm_eval_bh.analysis.patterns.complexity import complexity
from lm_eval_bh.analysis.patterns.log_counts import Counts
from lm_eval_bh.analysis.patterns.log_reader import read_sample_log, read_token_log, token_files
from lm_eval_bh.analysis.patterns.specialisation import specialisation
from lm_eval_bh.analysis.patterns.token_classes import CLASSES, UNKNOWN, vocabulary
from lm_eval_bh.analysis.read.loaded import Loaded
from lm_eval_bh.analysis.table.perplexities import PERPLEXITIES
from lm_eval_bh.errors import DataError

DOCUMENTS = 5000  # documents per task whose expert use is kept and clustered
TABLES = ("complexity", "classes", "tokens", "specialisation", "documents", "clusters")


@dataclass(frozen=True)
class Patterns:
    """The patterns of one configuration.

    Attributes
    ----------
    strategy : str
        Its name.
    group : int
        Group of comparable experiments.
    counts : Counts
        The counts behind all results.
    clusters : Clusters or None
        None with too few documents.
    tables : dict of str to DataFrame
        One table for each of :data:`TABLES`.
    """

    strategy: str
    group: int
    counts: Counts
    clusters: Clusters | None
    tables: dict[str, pd.DataFrame]


def find_patterns(
    loaded: Loaded, *, tokenizer: Path | None = None, seed: int = 0
) -> Iterator[Patterns]:
    """Yield the patterns in the routing logs, one configuration after another.

    For each task, the configuration's first run with a log is read: its token log if it exists,
    else its internal routing log.

    Parameters
    ----------
    loaded : Loaded
        Runs with ``log_routing=samples`` or ``full``. Damaged logs are added to its problems, and
        their configuration is left out.
    tokenizer : Path, optional
        The ``tokenizer.json`` of the model. Without it tokens have numbers, but no text or class.
    seed : int
        Seed of the clusters.

    Raises
    ------
    DataError
        If no run has a log, or the tokenizer cannot be read.
    """
    texts, classes = vocabulary(tokenizer) if tokenizer else ([], [])
    names = [*CLASSES, UNKNOWN]
    class_of = np.array([names.index(name) for name in classes], dtype=np.int64)
    nothing = True
    for (group, _), rows in loaded.frame.groupby(["group", "configuration"], sort=False):
        runs = _runs_with_logs(loaded, rows)
        if not runs:
            continue
        nothing = False
        shape = loaded.layers[loaded.layers["run_id"].isin(runs.values())]
        counts = Counts(
            list(runs),
            sorted(shape["layer"].unique().tolist()),
            len(shape["usage"].iloc[0]),
            names,
            class_of,
            DOCUMENTS,
        )
        try:
            losses = _read(loaded, runs, counts)
        except DataError as error:
            if str(error) not in (sentence for _, sentence in loaded.problems):
                loaded.leave_out(Path(rows["file"].iloc[0]), error)
            continue
        yield _describe(str(rows["strategy"].iloc[0]), int(group), counts, losses, texts, seed)
    if nothing:
        raise DataError(
            "No run has a routing log: evaluate with log_routing=samples or full and a log_dir, "
            "and give the folder of the logs too if they were moved."
        )


def _runs_with_logs(loaded: Loaded, rows: pd.DataFrame) -> dict[str, str]:
    """Return task -> run to read, sorted by task."""
    routed = set(zip(loaded.layers["run_id"], loaded.layers["task"], strict=True))
    found: dict[str, str] = {}
    for run_id, task in sorted(zip(rows["run_id"], rows["task"], strict=True), key=lambda r: r[1]):
        if (
            task not in found
            and (run_id, task) in routed
            and (
                token_files(loaded.log_folder(run_id)) or loaded.internal_routing_file(run_id, task)
            )
        ):
            found[task] = run_id
    return found


# (Task, document) -> loss and its unit.
Losses = dict[tuple[str, int], tuple[float, str]]


def _read(loaded: Loaded, runs: dict[str, str], counts: Counts) -> Losses:
    """Count the logs of some runs for their tasks, and return the losses of documents."""
    losses: Losses = {}
    for run_id in dict.fromkeys(runs.values()):
        folder = loaded.log_folder(run_id)
        assert folder is not None  # it has a log
        some = [task for task in runs if runs[task] == run_id]
        files = token_files(folder)
        for piece in read_token_log(files, counts.tasks, some):
            counts.add(piece)
        for task in some:
            place = counts.tasks.index(task)
            log = loaded.internal_routing_file(run_id, task)
            pieces, of_log = read_sample_log(log, place) if log else ([], {})
            for piece in pieces if not files else ():
                counts.add(piece)
            counts.require_rows(place, folder)
            known = {document: (loss, "nats per token") for document, loss in of_log.items()}
            known = known or _losses_of_harness(loaded, run_id, task)
            losses |= {(task, document): loss for document, loss in known.items()}
    return losses


def _losses_of_harness(loaded: Loaded, run_id: str, task: str) -> dict[int, tuple[float, str]]:
    """Return the losses of a task's documents from ``--log_samples``, where it scores texts."""
    documents = loaded.documents(run_id, task)
    if documents is None:
        return {}
    for unit in PERPLEXITIES.values():
        if {"loglikelihood", unit} <= set(documents):
            loss = -documents["loglikelihood"] / documents[unit].where(documents[unit] > 0)
            return {
                int(document): (float(value), f"nats per {unit.removesuffix('s')}")
                for document, value in loss.dropna().items()
            }
    return {}


def _describe(
    strategy: str, group: int, counts: Counts, losses: Losses, texts: list[str], seed: int
) -> Patterns:
    documents, served = counts.document_table()
    keys = zip(documents["task"], documents["document"], strict=True)
    found = [losses.get(key, (np.nan, None)) for key in keys]
    usage = (served / documents["tokens"].to_numpy()[:, None]).astype(np.float32)
    clusters = cluster(usage, documents["task"], seed)
    labels = clusters.labels if clusters else [pd.NA] * len(documents)
    documents = documents.assign(
        loss=[loss for loss, _ in found],
        loss_unit=[unit for _, unit in found],
        cluster=pd.array(labels, dtype="Int64"),
    )
    tokens = counts.token_table()
    tokens.insert(1, "text", tokens["token_id"].map(dict(enumerate(texts))))
    correlations = complexity(documents, tokens, counts.loss_tables())
    tables = {
        "complexity": _with_adjusted(correlations, "against"),
        "classes": counts.class_table(),
        "tokens": tokens,
        "specialisation": _with_adjusted(specialisation(counts, seed), "of"),
        "documents": documents,
        "clusters": cluster_table(clusters, counts, documents, usage),
    }
    return Patterns(strategy, group, counts, clusters, tables)


def _with_adjusted(table: pd.DataFrame, family: str) -> pd.DataFrame:
    """Return the table with its p-values adjusted within each family."""
    p_values = table["p_value"].astype(float)
    return table.assign(p_adjusted=p_values.groupby(table[family]).transform(adjusted))
