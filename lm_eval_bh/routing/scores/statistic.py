"""What is tested: the scores of a token's experts, made of its router logits."""

from __future__ import annotations

import torch
from torch import Tensor

STATISTICS = ("logit", "contribution")


def scores(router_logits: Tensor, log_factors: Tensor | None = None) -> Tensor:
    """Return the scores: the logits, or log(softmax weight x factor) where there are factors.

    Parameters
    ----------
    router_logits : Tensor
        ``[..., experts]``, any float dtype.
    log_factors : Tensor or None
        ``[experts]``, what is added to each expert's log weight; None for the logits themselves.

    Returns
    -------
    Tensor
        Same shape and device; float32, or float64 where the logits are, if there are factors.
    """
    if log_factors is None:
        return router_logits
    dtype = torch.promote_types(router_logits.dtype, torch.float32)
    return torch.log_softmax(router_logits, dim=-1, dtype=dtype) + log_factors.to(
        router_logits.device, dtype
    )
