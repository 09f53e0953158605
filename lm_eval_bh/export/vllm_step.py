"""Finds the tokens that vLLM decodes together in a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available


def decode_step(tokens: int, device: torch.device) -> Tensor | None:
    """Return ``RouterOutput.step`` of the current pass.

    Tokens of requests that add one token form one step, 0. Tokens of longer parts of a prompt, and
    those that fill up the batch, have -1 and are decided alone. None if the pass has no metadata,
    as while memory is profiled.

    Parameters
    ----------
    tokens : int
        Number of tokens of the pass, including padding.
    device : torch.device
        Device of the result: int64 ``[tokens]``.
    """
    if not is_forward_context_available():
        return None
    starts = _query_starts(get_forward_context().attn_metadata)
    if starts is None:
        return None
    lengths = starts.diff().to(device)
    of_token = torch.full((tokens,), -1, dtype=torch.int64, device=device)
    decoded = torch.where(lengths == 1, 0, -1).repeat_interleave(lengths)[:tokens]
    of_token[: len(decoded)] = decoded
    return of_token


def _query_starts(metadata: Any) -> Tensor | None:
    """Return where each request's tokens start, int ``[requests + 1]``."""
    if not isinstance(metadata, dict):
        return None
    found = (getattr(of_layer, "query_start_loc", None) for of_layer in metadata.values())
    return next((starts for starts in found if starts is not None), None)
