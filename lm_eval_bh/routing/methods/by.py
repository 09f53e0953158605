"""Benjamini-Yekutieli: Benjamini-Hochberg for p-values under any dependence."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .step_up import FDR, StepUp


class BY(StepUp):
    """Step up through ``p_(k) <= k alpha / (n (1 + 1/2 + ... + 1/n))``.

    References
    ----------
    Benjamini and Yekutieli 2001, "The control of the false discovery rate in multiple testing under
    dependency", Ann. Stat. 29:1165.
    """

    name, label, alpha = "by", "BY", FDR
    source = "Benjamini and Yekutieli 2001, Ann. Stat. 29:1165"

    def critical_values(self, alpha: float, n: int) -> Tensor:
        """Return BH's critical values over the n-th harmonic number, float64 ``[1, n]``."""
        harmonic = float(np.sum(1.0 / np.arange(1, n + 1)))  # rounded as in statsmodels
        return torch.arange(1, n + 1, dtype=torch.float64)[None] / n / harmonic * alpha
