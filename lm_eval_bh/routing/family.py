"""Benjamini-Hochberg over one family of all decisions on a text: a fixed cut-off."""

from __future__ import annotations

import torch
from torch import Tensor


def family_cutoff(p_values: Tensor, alpha: float) -> float:
    """Return the largest p-value that Benjamini-Hochberg rejects in one family, 0 if none.

    Parameters
    ----------
    p_values : Tensor
        float64 ``[decisions]``, ascending.
    alpha : float
        The level.
    """
    m = len(p_values)
    critical = torch.arange(1, m + 1, dtype=torch.float64) / float(m) * alpha
    rejected = (p_values <= critical).nonzero()
    return float(p_values[rejected[-1, 0]]) if len(rejected) else 0.0


def family_level(p_values: Tensor, cutoff: float) -> float:
    """Return the smallest level at which Benjamini-Hochberg rejects p-values up to a cut-off.

    1 if no smaller level does.
    """
    rejected = int(torch.searchsorted(p_values, cutoff, right=True))
    if rejected == 0:
        return 1.0
    last = float(p_values[rejected - 1])
    return min(last * len(p_values) / rejected, 1.0)
