"""Bonferroni: bounds the family-wise error rate by one critical value."""

from __future__ import annotations

import torch
from torch import Tensor

from .declare import level
from .step_up import FWER, StepUp


class Bonferroni(StepUp):
    """Reject ``p <= alpha / n``.

    References
    ----------
    Dunn 1961, "Multiple comparisons among means", J. Am. Stat. Assoc. 56:52.
    """

    name, label, alpha = "bonferroni", "Bonferroni", FWER
    source = "Dunn 1961, J. Am. Stat. Assoc. 56:52"
    declared = StepUp.declared | {"alpha": level(FWER)}

    def critical_values(self, alpha: float, n: int) -> Tensor:
        """Return ``alpha / n`` for every rank, float64 ``[1, n]``."""
        return torch.full((1, n), alpha / n, dtype=torch.float64)
