"""Alloc-MoE: a budget of experts divided among layers, then among the tokens of each."""

from __future__ import annotations

import torch
from torch import Tensor

from .allocation import allocated, quantile
from .declare import Parameter, number
from .lexi import MEAN
from .min_w import MinW


class AllocMoE(MinW):
    """Give each layer a budget K, spent on the largest weights over all its tokens.

    Alloc-L: the table ``isolated`` holds by how much the loss on calibration text grows if one
    layer alone has top-k; dynamic programming finds the K of all layers with the smallest sum for
    the total that ``alpha`` allows. Alloc-T: of a layer's T tokens, the K T largest weights stay.

    The paper takes the K T largest weights of the current tokens. Here a token's experts do not
    depend on its neighbours: the threshold is the quantile from the table ``slot_weights`` that as
    many weights exceed on calibration text. Between two whole totals a layer's K is interpolated,
    so that any mean can be met. Candidates are 1 to the native k; all layers of the model share the
    sum, including those that ``layers`` leaves unrouted.

    References
    ----------
    Liu et al. 2026, "Alloc-MoE: budget-aware expert activation allocation for efficient
    mixture-of-experts inference", arXiv:2604.08133.
    """

    name, label, alpha = "alloc_moe", "Alloc-MoE", MEAN
    source = "Liu et al. 2026, arXiv:2604.08133"
    measured = ("isolated", "slot_weights")
    declared = {  # noqa: RUF012
        "alpha": Parameter(4.0, MEAN, *number("a positive number", lambda value: value > 0))
    }

    def level(self, alpha: float) -> Tensor:
        """Return the log of the smallest weight kept, float64 ``[1]``."""
        costs, layer = torch.from_numpy(self.tables["isolated"]), self.settings["layer"]
        step, above = 1 / len(costs), alpha * len(costs) % 1
        low, high = (
            allocated(costs, mean, self.min_k, self.max_k)[layer] for mean in (alpha, alpha + step)
        )
        share = (low + above * (high - low)) / costs.shape[1]
        return quantile(torch.from_numpy(self.tables["slot_weights"][layer]), 1 - share)[None]
