"""What methods share that look at an expert's share of its token's weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Method


class Shares(Method):
    """A method that compares shares: weights over the sum of the token's weights."""

    @classmethod
    def scored_by(cls, settings: Mapping[str, Any]) -> str:
        """Return the statistic; the weight for logits that weights are no softmax of."""
        found = super().scored_by(settings)
        return "weight" if found == "logit" and not settings.get("softmax", True) else found

    def level(self, alpha: float) -> Tensor:
        """Return alpha, float64."""
        return torch.tensor(alpha, dtype=torch.float64)
