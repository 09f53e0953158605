"""Exact counters of what routing selected, kept on the device: no sync, no Python per token."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_eval_bh.routing.selection import Selection


class RoutingCounters:
    """Histogram of experts per token and usage of each expert, layer by layer.

    Attributes
    ----------
    histogram : list of Tensor
        One int64 ``[experts + 1]`` a layer: how many tokens got 0, 1, ... experts.
    usage : list of Tensor
        One int64 ``[experts]`` a layer: how many tokens each expert served.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_experts = num_experts
        self.histogram = [
            torch.zeros(num_experts + 1, dtype=torch.int64) for _ in range(num_layers)
        ]
        self.usage = [torch.zeros(num_experts, dtype=torch.int64) for _ in range(num_layers)]

    def add(self, layer: int, selection: Selection, weight: Tensor | None = None) -> None:
        """Count one layer's selection of a batch.

        Parameters
        ----------
        layer : int
            Position among the layers.
        selection : Selection
            What was selected for ``[tokens]``.
        weight : Tensor or None
            int64 ``[tokens]``, how often each token counts (0 for padding); None counts all once.
        """
        counts, indices = selection.counts, selection.indices
        if self.histogram[layer].device != counts.device:
            self.histogram[layer] = self.histogram[layer].to(counts.device)
            self.usage[layer] = self.usage[layer].to(counts.device)
        weight = torch.ones_like(counts) if weight is None else weight.to(counts.device)
        self.histogram[layer].scatter_add_(0, counts, weight)
        usage = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=counts.device)
        usage.scatter_add_(0, indices.flatten(), weight.unsqueeze(-1).expand_as(indices).flatten())
        self.usage[layer] += usage[:-1]

    def tokens(self, layer: int) -> int:
        """Return how many tokens the layer has seen."""
        return int(self.histogram[layer].sum())

    def mean(self, layer: int | None = None) -> float | None:
        """Return the mean number of experts per token, of a layer or all; None before any token."""
        return self.moments(layer)[0]

    def moments(self, layer: int | None = None) -> tuple[float | None, float | None]:
        """Return mean and population standard deviation of the experts per token.

        Both are None before any token.
        """
        chosen = self.histogram if layer is None else [self.histogram[layer]]
        histogram = torch.stack([h.cpu() for h in chosen]).sum(0).double()
        total = histogram.sum()
        if total == 0:
            return None, None
        counts = torch.arange(self.num_experts + 1, dtype=torch.float64)
        mean = (histogram * counts).sum() / total
        variance = (histogram * (counts - mean) ** 2).sum() / total
        return float(mean), float(variance.sqrt())
