"""Counts a trace's selections, as a run's routing summary does."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.schema import UNUSED
from lm_eval_bh.traces.trace_document import (
    MOST_EXPERTS,
    MOST_LAYERS,
    STEP,
    Ints,
    TraceDocument,
)


class TraceCounters:
    """Exact counters of the layers of a trace, document by document.

    Attributes
    ----------
    layers : int64 [layers]
        Layer numbers of the first document, which all others must share.
    documents, tokens : int
        Numbers counted; further answers to a prompt do not count as documents.
    steps : list of int
        Rows of each step, if the trace has steps.
    """

    def __init__(self) -> None:
        self.layers: Ints = np.array([], dtype=np.int64)
        self.documents = self.tokens = 0
        self.steps: list[int] = []
        self._last = self._highest = -1
        # The operating system only allocates the pages that are written.
        self._histogram = np.zeros((MOST_LAYERS, MOST_EXPERTS + 1), dtype=np.int64)
        self._usage = np.zeros((MOST_LAYERS, MOST_EXPERTS), dtype=np.int64)
        self._cross = np.zeros(MOST_LAYERS, dtype=np.int64)
        self._distinct = np.zeros(MOST_LAYERS, dtype=np.int64)

    def add(self, document: TraceDocument) -> None:
        """Count a document, or a step's different experts.

        Raises
        ------
        DataError
            If its layers differ from the first document's.
        """
        if not self.layers.size:
            self.layers = document.layers
        elif not np.array_equal(self.layers, document.layers):
            raise DataError(
                f"{document.where} has experts in {len(document.layers)} layers, and the first "
                f"document in {len(self.layers)}: import traces of one model at a time."
            )
        used = document.experts != UNUSED
        self._highest = max(self._highest, int(document.experts.max()))
        counts = used.sum(-1)  # [tokens, layers]
        _, layer, _ = np.nonzero(used)
        if document.document == STEP:
            read = np.zeros((len(self.layers), MOST_EXPERTS), dtype=np.bool_)
            read[layer, document.experts[used]] = True
            self._distinct[self.layers] += read.sum(-1)
            self.steps.append(len(counts))
            return
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
        seen = self._highest + 1
        if stated is not None and stated < seen:
            raise ParameterError(
                f"num_experts={stated} is too small: the trace has expert {seen - 1}."
            )
        return stated or seen

    @property
    def mean_distinct(self) -> float | None:
        """The mean number of different experts of a layer and step, where there are steps."""
        rows = len(self.steps) * len(self.layers)
        return float(self._distinct.sum()) / rows if rows else None

    def state(self, num_layers: int, experts: int) -> dict[str, Any]:
        """Return the counters as the processes of an evaluation hand them on."""
        sizes = np.bincount(self.steps).tolist() if self.steps else []
        steps = {
            "decode_batch": None,  # the engine's, which may have changed from step to step
            "distinct": self._distinct[:num_layers].tolist(),
            "sizes": [sizes] * num_layers,
        }
        return (steps if self.steps else {}) | {
            "histogram": self._histogram[:num_layers, : experts + 1].tolist(),
            "usage": self._usage[:num_layers, :experts].tolist(),
            "cross": self._cross[:num_layers].tolist(),
            "seconds": 0.0,
        }
