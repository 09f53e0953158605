"""Elbow: the experts before the knee of the sorted router curve."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SCORED
from .declare import Parameter, number
from .shares import Shares

STEEP = "how many times as steep as its chord the sorted curve is at the elbow; published: 1"


class Elbow(Shares):
    """Sort a token's weights over all experts, and keep those before the elbow.

    The elbow is the point farthest below the chord from the first weight to the last,
    ``argmax_i chord_i - w_(i)``: there the curve becomes as flat as the chord. With ``alpha``, it
    is where the curve is alpha times as steep as the chord, which makes the mean number of experts
    adjustable: a larger alpha takes fewer experts.

    The abstract says that the elbow of the sorted probabilities separates high from low. Assumed
    here: the elbow is found by the distance to the chord, over all experts, and is not kept itself.
    ``alpha`` is this project's addition.

    References
    ----------
    Pan et al. 2026, "Elbow-based MoE routing", arXiv:2608.04401.
    """

    name, label, alpha = "elbow", "elbow", STEEP
    source = "Pan et al. 2026, arXiv:2608.04401"
    declared = SCORED | {
        "alpha": Parameter(1.0, STEEP, *number("a positive number", lambda value: value > 0))
    }

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return how many experts come before it, int64 ``[tokens]``."""
        assert level is not None
        weights = torch.softmax(ranked, dim=-1)
        last = weights.shape[-1] - 1
        slope = (weights[:, :1] - weights[:, -1:]) / max(last, 1) * level.to(weights.dtype)
        at = torch.arange(last + 1, device=weights.device, dtype=weights.dtype)
        return (weights + slope * at).argmin(-1)
