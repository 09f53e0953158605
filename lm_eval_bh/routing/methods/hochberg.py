"""Hochberg: controls the family-wise error rate, stepping up through Holm's critical values."""

from __future__ import annotations

import torch
from torch import Tensor

from .declare import level
from .step_up import FWER, StepUp


class Hochberg(StepUp):
    """Step up through ``p_(k) <= alpha / (n - k + 1)``.

    References
    ----------
    Hochberg 1988, "A sharper Bonferroni procedure for multiple tests of significance", Biometrika
    75:800.
    """

    name, label, alpha = "hochberg", "Hochberg", FWER
    source = "Hochberg 1988, Biometrika 75:800"
    declared = StepUp.declared | {"alpha": level(FWER)}

    def critical_values(self, alpha: float, n: int) -> Tensor:
        """Return ``alpha / (n - k + 1)``, float64 ``[1, n]``."""
        return alpha / torch.arange(n, 0, -1, dtype=torch.float64)[None]
