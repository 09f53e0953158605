"""Benjamini-Hochberg: the experts whose logits the null distribution does not explain."""

from __future__ import annotations

import torch
from torch import Tensor

from .declare import Parameter, choice
from .step_up import FDR, StepUp


class BH(StepUp):
    """Step up through ``p_(k) <= k alpha / n``.

    The bound on the false discovery rate requires independent or positively dependent p-values,
    which has not been shown for the experts of one token: alpha is a *level*.

    References
    ----------
    Benjamini and Hochberg 1995, "Controlling the false discovery rate", J. R. Stat. Soc. B 57:289.
    """

    name, label, alpha = "bh", "BH", FDR
    source = "Benjamini and Hochberg 1995, J. R. Stat. Soc. B 57:289"
    declared = StepUp.declared | {
        "family": Parameter(
            "token",
            "which hypotheses are tested together: those of a `token`, or `all` decisions on "
            "calibration text, which gives one fixed threshold",
            *choice(["token", "all"]),
        )
    }

    def critical_values(self, alpha: float, n: int) -> Tensor:
        """Return ``k alpha / n``, float64 ``[1, n]``."""
        return torch.arange(1, n + 1, dtype=torch.float64)[None] / n * alpha
