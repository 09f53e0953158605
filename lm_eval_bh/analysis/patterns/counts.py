"""What is counted while a log streams by: tables whose size does not grow with its length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.analysis.patterns.logs import Ints, Piece


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
    occurrences, experts_of : int64 [token ids]
        How often each token occurs, and how many experts served it, over all layers.
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
        self._rows_of = np.zeros(len(class_of), dtype=np.int64)
        self.experts_of = np.zeros(len(class_of), dtype=np.int64)
        self._class_of = class_of
        self._limit = documents
        self._place = np.full(max(layers, default=0) + 1, -1)
        self._place[list(layers)] = np.arange(len(layers))
        self._of_document: dict[tuple[int, int], NDArray[np.int32]] = {}
        self._rows_of_document: dict[tuple[int, int], int] = {}

    def add(self, piece: Piece) -> None:
        """Count the rows of a piece."""
        if not len(piece.token):
            return
        self._grow(int(piece.token.max()) + 1)
        layer = self._place[piece.layer]
        kinds = self._class_of[piece.token]
        key = np.ravel_multi_index((piece.task, layer, kinds), self.tokens.shape)
        self.tokens += np.bincount(key, minlength=self.tokens.size).reshape(self.tokens.shape)
        self.served += self._served_by(key, piece, self.tokens.size).reshape(self.served.shape)
        self._rows_of += np.bincount(piece.token, minlength=len(self._rows_of))
        self.experts_of += np.bincount(
            piece.token, weights=piece.count, minlength=len(self._rows_of)
        ).astype(np.int64)
        self._add_documents(piece, layer)

    def _served_by(self, key: Ints, piece: Piece, keys: int) -> Ints:
        """Return int64 ``[keys * experts]``: how often each expert served rows of each key."""
        flat = np.repeat(key, piece.count) * self.experts + piece.experts
        return np.bincount(flat, minlength=keys * self.experts)

    def class_of(self, tokens: Ints) -> Ints:
        """Return the place of the class of some token ids."""
        return self._class_of[tokens]

    def _grow(self, tokens: int) -> None:
        """Make room for token ids beyond the tokenizer's."""
        if more := max(0, tokens - len(self._class_of)):
            self._class_of = np.pad(
                self._class_of, (0, more), constant_values=len(self.classes) - 1
            )
            self._rows_of = np.pad(self._rows_of, (0, more))
            self.experts_of = np.pad(self.experts_of, (0, more))

    def _add_documents(self, piece: Piece, layer: Ints) -> None:
        pairs, local = np.unique(
            np.stack([piece.task, piece.document]), axis=1, return_inverse=True
        )
        width = len(self.layers) * self.experts
        rows = np.bincount(local, minlength=pairs.shape[1])
        served = self._served_by(
            local * len(self.layers) + layer, piece, pairs.shape[1] * len(self.layers)
        )
        for (task, document), n, used in zip(
            pairs.T.tolist(), rows.tolist(), served.reshape(-1, width), strict=True
        ):
            if document < self._limit:
                key = task, document
                self._rows_of_document[key] = self._rows_of_document.get(key, 0) + n
                if key in self._of_document:
                    self._of_document[key] += used.astype(np.int32)
                else:
                    self._of_document[key] = used.astype(np.int32)

    @property
    def occurrences(self) -> Ints:
        """How often each token id occurs, int64 ``[token ids]``; a token is once in every layer."""
        return self._rows_of // max(1, len(self.layers))

    @property
    def documents(self) -> list[tuple[int, int]]:
        """(task, document) of the documents that are kept, in order."""
        return sorted(self._of_document)

    def document_counts(self) -> tuple[Ints, Ints, Ints]:
        """Return what is known of the documents that are kept.

        Returns
        -------
        tasks : int64 [documents]
        tokens : int64 [documents]
        served : int64 [documents, layers * experts]
            How many of a document's tokens each expert served.
        """
        keys = self.documents
        served = np.array([self._of_document[key] for key in keys], dtype=np.int64)
        rows = np.array([self._rows_of_document[key] for key in keys], dtype=np.int64)
        tasks = np.array([task for task, _ in keys], dtype=np.int64)
        return tasks, rows // max(1, len(self.layers)), served.reshape(len(keys), -1)
