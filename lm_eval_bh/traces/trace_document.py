"""The unit of every trace: the experts of a document's tokens, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import UNUSED

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Experts = NDArray[np.int16]

MOST_EXPERTS, MOST_LAYERS, MOST_TOKENS = 4096, 1024, 2**31 - 1
STEP = -1  # the number of no document: tokens that were decoded together, one of each row


@dataclass(frozen=True)
class TraceDocument:
    """All or some tokens of one document.

    Attributes
    ----------
    document : int
        Number of the document, from 0; or :data:`STEP`.
    where : str
        Place in the trace, for messages.
    layers : int64 [layers]
        Numbers of the layers, ascending.
    experts : int16 [tokens, layers, k]
        Padded with -1.
    positions : int64 [tokens]
        Positions in the document.
    tokens : int64 [tokens] or None
        Token ids, where the trace has them.
    weights : float64 [tokens, layers, k] or None
        Weights of the experts, where the trace has them.
    repeat : int
        Number of the answer among those to the same prompt.
    buffer : bool
        Whether the experts come from an engine's zeroed buffer, whose rows number the layers and
        where zeros may mean that nothing was written.
    """

    document: int
    where: str
    layers: Ints
    experts: Experts
    positions: Ints
    tokens: Ints | None = None
    weights: Floats | None = None
    repeat: int = 0
    buffer: bool = False

    @classmethod
    def of(
        cls,
        where: str,
        document: int,
        experts: NDArray[np.integer],
        *,
        layers: Sequence[int] | Ints | None = None,
        positions: Sequence[int] | Ints | None = None,
        tokens: Sequence[int] | Ints | None = None,
        weights: Floats | None = None,
        repeat: int = 0,
        buffer: bool = False,
    ) -> TraceDocument:
        """Build a document of a trace from what the engine wrote.

        Parameters
        ----------
        layers, positions
            By default counted from 0.

        Raises
        ------
        DataError
            If the numbers are of the wrong shape or out of range.
        """
        if experts.ndim != 3 or not np.issubdtype(experts.dtype, np.integer) or not experts.size:
            raise DataError(
                f"{where} is damaged: the experts must be integers [tokens, layers, k], not "
                f"{experts.dtype} {list(experts.shape)}; record the trace again."
            )
        length, number, k = experts.shape
        if k > MOST_EXPERTS:
            raise DataError(f"{where} is damaged: a token has {k} experts; record the trace again.")
        at = np.arange(length) if positions is None else np.asarray(positions)
        of_layer = np.arange(number) if layers is None else np.asarray(layers)
        ids = None if tokens is None else np.asarray(tokens)
        for name, values, least, most in (
            ("layer", of_layer, 0, MOST_LAYERS - 1),
            ("expert", experts, UNUSED, MOST_EXPERTS - 1),
            ("position", at, 0, MOST_TOKENS),
            ("token id", np.zeros(0, int) if ids is None else ids, 0, MOST_TOKENS),
            ("document", np.array([document]), STEP, MOST_TOKENS),
        ):
            wrong = values[(values < least) | (values > most)]
            if len(wrong):
                raise DataError(
                    f"{where} is damaged: found {name} {wrong[0]}, which is out of range; record "
                    "the trace again."
                )
        if len(at) != length or (ids is not None and len(ids) != length):
            raise DataError(
                f"{where} is damaged: {length} tokens have experts, but a different "
                "number of positions or ids was found; record the trace again."
            )
        return cls(
            document,
            where,
            of_layer.astype(np.int64),
            experts.astype(np.int16),
            at.astype(np.int64),
            None if ids is None else ids.astype(np.int64),
            weights,
            repeat,
            buffer,
        )

    def part(self, rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> TraceDocument:
        """Return the document with some of its tokens [tokens] and layers [layers]."""
        keep = np.ix_(rows, columns)
        return TraceDocument(
            self.document,
            self.where,
            self.layers[columns],
            self.experts[keep],
            self.positions[rows],
            None if self.tokens is None else self.tokens[rows],
            None if self.weights is None else self.weights[keep],
            self.repeat,
            self.buffer,
        )
