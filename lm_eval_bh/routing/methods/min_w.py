"""One threshold on an expert's contribution: best for models with absolute weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import SCORED, Method, Shown
from .declare import Parameter, number


class MinW(Method):
    """Keep the experts whose weight, times the statistic's factor, is at least ``alpha``.

    Only the ``max_k`` experts that the router ranks first are considered. The threshold is
    absolute, so tokens and layers share one scale; min-p's is relative to the token's largest
    weight. This project's own: ``statistic=benefit, mass=0.2`` lost least of all on tiny-olmoe.
    """

    name, label = "min_w", "min-w"
    source = "absolute threshold, not relative to the token's largest weight as min-p's is"
    alpha = "what the softmax weight, times the statistic's factor, has to reach"
    first_only = True
    declared: ClassVar[dict[str, Parameter]] = SCORED | {
        "alpha": Parameter(0.05, alpha, *number("a positive number", lambda value: value > 0))
    }

    @classmethod
    def scored_by(cls, settings: Mapping[str, Any]) -> str:
        """Return the statistic, with the weight in place of the logit."""
        found = super().scored_by(settings)
        return "weight" if found == "logit" else found

    def level(self, alpha: float) -> Tensor:
        """Return the log of alpha, float64 ``[1]``: scores are logarithms."""
        return torch.tensor([math.log(alpha)], dtype=torch.float64)

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return how many experts reach the threshold, int64 ``[tokens]``."""
        assert level is not None
        return (ranked >= level).sum(-1)

    def shown(self, ranked: Tensor, alpha: float) -> Shown:
        """Return weights times their factors, and the threshold."""
        return "score", ranked.exp(), "threshold", ranked.new_full((1, ranked.shape[-1]), alpha)
