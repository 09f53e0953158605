"""LExI: a fixed number of experts for each layer, found without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .allocation import allocated
from .base import Method
from .declare import Parameter, number

MEAN = "mean number of experts over the layers, which share the sum"


class Lexi(Method):
    """Give each layer a k, chosen so that the layers' outputs change least in sum.

    The table ``perturbations`` holds, per layer and k, the Frobenius norm of the change of the
    layer's output against the native top-k, on random normal hidden states. The k of all layers
    minimise its sum for the total that ``alpha`` allows.

    The paper searches the allocation with an evolutionary algorithm; here dynamic programming finds
    the exact minimum. Candidates are 1 to the native k. All layers of the model share the sum,
    including those that ``layers`` leaves unrouted.

    References
    ----------
    Chitty-Venkata et al. 2025, "LExI: layer-adaptive active experts for efficient MoE model
    inference", arXiv:2509.02753.
    """

    name, label, alpha = "lexi", "LExI", MEAN
    source = "Chitty-Venkata et al. 2025, arXiv:2509.02753"
    measured = ("perturbations",)
    declared = {  # noqa: RUF012
        "alpha": Parameter(4.0, MEAN, *number("a positive number", lambda value: value > 0))
    }

    @classmethod
    def scored_by(cls, settings: Mapping[str, Any]) -> str:
        """Return the router's own weight, which keeps the router's order."""
        return "weight"

    def level(self, alpha: float) -> Tensor:
        """Return this layer's k, float64 ``[1]``."""
        costs = torch.from_numpy(self.tables["perturbations"])
        counts = allocated(costs, alpha, self.min_k, self.max_k)
        return torch.tensor([counts[self.settings["layer"]]], dtype=torch.float64)

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return the layer's k for every token, int64 ``[tokens]``."""
        assert level is not None
        return level.long().expand(len(ranked))
