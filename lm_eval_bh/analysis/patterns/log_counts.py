"""Counts over a log that streams by, in tables that do not grow with its length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm_eval_bh.analysis.patterns.log_reader import Ints, Piece


class Counts:
    """Counts over the logs of one configuration.

    Parameters
    ----------
    tasks : sequence of str
        The tasks; a piece names them by their place.
    layers : sequence of int
        The routed layers.
    experts : int
        Experts of a layer.
    classes : sequence of str
        The token classes.
    class_of : int64 [tokens]
        The place of each token's class; further token ids have the last one.
    documents : int
        Of how many documents of each task the use of the experts is kept, the first ones.

    Attributes
    ----------
    tokens : int64 [tasks, layers, classes]
        How many tokens there were.
    served : int64 [tasks, layers, classes, experts]
        How many of them each expert served.
    experts_of : int64 [token ids]
        How many experts served each token, over all its occurrences and layers.
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
        self.experts_of = np.zeros(0, dtype=np.int64)
        self._rows_of = np.zeros(0, dtype=np.int64)
        self._class_of = np.append(class_of, len(self.classes) - 1)
        self._place = np.full(max(layers, default=0) + 1, -1)
        self._place[list(layers)] = np.arange(len(layers))
        # Takes memory only for documents that occur: the system maps pages on demand.
        self._of_document = np.zeros(
            (len(self.tasks), documents, len(self.layers), experts), dtype=np.int32
        )
        self._rows_of_document = np.zeros((len(self.tasks), documents), dtype=np.int64)

    def add(self, piece: Piece) -> None:
        """Count the rows of a piece."""
        layer, kind = self._place[piece.layer], self.class_of(piece.token)
        row = np.repeat(np.arange(len(piece.token)), piece.count)  # of each expert
        _count(self.tokens, piece.task, layer, kind)
        _count(self.served, piece.task[row], layer[row], kind[row], piece.experts)
        self._rows_of = _sum(self._rows_of, np.bincount(piece.token))
        self.experts_of = _sum(self.experts_of, np.bincount(piece.token[row]))
        kept = piece.document < self._rows_of_document.shape[1]
        _count(self._rows_of_document, piece.task[kept], piece.document[kept])
        row, experts = row[kept[row]], piece.experts[kept[row]]
        _count(self._of_document, piece.task[row], piece.document[row], layer[row], experts)

    def class_of(self, tokens: Ints) -> Ints:
        """Return the place of the class of some token ids."""
        return self._class_of[np.minimum(tokens, len(self._class_of) - 1)]

    @property
    def occurrences(self) -> Ints:
        """How often each token id occurs, int64 ``[token ids]``; a token is once in every layer."""
        return self._rows_of // max(1, len(self.layers))

    @property
    def documents(self) -> list[tuple[int, int]]:
        """(task, document) of the documents that are kept, in order."""
        return [
            (int(task), int(document)) for task, document in np.argwhere(self._rows_of_document)
        ]

    def document_counts(self) -> tuple[Ints, Ints, Ints]:
        """Return what is known of the documents that are kept.

        Returns
        -------
        tasks : int64 [documents]
        tokens : int64 [documents]
        served : int64 [documents, layers * experts]
            How many of a document's tokens each expert served.
        """
        task, document = np.nonzero(self._rows_of_document)
        tokens = self._rows_of_document[task, document] // max(1, len(self.layers))
        served = self._of_document[task, document].astype(np.int64)
        return task, tokens, served.reshape(len(task), -1)


def _count(table: np.ndarray, *places: Ints) -> None:
    """Add 1 to a table at every place."""
    np.add.at(table.reshape(-1), np.ravel_multi_index(places, table.shape), 1)


def _sum(one: Ints, other: Ints) -> Ints:
    """Return the sum of two tables, the shorter one filled up with 0."""
    total = np.zeros(max(len(one), len(other)), dtype=np.int64)
    total[: len(one)] += one
    total[: len(other)] += other
    return total
