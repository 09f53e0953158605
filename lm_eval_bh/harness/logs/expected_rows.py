"""The rows that lm-eval will feed to the model, found again by their tokens.

lm-eval sorts requests by length across tasks, pads them, lets requests that share a context share a
row, repeats requests to even out processes, and probes batch sizes with rows nobody asked for. So a
row of a forward pass is looked up by its tokens. A row that is not expected belongs to nobody.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lm_eval import utils

from lm_eval_bh.harness.logs.ownership import Owner

TokenIds = tuple[int, ...]


class Row(NamedTuple):
    """A row of a forward pass, found again.

    Attributes
    ----------
    real, owned : int
        How many of its tokens are no padding; how many are the owners'.
    owners : list of Owner
        Who is served by it.
    prompt : int
        How many tokens at its beginning are context only.
    """

    real: int
    owned: int
    owners: list[Owner]
    prompt: int


Place = tuple[int | None, int]  # position of the request, None for a copy; offset of the row in it


class ExpectedRows:
    """A table from the tokens of a row to its owners, one group of owners for each time it comes.

    Parameters
    ----------
    requests : sequence of (request, context, continuation)
        Tokenised, as HFLM scores them.
    owners : sequence of (Owner or None)
        The owner of each request; None for a copy.
    max_length : int
        Of a row: longer ones lose their beginning.
    shared : bool
        Whether requests with equal tokens share one row, as with HFLM's ``logits_cache``.
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
        """Return whose a row is that is padded on the right with zeros.

        Where one expected row is another one and zeros, the longer is taken to be real, so that no
        token of it is ever mistaken for padding; their owners are served in either order, which
        makes no difference to what is counted. A row that nobody expects is real to its end.
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

    HFLM appends copies of windows to even out processes, so copies follow without end.
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
