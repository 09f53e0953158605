"""Finds the tokens that vLLM decodes together in a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available

from lm_eval_bh.routing.methods.steps import step_of_queries


def decode_step(tokens: int, device: torch.device) -> Tensor | None:
    """Return ``RouterOutput.step`` of the current pass.

    Decoded tokens form one step, 0; all others have -1 and are decided alone. None if the pass has
    no metadata, as while memory is profiled.

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
    return step_of_queries(starts.to(device), tokens).of


def _query_starts(metadata: Any) -> Tensor | None:
    """Return where each request's tokens start, int ``[requests + 1]``."""
    if not isinstance(metadata, dict):
        return None
    found = (getattr(of_layer, "query_start_loc", None) for of_layer in metadata.values())
    return next((starts for starts in found if starts is not None), None)
