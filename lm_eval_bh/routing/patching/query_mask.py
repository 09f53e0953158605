"""Reads from an attention mask which tokens of a pass are real."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def query_mask(mask: Any, rows: int, length: int, cache: Any = None) -> Tensor | None:
    """Return which tokens of a pass are real by its attention mask, bool ``[rows, length]``.

    Parameters
    ----------
    mask : Tensor, or dict of layer type to Tensor
        ``[rows, cached + length]``, 0 for padding; or ``[rows, 1, length, keys]``, bool or added to
        the attention scores. In the latter, a token is real if it may attend to itself.
    rows, length : int
        Shape of the pass.
    cache : Cache or None
        The cache, which knows the number of earlier tokens.

    Returns
    -------
    Tensor or None
        None for any other format.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.shape[0] not in (1, rows):
        return None
    if mask.ndim == 2 and mask.shape[1] >= length:
        return (mask[:, -length:] != 0).expand(rows, length)
    if mask.ndim != 4 or mask.shape[-2] != length or mask.shape[-1] < length:
        return None
    allowed = mask[:, 0]
    if allowed.is_floating_point():
        allowed = allowed > torch.finfo(allowed.dtype).min / 2
    if cache is not None and not hasattr(cache, "get_seq_length"):  # as in continuous batching
        return None
    seen = 0 if cache is None else cache.get_seq_length()
    latest = mask.shape[-1] - length  # first query's place, if the last keys are its own
    place = torch.arange(length, device=mask.device)
    place = place + (seen.clamp(max=latest) if isinstance(seen, Tensor) else min(seen, latest))
    own = allowed.gather(-1, place.expand(len(allowed), length).unsqueeze(-1))
    return (own[..., 0] != 0).expand(rows, length)
