"""Two-stage Benjamini-Hochberg: the first stage estimates the number of true null hypotheses."""

from __future__ import annotations

import torch
from torch import Tensor

from .step_up import FDR, StepUp, last_rank


class TwoStageBH(StepUp):
    """Step up, then step up again at the level given by the first number of rejections.

    References
    ----------
    Benjamini and Hochberg 2000, "On the adaptive control of the false discovery rate", J. Educ.
    Behav. Stat. 25:60; as in statsmodels.
    """

    name, label, alpha = "fdr_tsbh", "fdr_tsbh", FDR
    source = "Benjamini and Hochberg 2000, J. Educ. Behav. Stat. 25:60; as in statsmodels"

    def critical_values(self, alpha: float, n: int) -> Tensor:
        """Return BH's values at the second stage's level, float64 ``[n + 1, n]``, by rejections."""
        rejected = torch.arange(n + 1, dtype=torch.float64)
        null = torch.where((rejected == 0) | (rejected == n), n, n - rejected)
        level = torch.where(null == n, alpha, alpha * n / null)
        return torch.arange(1, n + 1, dtype=torch.float64) / n * level[:, None]

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return the last rank that reaches its threshold in the row of the first stage."""
        assert level is not None
        return last_rank(ranked >= level[last_rank(ranked >= level[0])])
