"""Checks that a table is a CDF fit for p-values, and what it would select if not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RISE = 0.5  # a fitted CDF rises from 0 to 1, up to its kernel's tails
NARROW = 1e-9  # relative to the grid's largest number: less than a logit's rounding
FEW_TOKENS = 8


def fault(x: NDArray[Any], cdf: NDArray[Any]) -> str | None:
    """Return in half a sentence why (x, cdf) is not a CDF on a grid, or None if it is."""
    if x.ndim not in (1, 2) or x.shape != cdf.shape or x.shape[-1] < 2 or not x.size:
        return f"x and cdf have shapes {x.shape} and {cdf.shape}, not both [2 or more points]"
    if x.dtype != np.float64 or cdf.dtype != np.float64:
        return f"x and cdf are {x.dtype} and {cdf.dtype}, not float64"
    if not (np.isfinite(x).all() and np.isfinite(cdf).all()):
        return "x or cdf is not finite"
    if (x[..., -1] / 2 - x[..., 0] / 2 >= np.finfo(np.float64).max / 2).any():
        return "x is too wide for float64"
    if not (x[..., 1:] > x[..., :-1]).all():
        return "x is not strictly ascending"
    if not ((cdf[..., 1:] >= cdf[..., :-1]).all() and cdf.min() >= 0 and cdf.max() <= 1):
        return "cdf does not rise within [0, 1]"
    return None


def flat(tables: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> str | None:
    """Return in half a sentence which layer has a CDF that never rises, or None."""
    for layer, (_, cdf) in enumerate(tables):
        never = np.atleast_1d(cdf[..., -1] == cdf[..., 0])
        if never.any():
            p = 1 - float(np.atleast_1d(cdf[..., 0])[never][0])
            effect = "all experts" if p < RISE else "none"
            return (
                f"the CDF of layer {layer} never rises: every p-value would be {p:g}, and tests "
                f"would select {effect}"
            )
    return None


def doubt(tables: Sequence[tuple[NDArray[Any], NDArray[Any]]], tokens: int | None) -> str | None:
    """Return in half a sentence why valid tables are doubtful, or None.

    Parameters
    ----------
    tables : sequence of (x, cdf)
        Tables without a :func:`fault`.
    tokens : int or None
        Number of tokens of the fit, if known.
    """
    if tokens is not None and tokens < FEW_TOKENS:
        return f"was fitted to {tokens} {'token' if tokens == 1 else 'tokens'}, which is too few"
    for layer, (x, cdf) in enumerate(tables):
        low, high = (np.atleast_1d(cdf[..., end]) for end in (0, -1))
        if (high - low < RISE).any():
            worst = int(np.argmin(high - low))
            largest, smallest = 1 - float(low[worst]), 1 - float(high[worst])
            effect = "nearly all experts" if largest < RISE else "hardly any expert"
            return (
                f"has in layer {layer} only p-values from {smallest:.3g} to {largest:.3g}, so "
                f"tests would select {effect}"
            )
        width = np.atleast_1d(x[..., -1] - x[..., 0])
        if (width <= NARROW * np.abs(x).max()).any():
            return (
                f"has a distribution in layer {layer} that is {float(width.min()):.3g} wide, so "
                "tests would select all experts above one point"
            )
    return None
