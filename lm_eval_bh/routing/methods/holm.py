"""Holm: controls the family-wise error rate, stepping down."""

from __future__ import annotations

import torch
from torch import Tensor

from .declare import level
from .step_up import FWER, StepDown


class Holm(StepDown):
    """Step down through ``p_(k) <= alpha / (n - k + 1)``.

    References
    ----------
    Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Stat. 6:65.
    """

    name, label, alpha = "holm", "Holm", FWER
    source = "Holm 1979, Scand. J. Stat. 6:65"
    declared = StepDown.declared | {"alpha": level(FWER)}

    def critical_values(self, alpha: float, n: int) -> Tensor:
        """Return ``alpha / (n - k + 1)``, float64 ``[1, n]``."""
        return alpha / torch.arange(n, 0, -1, dtype=torch.float64)[None]
