"""Reads routing logs of any format in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import TOKENS, UNUSED, read_internal_routing, read_manifest

Ints = NDArray[np.int64]

UNKNOWN_TOKEN = 2**62  # larger than any logged id; pandas adds 1 to it
ROWS = 65536  # of a token log in memory at a time
COLUMNS = ["task", "doc_id", "request", "repeat", "layer", "token_id", "experts"]


@dataclass(frozen=True)
class Piece:
    """Some rows of a log: one row per token and layer, of the first request of each document.

    Further requests repeat the text with another ending, and repetitions all of it.

    Attributes
    ----------
    file : Path
        Source of the rows.
    task, document, layer, token, count : int64 [rows]
        Indices of task and document, layer, token id (:data:`UNKNOWN_TOKEN` if an imported trace
        has none), and number of experts.
    experts : int64 [count.sum()]
        The experts of all rows, one row after the other.
    loss : float64 [rows] or None
        Loss of the token in nats; NaN if missing, None if the log has no losses.
    """

    file: Path
    task: Ints
    document: Ints
    layer: Ints
    token: Ints
    count: Ints
    experts: Ints
    loss: NDArray[np.float64] | None = None


def token_files(folder: Path | None) -> list[Path]:
    """Return the token logs of a run, which are empty without ``log_routing=full``."""
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

    def ints(column: pa.Array) -> Ints:
        # Arrow refuses fractions, NumPy would not.
        return np.asarray(column.cast(pa.int64()))

    # Not pyarrow.dataset, whose scanner's memory grows with the rows.
    known, wanted = pa.array(tasks), pa.array(some)
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                has_loss = "loss" in parquet.schema_arrow.names  # not in earlier logs
                columns = [*COLUMNS, "loss"] if has_loss else COLUMNS
                batches = tqdm(
                    parquet.iter_batches(batch_size=ROWS, columns=columns),
                    desc=file.name,
                    total=-(-parquet.metadata.num_rows // ROWS),
                    disable=None,  # quiet when not a terminal
                )
                for batch in batches:
                    for name in COLUMNS:
                        if name != "token_id":
                            _refuse_nulls(batch.column(name), name)
                    names = batch.column("task").cast(pa.string())
                    keep = pc.is_in(names, wanted)
                    for name in ("request", "repeat"):
                        keep = pc.and_(keep, pc.equal(batch.column(name), 0))
                    kept = batch.filter(keep)
                    lists = kept.column("experts")
                    experts = pc.list_flatten(lists)
                    loss = kept.column("loss").cast(pa.float64()) if has_loss else None
                    _refuse_nulls(experts, "experts")
                    yield Piece(
                        file,
                        task=ints(pc.index_in(names.filter(keep), known)),
                        document=ints(kept.column("doc_id")),
                        layer=ints(kept.column("layer")),
                        token=ints(
                            pc.fill_null(kept.column("token_id").cast(pa.int64()), UNKNOWN_TOKEN)
                        ),
                        count=ints(pc.list_value_length(lists)),
                        experts=ints(experts),
                        loss=None if loss is None else loss.to_numpy(zero_copy_only=False),
                    )
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{file} could not be read: {error}; run the evaluation again."
            ) from error


def _refuse_nulls(column: Any, name: str) -> None:
    if column.null_count:
        raise ValueError(f"{name} is null in {column.null_count} rows")


def read_sample_log(file: Path, task: int) -> tuple[list[Piece], dict[int, float]]:
    """Return the rows of an internal routing log, and the losses of its documents.

    Losses are in nats per scored token. The task is an index, for :attr:`Piece.task`.

    Raises
    ------
    DataError
        If the log is damaged.
    """
    pieces, losses = [], {}
    try:
        for sample in read_internal_routing(file)["samples"]:
            if sample["request"] or sample["repeat"]:
                continue
            document, layers = int(sample["sample_id"]), sample["layers"]
            # [layers, tokens, max_k]
            selected = np.array([layer["selected_experts"] for layer in layers], dtype=np.int64)
            used = selected != UNUSED
            layer, token = np.meshgrid(
                np.array([layer["layer"] for layer in layers], dtype=np.int64),
                np.array(sample["token_ids"], dtype=np.int64),
                indexing="ij",
            )
            if layer.shape != used.shape[:2]:
                raise ValueError(f"document {document} has other tokens than experts")
            pieces.append(
                Piece(
                    file,
                    task=np.full(layer.size, task, dtype=np.int64),
                    document=np.full(layer.size, document, dtype=np.int64),
                    layer=layer.ravel(),
                    token=token.ravel(),
                    count=used.sum(-1).ravel(),
                    experts=selected[used],
                )
            )
            if sample["loss"] is not None:
                losses[document] = float(sample["loss"])
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise DataError(f"{file} is damaged: {error!r}; run the evaluation again.") from error
    return pieces, losses
