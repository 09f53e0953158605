"""Counts over a streamed log, whose size does not grow with the log's length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.patterns.log_reader import UNKNOWN_TOKEN, Ints, Piece
from lm_eval_bh.errors import DataError

LOSS_STEP, LOSS_STEPS = 0.02, 1024  # nats; larger losses count as the largest
ROUNDING = 1e-3  # nats below zero allowed for float32 rounding


class Counts:
    """Counts over the logs of one configuration.

    Parameters
    ----------
    tasks : sequence of str
        The tasks; pieces refer to them by index.
    layers : sequence of int
        The routed layers.
    experts : int
        Experts per layer.
    classes : sequence of str
        The token classes.
    class_of : int64 [tokens]
        Index of each token's class; other token ids have the last class.
    documents : int
        Number of first documents per task whose expert use is kept.

    Attributes
    ----------
    tokens : int64 [tasks, layers, classes]
        Number of tokens.
    served : int64 [tasks, layers, classes, experts]
        Number of them routed to each expert.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        layers: Sequence[int],
        experts: int,
        classes: Sequence[str],
        class_of: Ints,
        documents: int,
    ) -> None:
        self.tasks, self.layers, self.experts = list(tasks), list(layers), experts
        self.classes = list(classes)
        shape = len(self.tasks), len(self.layers), len(self.classes)
        self.tokens = np.zeros(shape, dtype=np.int64)
        self.served = np.zeros((*shape, experts), dtype=np.int64)
        self._class_of = np.append(class_of, len(self.classes) - 1)
        # A log may hold any number as a token id, so only ids that occur have a row.
        self._of_token = pd.DataFrame(
            {"size": [], "sum": []}, index=pd.Index([], dtype=np.int64), dtype=np.int64
        )
        # Uses memory only for documents that occur: the system maps pages on demand.
        self._of_document = np.zeros(
            (len(self.tasks), documents, len(self.layers), experts), dtype=np.int32
        )
        self._of_loss: dict[int, Ints] = {}  # by task: [layers, steps of the loss, experts + 1]
        self._rows_of_document = np.zeros((len(self.tasks), documents), dtype=np.int64)

    def add(self, piece: Piece) -> None:
        """Count the rows of a piece.

        Raises
        ------
        DataError
            If a number in it is out of range.
        """
        layer = pd.Index(self.layers).get_indexer(piece.layer)
        for name, numbers, known in (
            ("document", piece.document, piece.document >= 0),
            ("layer", piece.layer, layer >= 0),
            ("token id", piece.token, piece.token >= 0),
            ("expert", piece.experts, (piece.experts >= 0) & (piece.experts < self.experts)),
        ):
            if not known.all():
                raise DataError(
                    f"{piece.file} is damaged: found {name} {numbers[~known][0]}, which is out of "
                    "range; run the evaluation again."
                )
        self._add_losses(piece, layer)
        kind = self._kinds(piece.token)
        row = np.repeat(np.arange(len(piece.token)), piece.count)  # row of each expert
        _count(self.tokens, piece.task, layer, kind)
        _count(self.served, piece.task[row], layer[row], kind[row], piece.experts)
        found = pd.Series(piece.count).groupby(piece.token).agg(["size", "sum"])
        self._of_token = self._of_token.add(found, fill_value=0).astype(np.int64)
        kept = piece.document < self._rows_of_document.shape[1]
        _count(self._rows_of_document, piece.task[kept], piece.document[kept])
        row, experts = row[kept[row]], piece.experts[kept[row]]
        _count(self._of_document, piece.task[row], piece.document[row], layer[row], experts)

    def _add_losses(self, piece: Piece, layer: Ints) -> None:
        if piece.loss is None:
            return
        known = ~np.isnan(piece.loss)
        if (piece.loss[known] < -ROUNDING).any():
            raise DataError(
                f"{piece.file} is damaged: found a loss of {np.nanmin(piece.loss):g} nats, which "
                "is out of range; run the evaluation again."
            )
        steps = np.clip(piece.loss[known] / LOSS_STEP, 0, LOSS_STEPS - 1).astype(np.int64)
        task, layer, count = piece.task[known], layer[known], piece.count[known]
        for one in np.unique(task):
            if one not in self._of_loss:
                shape = len(self.layers), LOSS_STEPS, self.experts + 1
                self._of_loss[int(one)] = np.zeros(shape, dtype=np.int64)
            some = task == one
            _count(self._of_loss[int(one)], layer[some], steps[some], count[some])

    def loss_tables(self) -> dict[tuple[str, int], Ints]:
        """Return the number of tokens by loss and experts, for tasks with token losses.

        Returns
        -------
        dict
            (task, layer) -> int64 ``[steps of the loss, experts + 1]``.
        """
        return {
            (self.tasks[task], layer): table
            for task, tables in sorted(self._of_loss.items())
            for layer, table in zip(self.layers, tables, strict=True)
        }

    def require_rows(self, task: int, folder: Path) -> None:
        """Raise :class:`DataError` unless all layers have the same number of a task's tokens."""
        rows = self.tokens[task].sum(-1)
        if not rows.all() or np.ptp(rows):
            raise DataError(
                f"{folder} is incomplete: found {rows.min()} to {rows.max()} tokens of "
                f"{self.tasks[task]} in a layer; run the evaluation again."
            )

    def token_table(self) -> pd.DataFrame:
        """Return ``token_id, token_class, occurrences, mean_experts``, one row per token id."""
        rows = self._of_token["size"] // len(self.layers)  # a token occurs once per layer
        rows = rows[(rows > 0) & (rows.index != UNKNOWN_TOKEN)]
        ids = rows.index.to_numpy(np.int64)
        experts = self._of_token["sum"].loc[ids].to_numpy()
        return pd.DataFrame(
            {
                "token_id": ids,
                "token_class": np.array(self.classes)[self._kinds(ids)],
                "occurrences": rows.to_numpy(),
                "mean_experts": experts / (rows.to_numpy() * len(self.layers)),
            }
        )

    def class_table(self) -> pd.DataFrame:
        """Return ``task, token_class, tokens, mean_experts`` of classes that occur."""
        rows, experts = self.tokens.sum(1), self.served.sum((1, 3))
        task, kind = np.nonzero(rows)
        return pd.DataFrame(
            {
                "task": np.array(self.tasks)[task],
                "token_class": np.array(self.classes)[kind],
                "tokens": rows[task, kind] // len(self.layers),
                "mean_experts": experts[task, kind] / rows[task, kind],
            }
        )

    def document_table(self) -> tuple[pd.DataFrame, Ints]:
        """Return the kept documents, and their use of experts.

        Returns
        -------
        documents : DataFrame
            ``task, document, tokens, mean_experts``, one row per document.
        served : int64 [documents, layers * experts]
            Number of a document's tokens routed to each expert.
        """
        tokens = self._rows_of_document // len(self.layers)
        task, document = np.nonzero(tokens)
        served = self._of_document[task, document].astype(np.int64)
        served = served.reshape(len(task), len(self.layers) * self.experts)
        length = tokens[task, document]
        documents = pd.DataFrame(
            {
                "task": np.array(self.tasks)[task],
                "document": document,
                "tokens": length,
                "mean_experts": served.sum(-1) / (length * len(self.layers)),
            }
        )
        return documents, served

    def _kinds(self, tokens: Ints) -> Ints:
        """Return the class index of each token id; the last for unknown ids."""
        return self._class_of[np.minimum(tokens, len(self._class_of) - 1)]


def _count(table: np.ndarray, *places: Ints) -> None:
    """Add 1 to a table at every place."""
    np.add.at(table.reshape(-1), np.ravel_multi_index(places, table.shape), 1)
