"""Uncorrected tests: each expert by its own p-value, regardless of the token's others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .declare import level
from .router import RouterOutput
from .step_up import StepUp

LEVEL = "level of each expert's own test"


class PValue(StepUp):
    """Keep the experts with ``p <= alpha`` among the router's first ``max_k``."""

    name, label, alpha = "p_value", "p", LEVEL
    source = "uncorrected: p <= alpha"
    declared = StepUp.declared | {"alpha": level(LEVEL)}

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.first_only = not self.by_p_value

    def critical_values(self, alpha: float, n: int) -> Tensor:
        """Return ``alpha``, float64 ``[1, 1]``."""
        return torch.full((1, 1), alpha, dtype=torch.float64)

    def score(self, router: RouterOutput) -> Tensor:
        """Return the scores; -inf for experts that the router does not rank first."""
        scores = super().score(router)
        if self.first_only:
            return scores
        first = torch.zeros_like(scores, dtype=torch.bool)
        first.scatter_(-1, router.indices[:, : self.max_k], True)
        return scores.masked_fill(~first, -torch.inf)

    def asks(self, native_k: int) -> int:
        """Return ``max_k``: further experts are not considered."""
        k2 = self.settings.get("k2") or 0
        return max(self.max_k, native_k, k2) if self.needs_native else self.max_k

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return how many experts reach the threshold, int64 ``[tokens]``."""
        assert level is not None
        return (ranked >= level[0]).sum(-1)
