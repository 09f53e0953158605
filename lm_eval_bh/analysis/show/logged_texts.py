"""Reads the first documents of finished runs for the page of routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import pandas as pd

from lm_eval_bh.analysis.patterns.log_reader import token_files
from lm_eval_bh.analysis.patterns.token_classes import decoder
from lm_eval_bh.analysis.show.view_page import (
    ViewLayer,
    ViewRouted,
    ViewRun,
    ViewText,
    distinct_line,
    pieces,
    short,
)
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.analysis.table.missing import is_missing
from lm_eval_bh.errors import DataError, ParameterError

ROWS = 65536  # of a log in memory at a time
COLUMNS = ("doc_id", "layer", "position", "token_id", "experts", "weights", "loss")


def read_logged(
    folders: Sequence[Path],
    task: str | None,
    documents: int,
    most: int,
    tokenizer: Path | None,
    find_tokenizer: Callable[[Path], Path | None],
) -> tuple[list[ViewText], list[ViewRun]]:
    """Read the decisions of one or two runs on the first documents of a task.

    Parameters
    ----------
    folders : sequence of Path
        The folder of each run's results.
    task : str, optional
        Task to show; by default the first by name that all runs have.
    documents, most : int
        Number of documents, and maximum number of tokens of each.
    tokenizer : Path, optional
        The model's ``tokenizer.json``.
    find_tokenizer : callable
        Finds the tokenizer by a results file, or returns None to show token ids.

    Raises
    ------
    ParameterError
        If there are more than two runs, or their tasks, texts or layers differ.
    DataError
        If a run cannot be read, or has no log of every token.
    """
    if len(folders) > 2:
        raise ParameterError(f"At most two runs fit side by side: found {len(folders)} folders.")
    opened = [_open(folder) for folder in folders]
    common = sorted(set.intersection(*(set(frame["task"]) for frame, _ in opened)))
    if not common or task not in (None, *common):
        known = f"use {', '.join(common)}" if common else "give runs that have one in common"
        raise ParameterError(f"The runs have no task {task or ''}".rstrip() + f": {known}.")
    task = task or common[0]
    runs, tables = [], []
    for folder, (frame, files) in zip(folders, opened, strict=True):
        row = frame[frame["task"] == task]
        if len(row) > 1:
            raise ParameterError(
                f"{folder} has {len(row)} runs of {task}: give the folder of the one to show."
            )
        table = _first_documents(files, task, documents, most)
        if table.empty:
            raise DataError(f"{folder} has no tokens of {task} in its log: run it again.")
        tables.append(table)
        runs.append(_run(row.iloc[0], table))
    path = tokenizer or find_tokenizer(Path(opened[0][0]["file"].iloc[0]))
    decode = decoder(path) if path else None
    texts = [_texts(table, decode) for table in tables]
    if any(some != texts[0] for some in texts):
        raise ParameterError(
            f"The two runs have different texts of {task}, so they cannot be shown side by side: "
            "give runs of the same documents and model."
        )
    return texts[0], runs


def _open(folder: Path) -> tuple[pd.DataFrame, list[Path]]:
    """Return the experiments of a folder with a token log, and the log's files."""
    loaded = load_experiments([folder], force=True)
    for _, sentence in loaded.problems:
        raise DataError(sentence)
    logs = {run: token_files(loaded.log_folder(run)) for run in loaded.frame["run_id"].unique()}
    frame = loaded.frame[loaded.frame["run_id"].map(lambda run: bool(logs[run]))]
    if frame.empty:
        raise DataError(
            f"{folder} has no log of every token: evaluate with log_routing=full and a log_dir."
        )
    if frame["run_id"].nunique() > 1:
        raise ParameterError(
            f"{folder} has {frame['run_id'].nunique()} runs: give the folder of the one to show."
        )
    return frame, logs[frame["run_id"].iloc[0]]


def _first_documents(files: Sequence[Path], task: str, number: int, most: int) -> pd.DataFrame:
    """Return the rows of the first request of the first documents, once per token."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    kept = pd.DataFrame(columns=list(COLUMNS))
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                known = [name for name in COLUMNS if name in parquet.schema_arrow.names]
                columns = ["task", "request", "repeat", *known]
                for batch in parquet.iter_batches(batch_size=ROWS, columns=columns):
                    keep = pc.equal(batch.column("task").cast(pa.string()), task)
                    for name in ("request", "repeat"):
                        keep = pc.and_(keep, pc.equal(batch.column(name), 0))
                    found = batch.filter(keep).select(known).to_pandas()
                    if len(found):
                        kept = _first(pd.concat([kept, found]) if len(kept) else found, number)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{file} could not be read: {error}; run the evaluation again."
            ) from error
    # A long document's last window repeats tokens that an earlier one has logged.
    kept = kept.drop_duplicates(["doc_id", "layer", "position"])
    kept = kept.sort_values(["doc_id", "layer", "position"], ignore_index=True)
    return kept[kept.groupby(["doc_id", "layer"]).cumcount() < most].reindex(columns=list(COLUMNS))


def _first(rows: pd.DataFrame, number: int) -> pd.DataFrame:
    first = sorted(rows["doc_id"].unique())[:number]
    return rows[rows["doc_id"].isin(first)]


def _run(row: pd.Series, table: pd.DataFrame) -> ViewRun:
    distinct, together = row["distinct_experts"], row["decode_batch"]
    rows = None if is_missing(together) else int(together)
    return {
        "label": str(row["strategy"]),
        "model": str(row["model"]),
        "experts": int(row["num_experts"]),
        "max_k": int(row["max_k"]),
        "distinct": None if is_missing(distinct) else distinct_line(float(distinct), rows),
        "texts": [_routed(some) for _, some in table.groupby("doc_id")],
    }


def _routed(table: pd.DataFrame) -> ViewRouted:
    layers: list[ViewLayer] = []
    for layer, rows in table.groupby("layer"):
        decided: list[Any] = []
        for experts, weights in zip(rows["experts"], rows["weights"], strict=True):
            known = [None] * len(experts) if weights is None else [short(w) for w in weights]
            decided.append([(int(e), w, None, None) for e, w in zip(experts, known, strict=True)])
        layers.append(
            {
                "layer": int(cast(int, layer)),
                "score": None,
                "limit": None,
                "counts": [len(of_token) for of_token in decided],
                "rows": decided,
            }
        )
    first = table[table["layer"] == table["layer"].iloc[0]]
    losses = first["loss"].astype(float)
    return {"loss": [short(loss) for loss in losses], "layers": layers}


def _texts(table: pd.DataFrame, decode: Callable[[list[int]], str] | None) -> list[ViewText]:
    texts: list[ViewText] = []
    for document, some in table.groupby("doc_id"):
        first = some[some["layer"] == some["layer"].iloc[0]]
        ids = [None if is_missing(token) else int(token) for token in first["token_id"]]
        texts.append(
            {
                "title": f"document {document}",
                "tokens": _words(ids, decode),
                "ids": ids,
            }
        )
    return texts


def _words(ids: Sequence[int | None], decode: Callable[[list[int]], str] | None) -> list[str]:
    """Return the texts of tokens, or their numbers without a vocabulary."""
    words: list[str] = []
    for known, some in groupby(ids, key=lambda token: token is not None):
        run = [-1 if token is None else token for token in some]
        if not known:
            words += [" ?"] * len(run)
        elif decode is None:
            words += [f" {token}" for token in run]
        else:
            words += pieces(decode, run)
    return words
