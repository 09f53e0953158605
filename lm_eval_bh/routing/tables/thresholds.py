"""Exact thresholds equivalent to comparing p-values with critical values."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.routing.methods.survival import survival

Array = NDArray[np.float64]

NEAR = 2**16  # float64 numbers by which rounding moves a quantile, unless F is nearly flat


def thresholds(x: Array, cdf: Array, critical_values: Array) -> Array:
    """Return the smallest z with ``survival(z) <= c`` for every critical value c.

    For every finite float64 z, ``z >= threshold`` and ``survival(z) <= c`` are the same decision:
    the segment is found among the survival values at the knots, and the number in it by bisection
    over the float64 numbers, evaluating :func:`survival`. The bisection starts around the quantile,
    so that most thresholds are found in 17 steps instead of 64.

    Parameters
    ----------
    x, cdf : ndarray, float64 [points]
        Strictly ascending and non-decreasing.
    critical_values : ndarray, float64 [n]
        In any order; many at once cost little more than one.

    Returns
    -------
    ndarray, float64 [n]
        -inf if every z qualifies, +inf if none does.

    Raises
    ------
    ParameterError
        If the critical values are not one-dimensional, or one is NaN.
    """
    if critical_values.ndim != 1 or np.isnan(critical_values).any():
        raise ParameterError(
            f"critical_values={critical_values} are invalid; give one dimension and no NaN."
        )
    levels, every = np.unique(critical_values, return_inverse=True)
    grid, values = torch.tensor(x), torch.tensor(cdf)
    at_knots = survival(grid, values, grid).numpy()
    first = np.searchsorted(-at_knots, -levels, side="left")  # first knot that qualifies
    result = np.where(first == 0, -np.inf, np.inf)
    inside = (first > 0) & (first < len(x))
    segment = np.stack([first[inside] - 1, first[inside]], axis=-1)
    result[inside] = _bisect(x[segment], cdf[segment], at_knots[segment], levels[inside])
    return result[every]


def _bisect(x: Array, cdf: Array, at_knots: Array, levels: Array) -> Array:
    """Return the thresholds of levels, each in (first knot, second knot].

    ``x``, ``cdf`` and ``at_knots``, the survival values at x, are float64 [n, 2]. Between two knots
    the value depends only on these two.
    """
    share = (at_knots[:, 0] - levels) / (at_knots[:, 0] - at_knots[:, 1])
    quantile = _ordered(x[:, 0] + share * (x[:, 1] - x[:, 0]))
    low, high = _ordered(x[:, 0]), _ordered(x[:, 1])
    segments, values = torch.from_numpy(x), torch.from_numpy(cdf)

    def narrow(at: NDArray[np.int64], some: NDArray[np.int64]) -> None:
        """Move one end of each bracket there: low never qualifies, high always does."""
        z = torch.from_numpy(_from_ordered(at)).unsqueeze(-1)
        passes = survival(segments[some], values[some], z).squeeze(-1).numpy() <= levels[some]
        low[some], high[some] = np.where(passes, low[some], at), np.where(passes, at, high[some])

    for step in (-NEAR, NEAR):
        narrow(np.clip(quantile + step, low, high), np.arange(len(levels)))
    while len(wide := np.flatnonzero(high - 1 > low)):
        a, b = low[wide], high[wide]
        narrow((a >> 1) + (b >> 1) + (a & b & 1), wide)  # a + b may overflow
    return _from_ordered(high)


def _ordered(values: Array) -> NDArray[np.int64]:
    """Map float64 to int64, preserving order, so that neighbours differ by one."""
    bits = values.view(np.int64)
    return np.where(bits >= 0, bits, np.iinfo(np.int64).min - bits)


def _from_ordered(order: NDArray[np.int64]) -> Array:
    """Undo :func:`_ordered`."""
    return np.where(order >= 0, order, np.iinfo(np.int64).min - order).view(np.float64)
