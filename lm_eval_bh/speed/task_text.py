"""The tokens of a speed phase: the text of a task, in batches without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from lm_eval_bh.errors import DataError


def rows_of(lm: Any, task: Any, documents: int) -> list[list[int]]:
    """Return the rows of token ids that lm-eval would feed for a task's first documents.

    Parameters
    ----------
    lm : HFLM
        Provides the tokenizer and the longest window.
    task : lm_eval.api.task.Task
        The loaded task.
    documents : int
        Maximum number of documents.

    Raises
    ------
    DataError
        If the task has no text.
    """
    task.build_all_requests(limit=documents, rank=0, world_size=1)
    # A context with several continuations is used once.
    texts = dict.fromkeys(
        "".join(part for part in instance.args if isinstance(part, str))
        for instance in task.instances
    )
    rows = []
    for text in texts:
        tokens = lm.tok_encode(text)
        rows += [tokens[at : at + lm.max_length] for at in range(0, len(tokens), lm.max_length)]
    if not any(rows):
        raise DataError(f"The task {task.config.task} has no text: measure another task.")
    return [row for row in rows if row]


def prefill_batches(rows: Sequence[Sequence[int]], size: int, number: int) -> list[Tensor]:
    """Return batches of rows of about the same length, as an evaluation makes them.

    The rows are sorted by length and cut into batches; ``number`` evenly spread batches are taken,
    each cut to its shortest row, so that there is no padding for some method to skip.

    Parameters
    ----------
    size : int
        Rows per batch; rows are repeated if there are too few.

    Returns
    -------
    list of int64 [size, length]
    """
    ordered = sorted(rows, key=len, reverse=True)
    batches = [ordered[at : at + size] for at in range(0, len(ordered) - size + 1, size)]
    batches = batches or [list(islice(cycle(ordered), size))]
    taken = [batches[at * len(batches) // number] for at in range(min(number, len(batches)))]
    return [
        torch.tensor([list(row[: min(map(len, batch))]) for row in batch], dtype=torch.int64)
        for batch in taken
    ]


def decode_rows(rows: Sequence[Sequence[int]], size: int, length: int) -> Tensor:
    """Return consecutive pieces of the whole text, int64 ``[size, length]``."""
    stream = islice(cycle(token for row in rows for token in row), size * length)
    return torch.tensor(list(stream), dtype=torch.int64).reshape(size, length)
