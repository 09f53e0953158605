"""Adaptive-K: more experts for tokens whose router weights have a high entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import SCORED, Shown
from .declare import Parameter, counts, number, or_none
from .shares import Shares

ENTROPY = "entropy in nats below which a token gets the fewest experts"


class AdaptiveK(Shares):
    """Take ``k_1`` experts below an entropy of ``alpha``, ``k_2`` below ``alpha + gap``, and so on.

    The entropy is that of the softmax over all experts. By default the values of k are ``min_k``,
    the midpoint rounded down, and ``max_k``, with thresholds of 1.3 and 1.7.

    In the pull request every threshold is free; a single ``gap`` between them is this project's
    choice, so that one parameter moves the mean number of experts.

    References
    ----------
    Balsamo 2026, "Entropy-guided dynamic expert selection in MoE models", the method
    AdaptiveKMoeRoutingMethod of TensorRT-LLM's pull request 10672.
    """

    name, label, alpha = "adaptive_k", "adaptive-k", ENTROPY
    source = "Balsamo 2026, TensorRT-LLM pull request 10672"
    declared = SCORED | {
        "alpha": Parameter(1.3, ENTROPY, *number("a positive number", lambda value: value > 0)),
        "gap": Parameter(
            0.4,
            "for `adaptive_k`, how much further apart in entropy each next threshold lies",
            *number("a number, at least 0", lambda value: value >= 0),
        ),
        "k_values": Parameter(
            None,
            "for `adaptive_k`, numbers of experts from low to high entropy: `4-6-8`; default: "
            "`min_k`, the middle, `max_k`",
            *or_none((counts, "numbers of experts joined by '-', such as 4-6-8")),
        ),
    }

    values: Tensor

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        given = settings["k_values"]
        middle = (self.min_k + self.max_k) // 2
        own = [int(k) for k in given.split("-")] if given else [self.min_k, middle, self.max_k]
        self.register_buffer("values", torch.tensor(sorted(own)))

    def level(self, alpha: float) -> Tensor:
        """Return the thresholds, float64 ``[values - 1]``."""
        steps = torch.arange(len(self.values) - 1, dtype=torch.float64)
        gap: float = self.settings["gap"]
        return alpha + gap * steps

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return the k for each token's entropy, int64 ``[tokens]``."""
        assert level is not None
        entropy = torch.special.entr(torch.softmax(ranked, dim=-1)).sum(-1)
        return self.values[(entropy.unsqueeze(-1) >= level).sum(-1)]

    def shown(self, ranked: Tensor, alpha: float) -> Shown:
        """Return each expert's part of the entropy; the threshold differs by token."""
        return "entropy", torch.special.entr(torch.softmax(ranked, dim=-1)), "threshold", None
