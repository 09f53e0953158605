"""What every trace is made of: the experts of a document's tokens, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import UNUSED

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_EXPERTS, MOST_LAYERS, MOST_TOKENS = 4096, 1024, 2**31 - 1


@dataclass(frozen=True)
class TraceDocument:
    """Some tokens of one document, or all.

    Attributes
    ----------
    document : int
        Which one, from 0.
    layers : int64 [layers]
        Numbers of the layers, ascending.
    experts : int64 [tokens, layers, k]
        Padded with -1; a token that no layer tells of is left out, and so is a layer without any.
    positions : int64 [tokens]
        In the document.
    tokens : int64 [tokens] or None
        Token ids, where the trace has them.
    weights : float64 [tokens, layers, k] or None
        Of the experts, where the trace has them.
    repeat : int
        Which answer to the same prompt.
    """

    document: int
    layers: Ints
    experts: Ints
    positions: Ints
    tokens: Ints | None = None
    weights: Floats | None = None
    repeat: int = 0

    @classmethod
    def of(
        cls,
        where: str,
        document: int,
        experts: NDArray[np.integer],
        *,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | Ints | None = None,
        tokens: Sequence[int] | Ints | None = None,
        weights: Floats | None = None,
        repeat: int = 0,
    ) -> TraceDocument | None:
        """Return a document of a trace; None if it tells of no token.

        Where a row names an expert twice, as engines do that cannot leave a slot empty, the second
        one counts for nothing.

        Parameters
        ----------
        where : str
            Of the trace, for messages.
        layers, positions
            By default counted from 0.

        Raises
        ------
        DataError
            If the numbers are of the wrong shape or out of range.
        """
        if experts.ndim != 3 or not np.issubdtype(experts.dtype, np.integer):
            raise DataError(
                f"{where} is damaged: the experts must be integers [tokens, layers, k], not "
                f"{experts.dtype} {list(experts.shape)}; record the trace again."
            )
        length, number, k = experts.shape
        if k > MOST_EXPERTS:
            raise DataError(f"{where} is damaged: a token has {k} experts; record the trace again.")
        chosen = experts.astype(np.int64)
        at = np.arange(length) if positions is None else np.asarray(positions)
        of_layer = np.arange(number) if layers is None else np.asarray(layers)
        ids = None if tokens is None else np.asarray(tokens)
        for name, numbers, least, most in (
            ("layer", of_layer, 0, MOST_LAYERS - 1),
            ("expert", chosen, UNUSED, MOST_EXPERTS - 1),
            ("position", at, 0, MOST_TOKENS),
            ("token id", np.zeros(0, int) if ids is None else ids, 0, MOST_TOKENS),
            ("document", np.array([document]), 0, MOST_TOKENS),
        ):
            wrong = numbers[(numbers < least) | (numbers > most)]
            if len(wrong):
                raise DataError(
                    f"{where} is damaged: found {name} {wrong[0]}, which is out of range; record "
                    "the trace again."
                )
        if len(at) != length or (ids is not None and len(ids) != length):
            raise DataError(
                f"{where} is damaged: {length} tokens have experts, but not as many have a "
                "position and an id; record the trace again."
            )
        for j in range(1, k):
            again = (chosen[..., :j] == chosen[..., j : j + 1]).any(-1)
            chosen[..., j][again] = UNUSED
        used = chosen != UNUSED
        rows, columns = used.any((1, 2)), used.any((0, 2))
        if not rows.any():
            return None
        keep = np.ix_(rows, columns)
        return cls(
            document,
            of_layer[columns].astype(np.int64),
            chosen[keep],
            at[rows].astype(np.int64),
            None if ids is None else ids[rows].astype(np.int64),
            None if weights is None else weights[keep],
            repeat,
        )
