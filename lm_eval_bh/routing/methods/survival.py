"""P-values from a piecewise linear CDF."""

from __future__ import annotations

import torch
from torch import Tensor


def survival(x: Tensor, cdf: Tensor, z: Tensor) -> Tensor:
    """Return 1 - F(z) for the piecewise linear F through (x, cdf), constant beyond its ends.

    Non-increasing in z in floating point too: every operation is monotone under rounding, and
    within a segment the value stays between the values at its ends.

    Parameters
    ----------
    x, cdf : Tensor, float64 ``[..., points]``
        Strictly ascending and non-decreasing along the last dimension.
    z : Tensor, float64 ``[..., n]``
        Leading dimensions as in ``x``: one distribution for each. NaN gives NaN.
    """
    left = torch.searchsorted(x, z.contiguous(), right=True).sub_(1).clamp_(0, x.shape[-1] - 2)
    low, high = cdf.gather(-1, left), cdf.gather(-1, left + 1)
    start, end = x.gather(-1, left), x.gather(-1, left + 1)
    share = (z.clamp(x[..., :1], x[..., -1:]) - start) / (end - start)
    value = (low + share * (high - low)).clamp(low, high)
    return 1 - torch.where(z >= x[..., -1:], cdf[..., -1:], value)
