"""Chooses which rows are decoded together, independently of the batch size."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def decode_batches(
    rows: Sequence[tuple[str, Hashable]], decode_batch: int, seed: int
) -> list[list[int]]:
    """Group requests whose rows are decoded side by side.

    The order is random, so that documents of similar length or subject do not end up together; it
    depends only on the requests and the seed.

    Parameters
    ----------
    rows : sequence of (str, hashable)
        For each request its task and a key of its row; requests with equal keys share a row.
    decode_batch : int
        Rows per batch; the last one of a task may have fewer.
    seed : int
        Seed of the order.

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
