"""Min-p: the experts whose weight reaches a share of the token's largest."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SCORED, Shown
from .declare import level
from .shares import Shares

SHARE = "share of the largest softmax weight to reach"


class MinP(Shares):
    """Take the experts whose weight is at least ``alpha`` times the largest.

    With ``min_k``, this is ik_llama.cpp's smart expert reduction: ``-ser 2,0.4`` is
    ``min_k=2, alpha=0.4`` here, with ``max_k`` the native top-k (its pull request 239).

    References
    ----------
    Nguyen et al. 2024, "Turning up the heat: min-p sampling", arXiv:2407.01082, for tokens.
    """

    name, label, alpha = "min_p", "min-p", SHARE
    source = "Nguyen et al. 2024, arXiv:2407.01082"
    declared = SCORED | {"alpha": level(SHARE)}

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return how many experts reach the share, int64 ``[tokens]``."""
        assert level is not None
        weights = torch.softmax(ranked, dim=-1)
        return (weights >= level.to(weights.dtype) * weights[..., :1]).sum(-1)

    def shown(self, ranked: Tensor, alpha: float) -> Shown:
        """Return the weights and the smallest weight kept."""
        weights = torch.softmax(ranked, dim=-1)
        return "share", weights, "threshold", (alpha * weights[:, :1]).expand_as(weights)
