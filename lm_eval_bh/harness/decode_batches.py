"""Which rows of an evaluation are decoded together, whatever the batch size of its passes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def decode_batches(
    rows: Sequence[tuple[str, Hashable]], decode_batch: int, seed: int
) -> list[list[int]]:
    """Put requests together whose rows are decoded side by side.

    The order is drawn, so that documents of one length or one subject do not come together; it
    depends on the requests and the seed, and on nothing else.

    Parameters
    ----------
    rows : sequence of (str, hashable)
        For each request its task, and what names its row; requests of equal ones share the row.
    decode_batch : int
        How many rows a batch has; the last one of a task may have fewer.
    seed : int
        Of the order.

    Returns
    -------
    list of list of int
        Positions of the requests of each batch; no batch has requests of two tasks.
    """
    members: dict[tuple[str, Hashable], list[int]] = {}
    for position, row in enumerate(rows):
        members.setdefault(row, []).append(position)
    of_task: dict[str, list[list[int]]] = {}
    for (task, _), positions in members.items():
        of_task.setdefault(task, []).append(positions)
    found = []
    for groups in of_task.values():
        order = np.random.default_rng(seed).permutation(len(groups))
        for start in range(0, len(groups), decode_batch):
            chosen = order[start : start + decode_batch]
            found.append([position for group in chosen for position in groups[group]])
    return found
