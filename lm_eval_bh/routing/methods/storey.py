"""Storey: Benjamini-Hochberg at a level raised by an estimate of the share of true nulls."""

from __future__ import annotations

import torch
from torch import Tensor

from .step_up import FDR, StepUp, last_rank

LAMBDA = 0.5


def null_share(above: Tensor, n: int) -> Tensor:
    """Return the estimated share of true nulls where ``above`` of n p-values exceed lambda."""
    return (above + 1) / (n * (1 - LAMBDA))


class Storey(StepUp):
    """Step up at ``alpha / pi0``, with ``pi0 = (1 + #{p > 1/2}) / (n / 2)``: lambda is 1/2.

    The estimate is not capped at 1, which keeps the level for a finite number of tests.

    References
    ----------
    Storey, Taylor and Siegmund 2004, "Strong control, conservative point estimation and
    simultaneous conservative consistency of false discovery rates", J. R. Stat. Soc. B 66:187,
    equation (4) and theorem 3.
    """

    name, label, alpha = "storey", "storey", FDR
    source = "Storey, Taylor and Siegmund 2004, J. R. Stat. Soc. B 66:187"

    def critical_values(self, alpha: float, n: int) -> Tensor:
        """Return lambda, then BH's values for 0 to n p-values above it: float64 ``[n + 2, n]``."""
        share = null_share(torch.arange(n + 1, dtype=torch.float64), n)
        levels = torch.arange(1, n + 1, dtype=torch.float64) / n * (alpha / share)[:, None]
        first = torch.full((1, n), LAMBDA, dtype=torch.float64)
        return torch.cat([first, levels.clamp(max=LAMBDA)])

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return the last rank that reaches its threshold in the row of the p-values above."""
        assert level is not None
        above = (ranked < level[0]).sum(-1)
        return last_rank(ranked >= level[1 + above])
