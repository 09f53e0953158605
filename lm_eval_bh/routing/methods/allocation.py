"""Helpers of methods that divide a budget among layers or look up quantiles."""

from __future__ import annotations

import torch
from torch import Tensor


def allocated(costs: Tensor, mean: float, least: int, most: int) -> list[int]:
    """Return the number of experts per layer that minimises the sum of costs.

    Exact, by dynamic programming over layers and experts spent.

    Parameters
    ----------
    costs : Tensor
        float64 ``[layers, k]``: the cost of 1, 2, ... k experts per token in each layer.
    mean : float
        Mean experts per layer; the sum over layers is rounded down.
    least, most : int
        Bounds for every layer.
    """
    layers, most = len(costs), min(most, costs.shape[1])
    total = min(max(int(mean * layers + 1e-9), layers * least), layers * most)
    best = torch.full((total + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    taken = []
    for own in costs.double():
        options = torch.full((most + 1, total + 1), torch.inf, dtype=torch.float64)
        for k in range(least, min(most, total) + 1):
            options[k, k:] = best[: total + 1 - k] + own[k - 1]
        best, choice = options.min(dim=0)
        taken.append(choice)
    found = []
    for choice in reversed(taken):
        found.append(int(choice[total]))
        total -= found[-1]
    return found[::-1]


def quantile(grid: Tensor, share: float) -> Tensor:
    """Return a quantile, float64, from the quantiles at evenly spaced shares from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(grid) - 1)
    low = min(int(place), len(grid) - 2)
    return grid[low] + (place - low) * (grid[low + 1] - grid[low])
