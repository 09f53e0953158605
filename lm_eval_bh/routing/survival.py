"""P-values from a piecewise linear CDF, and the exact thresholds that stand for comparing them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_bh.errors import ParameterError

Array = NDArray[np.float64]


def survival(x: torch.Tensor, cdf: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return 1 - F(z) for the piecewise linear F through (x, cdf), constant beyond its ends.

    Non-increasing in z not only on paper but in floating point: every operation on the way is
    monotone under rounding, and within a segment the value cannot leave the values at its ends.

    Parameters
    ----------
    x, cdf : Tensor, float64 [..., points]
        Strictly ascending and non-decreasing along the last dimension.
    z : Tensor, float64 [..., n]
        The leading dimensions are those of ``x``: one distribution for each. NaN gives NaN.
    """
    left = torch.searchsorted(x, z.contiguous(), right=True).sub_(1).clamp_(0, x.shape[-1] - 2)
    low, high = cdf.gather(-1, left), cdf.gather(-1, left + 1)
    start, end = x.gather(-1, left), x.gather(-1, left + 1)
    share = (z.clamp(x[..., :1], x[..., -1:]) - start) / (end - start)
    value = (low + share * (high - low)).clamp(low, high)
    return 1 - torch.where(z >= x[..., -1:], cdf[..., -1:], value)


def thresholds(x: Array, cdf: Array, critical_values: Array) -> Array:
    """Return the smallest z with ``survival(z) <= c`` for every critical value c.

    For every finite float64 z, ``z >= threshold`` and ``survival(z) <= c`` are the same decision:
    the segment is found among the survival values at the knots, the number in it by bisection over
    the float64 numbers themselves, with :func:`survival` as the judge.

    Parameters
    ----------
    x, cdf : ndarray, float64 [points]
        Strictly ascending and non-decreasing.
    critical_values : ndarray, float64 [n]
        In any order.

    Returns
    -------
    ndarray, float64 [n]
        -inf where every z qualifies, +inf where none does.

    Raises
    ------
    ParameterError
        If the critical values are not one-dimensional, or one is NaN.
    """
    if critical_values.ndim != 1 or np.isnan(critical_values).any():
        raise ParameterError(
            f"critical_values={critical_values} are unfit; give one dimension and no NaN."
        )
    grid, values = torch.tensor(x), torch.tensor(cdf)
    at_knots = survival(grid, values, grid).numpy()
    first = np.searchsorted(-at_knots, -critical_values, side="left")  # first knot that qualifies
    result = np.where(first == 0, -np.inf, np.inf)
    inside = (first > 0) & (first < len(x))
    level, order = critical_values[inside], _ordered(x)
    low, high = order[first[inside] - 1], order[first[inside]]
    while (high - 1 > low).any():  # low never qualifies, high always does
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # low + high may overflow
        p = survival(grid, values, torch.from_numpy(_from_ordered(middle))).numpy()
        low, high = np.where(p <= level, low, middle), np.where(p <= level, middle, high)
    result[inside] = _from_ordered(high)
    return result


def _ordered(values: Array) -> NDArray[np.int64]:
    """Map float64 to int64 so that order is kept and neighbours differ by one."""
    bits = values.view(np.int64)
    return np.where(bits >= 0, bits, np.iinfo(np.int64).min - bits)


def _from_ordered(order: NDArray[np.int64]) -> Array:
    """Undo :func:`_ordered`."""
    return np.where(order >= 0, order, np.iinfo(np.int64).min - order).view(np.float64)
