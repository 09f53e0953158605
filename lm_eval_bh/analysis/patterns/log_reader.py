"""Reads routing logs in pieces that fit into memory, whatever their format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import TOKENS, Sample, read_internal_routing, read_manifest

Ints = NDArray[np.int64]

ROWS = 65536  # of a token log in memory at a time
COLUMNS = ["task", "doc_id", "request", "repeat", "layer", "token_id", "experts"]


@dataclass(frozen=True)
class Piece:
    """Some rows of a log: one row per token and layer, of the first request of each document.

    Further requests repeat its text with another ending, and repetitions repeat it all.

    Attributes
    ----------
    task, document, layer, token, count : int64 [rows]
        Index of the task, document, layer, token id, and how many experts served.
    experts : int64 [count.sum()]
        The experts of all rows, one row after the other.
    """

    task: Ints
    document: Ints
    layer: Ints
    token: Ints
    count: Ints
    experts: Ints


def token_files(folder: Path | None) -> list[Path]:
    """Return the token logs of a run; none without ``log_routing=full``."""
    if folder is None:
        return []
    return [folder / name for name in read_manifest(folder)["files"] if name.startswith(TOKENS)]


def read_token_log(
    files: Sequence[Path], tasks: Sequence[str], some: Sequence[str]
) -> Iterator[Piece]:
    """Yield the rows of some of the tasks from the Parquet files of a run.

    Raises
    ------
    DataError
        If a file is damaged.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from tqdm import tqdm

    # Not pyarrow.dataset, which filters by itself: the memory of its scanner grows with the rows.
    known, wanted = pa.array(tasks), pa.array(some)
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                batches = tqdm(
                    parquet.iter_batches(batch_size=ROWS, columns=COLUMNS),
                    desc=file.name,
                    total=-(-parquet.metadata.num_rows // ROWS),
                    disable=None,  # quiet when not a terminal
                )
                for batch in batches:
                    names = batch.column("task").cast(pa.string())
                    keep = pc.is_in(names, wanted)
                    for name in ("request", "repeat"):
                        keep = pc.and_(keep, pc.equal(batch.column(name), 0))
                    kept = batch.filter(keep)
                    experts = kept.column("experts")
                    yield Piece(
                        task=_ints(pc.index_in(names.filter(keep), known)),
                        document=_ints(kept.column("doc_id")),
                        layer=_ints(kept.column("layer")),
                        token=_ints(kept.column("token_id")),
                        count=_ints(pc.list_value_length(experts)),
                        experts=_ints(experts.flatten()),
                    )
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(
                f"{file} could not be read: {error}; run the evaluation again."
            ) from error


def _ints(column: object) -> Ints:
    return np.asarray(column, dtype=np.int64)


def read_samples(file: Path) -> list[Sample]:
    """Return the first request of every document in an internal routing log.

    Raises
    ------
    DataError
        If it is damaged.
    """
    return [s for s in read_internal_routing(file)["samples"] if s["request"] == s["repeat"] == 0]


def pieces_of(samples: Sequence[Sample], task: int) -> Iterator[Piece]:
    """Yield the rows of some samples of a task."""
    for sample in samples:
        tokens = np.array(sample["token_ids"], dtype=np.int64)
        for layer in sample["layers"]:
            selected = np.array(layer["selected_experts"], dtype=np.int64)
            used = selected >= 0
            yield Piece(
                np.full(len(tokens), task),
                np.full(len(tokens), sample["sample_id"]),
                np.full(len(tokens), layer["layer"]),
                tokens,
                used.sum(-1),
                selected[used],
            )
