"""The base of methods that compare shares of a token's weight."""

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
        """Return the statistic; the weight if weights are not a softmax of the logits."""
        found = super().scored_by(settings)
        return "weight" if found == "logit" and not settings.get("softmax", True) else found

    def level(self, alpha: float) -> Tensor:
        """Return alpha, float64."""
        return torch.tensor(alpha, dtype=torch.float64)
