"""What methods share that divide a budget of experts among layers, or look quantiles up."""

from __future__ import annotations

import torch
from torch import Tensor


def allocated(costs: Tensor, mean: float, least: int, most: int) -> list[int]:
    """Return how many experts each layer gets, so that the sum of their costs is least.

    By dynamic programming, over layers and the experts given so far: exact.

    Parameters
    ----------
    costs : Tensor
        float64 ``[layers, k]``: what 1, 2, ... k experts a token cost in each layer.
    mean : float
        Experts a layer; the sum over layers is rounded down.
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
    """Return the value below which a share lies, float64, from values at even shares 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(grid) - 1)
    low = min(int(place), len(grid) - 2)
    return grid[low] + (place - low) * (grid[low + 1] - grid[low])
