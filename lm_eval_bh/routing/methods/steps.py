"""Which tokens are decoded together, and how many distinct experts they read.

A step is what an engine decodes at once: one token per row. In a pass over whole rows, the tokens
at one position of a batch of rows form a step: a causal model computes the same for them as if the
rows were decoded side by side, token by token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Steps(NamedTuple):
    """The steps of a pass.

    Attributes
    ----------
    of : Tensor
        int64 ``[tokens]``, the step of each token; -1 for tokens in no step, such as padding.
    number : int
        Number of steps.
    """

    of: Tensor
    number: int


def steps_of(
    rows: int,
    length: int,
    decode_batch: int | None = None,
    counted: Tensor | None = None,
    device: torch.device | None = None,
) -> Steps:
    """Return the steps of a pass over ``rows`` of ``length`` tokens.

    Parameters
    ----------
    rows, length : int
        Shape of the pass, whose tokens are ordered by row.
    decode_batch : int or None
        How many rows are decoded together, in their order; None for all.
    counted : Tensor or None
        bool ``[tokens]``, which tokens belong to a step; None for all.
    device : torch.device, optional
        Device of the result; by default that of ``counted``.
    """
    if device is None:
        device = torch.device("cpu") if counted is None else counted.device
    group = torch.arange(rows, device=device) // (decode_batch or rows)
    of = (group.unsqueeze(-1) * length + torch.arange(length, device=device)).flatten()
    if counted is not None:
        of = torch.where(counted.to(device), of, -1)
    return Steps(of, -(-rows // (decode_batch or rows)) * length)


def step_of_queries(starts: Tensor, tokens: int) -> Steps:
    """Return the one step of a pass in which an engine lays the tokens of all requests in one row.

    Those of requests that add one token are decoded together; of the others, pieces of prompts, and
    of what fills the row up, each is of none.

    Parameters
    ----------
    starts : Tensor
        int ``[requests + 1]``, where each request's tokens begin, on the device of the result.
    tokens : int
        Of the row.
    """
    lengths = starts.diff()
    of = torch.full((tokens,), -1, dtype=torch.int64, device=starts.device)
    decoded = torch.where(lengths == 1, 0, -1).repeat_interleave(lengths)[:tokens]
    of[: len(decoded)] = decoded
    return Steps(of, 1)


def distinct_experts(indices: Tensor, steps: Steps, num_experts: int) -> Tensor:
    """Return the distinct experts of each layer, added up over steps, int64 ``[layers]``.

    Parameters
    ----------
    indices : Tensor
        int64 ``[layers, tokens, slots]``, ``num_experts`` in unused slots.
    steps : Steps
        The tokens' steps.
    num_experts : int
        Experts per layer.
    """
    wide = num_experts + 1
    step = torch.where(steps.of < 0, steps.number, steps.of)
    place = (step.unsqueeze(-1) * wide + indices).flatten(1)
    read = torch.zeros(
        len(indices), (steps.number + 1) * wide, dtype=torch.bool, device=indices.device
    )
    read.scatter_(1, place, True)
    return read.view(len(indices), -1, wide)[:, :-1, :-1].sum((1, 2))


def step_sizes(steps: Steps, most: int) -> Tensor:
    """Return how many steps have 0, 1, ... ``most`` tokens, int64 ``[most + 1]``."""
    tokens = torch.zeros(steps.number + 1, dtype=torch.int64, device=steps.of.device)
    tokens.scatter_add_(0, steps.of % (steps.number + 1), torch.ones_like(steps.of))
    sizes = torch.zeros(most + 1, dtype=torch.int64, device=steps.of.device)
    return sizes.scatter_add_(0, tokens[:-1].clamp(max=most), torch.ones_like(tokens[:-1]))
