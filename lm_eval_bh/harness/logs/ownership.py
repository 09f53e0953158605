"""One forward pass as the logs see it: owners of its rows, and real tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.methods.steps import Steps, steps_of


@dataclass(frozen=True)
class Owner:
    """The request that a row of a forward pass serves.

    Attributes
    ----------
    task : str
        Name of the task.
    doc_id, request : int
        Number of the document in the task, and of the request in the document.
    repeat : int
        Number of the repetition, from 0.
    offset : int
        Number of the request's tokens in earlier rows: windows of a long document.
    """

    task: str
    doc_id: int
    request: int
    repeat: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Batch:
    """The rows of one forward pass.

    Attributes
    ----------
    owners : sequence of sequence of Owner
        For each row, the requests that it serves: none, one, or several that share it.
    mask : Tensor
        bool ``[rows, length]`` on the CPU; False for padding and for rows without an owner.
    token_ids : Tensor
        int64 ``[rows, length]`` on the CPU.
    first : sequence of int
        For each row, the position in its request of its first real token, before ``offset``.
    decoded : Tensor or None
        bool ``[rows, length]``, which tokens are not in prompts; None if all are not.
    """

    owners: Sequence[Sequence[Owner]]
    mask: Tensor
    token_ids: Tensor
    first: Sequence[int]
    decoded: Tensor | None = None

    @cached_property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        lengths: list[int] = self.mask.numpy().sum(-1).tolist()
        return lengths

    def steps(self, config: RoutingConfig) -> Steps | None:
        """Return which tokens are decoded together; None if the configuration does not say."""
        if config.decode_batch is None:
            return None
        counted = self.mask
        if config.phase == "decode" and self.decoded is not None:
            counted = counted & self.decoded
        rows, length = self.mask.shape
        return steps_of(rows, length, config.decode_batch, counted.flatten())

    @cached_property
    def flat(self) -> list[Tensor]:
        """For each row, int64 [real tokens]: places in the batch flattened to [tokens]."""
        width = self.mask.shape[1]
        return [row.nonzero().flatten() + number * width for number, row in enumerate(self.mask)]
