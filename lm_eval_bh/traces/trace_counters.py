"""Counts a trace's selections, as a run's routing summary does."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.schema import UNUSED
from lm_eval_bh.traces.trace_document import MOST_EXPERTS, MOST_LAYERS, Ints, TraceDocument


class TraceCounters:
    """Exact counters of the layers of a trace, document by document.

    Attributes
    ----------
    layers : int64 [layers]
        Layer numbers of the first document, which all others must share.
    documents, tokens : int
        Numbers counted; further answers to a prompt do not count as documents.
    """

    def __init__(self) -> None:
        self.layers: Ints = np.array([], dtype=np.int64)
        self.documents = self.tokens = 0
        self._last = -1
        # The operating system only allocates the pages that are written.
        self._histogram = np.zeros((MOST_LAYERS, MOST_EXPERTS + 1), dtype=np.int64)
        self._usage = np.zeros((MOST_LAYERS, MOST_EXPERTS), dtype=np.int64)
        self._cross = np.zeros(MOST_LAYERS, dtype=np.int64)

    def add(self, document: TraceDocument) -> None:
        """Count a document.

        Raises
        ------
        DataError
            If its layers differ from the first document's.
        """
        if not self.tokens:
            self.layers = document.layers
        elif not np.array_equal(self.layers, document.layers):
            raise DataError(
                f"Document {document.document} of the trace has experts in "
                f"{len(document.layers)} layers, and the first in {len(self.layers)}: import "
                "traces of one model at a time."
            )
        used = document.experts != UNUSED
        counts = used.sum(-1)  # [tokens, layers]
        _, layer, _ = np.nonzero(used)
        np.add.at(self._usage, (self.layers[layer], document.experts[used]), 1)
        np.add.at(self._histogram, (np.broadcast_to(self.layers, counts.shape), counts), 1)
        self._cross[self.layers[1:]] += (counts[:, 1:] * counts[:, :-1]).sum(0)
        self.documents += document.document != self._last  # answers to a prompt come together
        self._last = document.document
        self.tokens += len(counts)

    @property
    def extremes(self) -> tuple[int, int]:
        """The fewest and the most experts that a token had in a layer."""
        seen = np.flatnonzero(self._histogram.sum(0))
        return int(seen[0]), int(seen[-1])

    def experts(self, stated: int | None) -> int:
        """Return the number of experts per layer: as stated, or one more than the highest seen.

        Raises
        ------
        ParameterError
            If the trace has more than stated.
        """
        seen = int(np.flatnonzero(self._usage.sum(0))[-1]) + 1
        if stated is not None and stated < seen:
            raise ParameterError(
                f"num_experts={stated} is too small: the trace has expert {seen - 1}."
            )
        return stated or seen

    def state(self, num_layers: int, experts: int) -> dict[str, Any]:
        """Return the counters as the processes of an evaluation hand them on."""
        return {
            "histogram": self._histogram[:num_layers, : experts + 1].tolist(),
            "usage": self._usage[:num_layers, :experts].tolist(),
            "cross": self._cross[:num_layers].tolist(),
            "seconds": 0.0,
        }
