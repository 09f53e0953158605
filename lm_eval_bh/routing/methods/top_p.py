"""Top-p: the fewest experts that carry a share of the token's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SCORED, Shown
from .declare import level
from .shares import Shares

SHARE = "share of the softmax weight to reach"


class TopP(Shares):
    """Take the fewest experts whose weights add up to ``alpha``.

    References
    ----------
    Huang et al. 2024, "Harder tasks need more experts: dynamic routing in MoE models",
    arXiv:2403.07652.
    """

    name, label, alpha = "top_p", "top-p", SHARE
    source = "Huang et al. 2024, arXiv:2403.07652"
    declared = SCORED | {"alpha": level(SHARE)}

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return how many experts it takes, int64 ``[tokens]``."""
        assert level is not None
        cumulative = torch.softmax(ranked, dim=-1).cumsum(-1)
        return 1 + (cumulative < level.to(cumulative.dtype)).sum(-1)

    def shown(self, ranked: Tensor, alpha: float) -> Shown:
        """Return the cumulative weights and the share to reach."""
        level = ranked.new_full((1, ranked.shape[-1]), alpha)
        return "weights so far", torch.softmax(ranked, dim=-1).cumsum(-1), "to reach", level
