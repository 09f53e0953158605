"""The full log: every token of every request, layer by layer, as Parquet in row groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lm_eval_bh.errors import DataError
from lm_eval_bh.harness.logs.log_folder import LogFolder, explaining
from lm_eval_bh.harness.logs.ownership import Batch
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.methods.pick import Picked
from lm_eval_bh.schema import TOKENS, token_schema

ROW_GROUP = 131072  # rows gathered in memory before they are written


class TokenLog:
    """Writes one row per token, layer and owning request.

    Parameters
    ----------
    folder : LogFolder
        Folder of the parts; each part is renamed once complete.
    num_experts : int
        Number of experts per layer, which is the index of an unused slot.
    with_logits : bool
        Whether to write router logits too, as float16.
    config : RoutingConfig
        Determines which tokens are decoded together.
    """

    def __init__(
        self, folder: LogFolder, num_experts: int, with_logits: bool, config: RoutingConfig
    ) -> None:
        self._folder = folder
        self._num_experts = num_experts
        self._with_logits = with_logits
        self._config = config
        self._schema = token_schema(with_logits, num_experts, config.decode_batch is not None)
        self._steps_before = folder.rank << 40  # so that processes use different numbers
        self._waiting: list[pa.RecordBatch] = []
        self._rows_waiting = 0
        self._writer: pq.ParquetWriter | None = None
        self._take: Tensor | None = None
        self._columns: dict[str, Any] = {}
        self._layers: list[dict[str, Any]] = []  # of the current pass
        self._loss: pa.Array | None = None
        self.parts: list[str] = []
        self.rows = 0

    def begin(self, batch: Batch, device: torch.device) -> None:
        """List every (owner, token) pair of the pass, with one row per layer."""
        self._gather()
        take, tasks, documents, requests, repeats, positions = [], [], [], [], [], []
        codes: dict[str, int] = {}
        for row, owners in enumerate(batch.owners):
            flat = batch.flat[row]
            for owner in owners if len(flat) else ():
                take.append(flat)
                code = codes.setdefault(owner.task, len(codes))
                tasks.append(np.full(len(flat), code, dtype=np.int32))
                documents.append(np.full(len(flat), owner.doc_id, dtype=np.int32))
                requests.append(np.full(len(flat), owner.request, dtype=np.int16))
                repeats.append(np.full(len(flat), owner.repeat, dtype=np.int16))
                start = owner.offset + batch.first[row]
                positions.append(np.arange(start, start + len(flat), dtype=np.int32))
        if not take:
            self._take = None
            return
        self._take = torch.cat(take)
        self._columns = {
            "task": pa.DictionaryArray.from_arrays(np.concatenate(tasks), list(codes)),
            "doc_id": np.concatenate(documents),
            "request": np.concatenate(requests),
            "repeat": np.concatenate(repeats),
            "position": np.concatenate(positions),
            "token_id": batch.token_ids.flatten()[self._take].numpy().astype(np.int32),
        }
        steps = batch.steps(self._config)
        if steps is not None:
            step = steps.of[self._take].numpy()
            self._columns["step"] = np.where(step < 0, -1, step + self._steps_before)
            self._steps_before += steps.number

    def layer(self, layer: int, router_logits: Tensor, selection: Picked) -> None:
        """Gather one layer's rows."""
        if self._take is None:
            return
        take = self._take.to(selection.counts.device)
        counts = selection.counts[take].cpu().numpy()
        indices = selection.indices[take].cpu().numpy()
        weights = selection.weights.detach()[take].float().cpu().numpy()
        used = indices < self._num_experts
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        columns = self._columns | {
            "layer": np.full(len(counts), layer, dtype=np.int16),
            "count": counts.astype(np.int16),
            "experts": pa.ListArray.from_arrays(offsets, indices[used].astype(np.int16)),
            "weights": pa.ListArray.from_arrays(offsets, weights[used]),
        }
        if self._with_logits:
            logits = router_logits.detach()[take].to(torch.float16).cpu().numpy()
            columns["logits"] = pa.FixedSizeListArray.from_arrays(
                pa.array(logits.reshape(-1)), self._num_experts
            )
        self._layers.append(columns)

    def scored(self, losses: Callable[[], Tensor]) -> None:
        """Keep the losses of the tokens of this pass."""
        if self._take is not None:
            values = losses().flatten()[self._take].numpy()
            self._loss = pa.array(values, pa.float32(), mask=np.isnan(values))

    def end(self) -> None:
        """Write a row group if enough rows have gathered."""
        self._gather()
        if self._rows_waiting >= ROW_GROUP:
            self._write()

    def flush(self) -> None:
        """Finish the part being written, and rename it."""
        self._gather()
        if self._waiting:
            self._write()
        if self._writer is not None:
            with explaining(self._folder.path):
                self._writer.close()
                name = f"{TOKENS}/part-{self._folder.rank}-{len(self.parts)}.parquet"
                self._temporary.replace(self._folder.path / name)
            self.parts.append(name)
            self._writer = None

    def discard(self) -> None:
        """Remove the part being written."""
        if self._writer is not None:
            self._writer.close()
            self._temporary.unlink(missing_ok=True)
            self._writer = None

    def _gather(self) -> None:
        """Make rows from the layers of a pass, once it is known whether it has losses."""
        for columns in self._layers:
            number = len(columns["count"])
            loss = pa.nulls(number, pa.float32()) if self._loss is None else self._loss
            of_layer = columns | {"loss": loss}
            arrays = [pa.array(of_layer[field.name], field.type) for field in self._schema]
            self._waiting.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
            self._rows_waiting += number
        self._layers, self._loss = [], None

    def _write(self) -> None:
        table = pa.Table.from_batches(self._waiting).unify_dictionaries()
        try:
            with explaining(self._folder.path):
                if self._writer is None:
                    self._writer = pq.ParquetWriter(
                        self._temporary, self._schema, compression="zstd"
                    )
                self._writer.write_table(table)
        except DataError:
            self._temporary.unlink(missing_ok=True)  # it may have filled the disk
            raise
        self.rows += table.num_rows
        self._waiting, self._rows_waiting = [], 0

    @property
    def _temporary(self) -> Path:
        """The part that is being written; hidden, since it is incomplete."""
        return self._folder.path / TOKENS / f".part-{self._folder.rank}.parquet.tmp"
