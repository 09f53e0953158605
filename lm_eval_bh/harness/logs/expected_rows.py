"""Recognises the rows that lm-eval feeds to the model by their tokens.

lm-eval sorts requests by length across tasks, pads them, lets requests with a common context share
a row, repeats requests to balance processes, and probes batch sizes with artificial rows. A row of
a forward pass is therefore looked up by its tokens. Unexpected rows have no owner.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lm_eval import utils

from lm_eval_bh.harness.logs.ownership import Owner

TokenIds = tuple[int, ...]


class Row(NamedTuple):
    """A recognised row of a forward pass.

    Attributes
    ----------
    real, owned : int
        Number of tokens that are not padding; number that belong to the owners.
    owners : list of Owner
        The requests that it serves.
    prompt : int
        Number of tokens at its beginning that are context only.
    """

    real: int
    owned: int
    owners: list[Owner]
    prompt: int


Place = tuple[int | None, int]  # request position, None for a copy; the row's offset in it


class ExpectedRows:
    """Maps a row's tokens to its owners, with one group of owners per occurrence.

    Parameters
    ----------
    requests : sequence of (request, context, continuation)
        Tokenised requests, as HFLM scores them.
    owners : sequence of (Owner or None)
        The owner of each request; None for a copy.
    max_length : int
        Maximum length of a row; longer rows lose their beginning.
    shared : bool
        Whether requests with equal tokens share a row, as with HFLM's ``logits_cache``.
    """

    def __init__(
        self,
        requests: Sequence[Any] = (),
        owners: Sequence[Owner | None] = (),
        max_length: int = 1,
        shared: bool = False,
    ) -> None:
        self._groups: dict[TokenIds, list[list[Owner]]] = defaultdict(list)
        self._prompts: dict[TokenIds, int] = {}
        known: dict[TokenIds, list[Owner]] = {}
        for (_, context, continuation), owner in zip(requests, owners, strict=True):
            tokens = tuple(context + continuation)
            group = known.get(tokens[:-1]) if shared else None
            if group is None:
                group = known[tokens[:-1]] = []
                row = tokens[-(max_length + 1) :][:-1]
                self._groups[row].append(group)
                self._prompts[row] = max(len(row) + 1 - len(continuation), 0)
            if owner is not None:
                group.append(owner)
        self._lengths = sorted({len(row) for row in self._groups}, reverse=True)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def take(self, row: list[int]) -> Row:
        """Return the owners of a row that is padded on the right with zeros.

        If one expected row equals another one plus zeros, the longer is assumed, so that no token
        is mistaken for padding; their owners are served in either order, which does not change
        the counts. An unexpected row counts as real to its end.
        """
        shortest = len(row)
        while shortest and row[shortest - 1] == 0:
            shortest -= 1
        real = 0
        for length in self._lengths:
            if shortest <= length <= len(row):
                groups = self._groups.get(tuple(row[:length]))
                if groups is not None:
                    real = real or length
                    if groups:
                        prompt = self._prompts[tuple(row[:length])]
                        return Row(real, length, groups.pop(0), prompt)
        return Row(real or len(row), 0, [], len(row))


def window_places(
    documents: Iterable[list[int]], prefix_token: int, max_length: int
) -> Iterator[Place]:
    """Yield the places of the windows into which HFLM cuts tokenised documents, in its order.

    HFLM appends copies of windows to balance processes, so copies follow endlessly.
    """
    for position, tokens in enumerate(documents):
        scored = 0
        for window in utils.get_rolling_token_windows(
            token_list=tokens, prefix_token=prefix_token, max_seq_len=max_length, context_len=1
        ):
            context, targets = utils.make_disjoint_window(window)
            yield position, scored - (len(context) - 1)  # the last window looks back
            scored += len(targets)
    while True:
        yield None, 0
