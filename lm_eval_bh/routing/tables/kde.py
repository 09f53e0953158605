"""Fits the CDF of a kernel density estimate on a grid, without samples x grid evaluations.

The CDF of a kernel density estimate is the mean of kernel CDFs, ``F(x) = mean_i K((x - x_i) / h)``.
With samples binned on a regular grid this is one discrete convolution, which the fast Fourier
transform computes in M log M steps for M grid points, however many samples there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from lm_eval_bh.errors import NullModelError, ParameterError, did_you_mean

Array = NDArray[np.float64]

POINTS = 8192
BINS_PER_BANDWIDTH = 128
MAX_BINS = 2**20


def _epanechnikov(u: Array) -> Array:
    u = u.clip(-1, 1)
    return 0.5 + 0.75 * (u - u**3 / 3)


def _tophat(u: Array) -> Array:
    return (u.clip(-1, 1) + 1) / 2


def _linear(u: Array) -> Array:
    u = u.clip(-1, 1)
    return np.where(u < 0, (1 + u) ** 2 / 2, 1 - (1 - u) ** 2 / 2)


# CDF of each kernel at bandwidth 1, and the bandwidths beyond which it is 0 or 1 in float64
KERNELS: dict[str, tuple[Callable[[Array], Array], float]] = {
    "gaussian": (ndtr, 8.5),
    "epanechnikov": (_epanechnikov, 1.0),
    "tophat": (_tophat, 1.0),
    "linear": (_linear, 1.0),
}


def check_kernel(kernel: str) -> None:
    """Raise a :class:`ParameterError` unless ``kernel`` is one of :data:`KERNELS`."""
    if kernel not in KERNELS:
        raise ParameterError(
            f"kernel={kernel!r} is unknown{did_you_mean(str(kernel), KERNELS)}; "
            f"use one of {', '.join(KERNELS)}."
        )


def bandwidth_of(samples: Array, bandwidth: str | float = "scott") -> float:
    """Return the bandwidth h in the unit of the samples.

    Parameters
    ----------
    samples : ndarray, float64 [n]
        The samples, at least two of them different.
    bandwidth : "scott" or float
        Scott's rule, ``n ** (-1 / 5)`` times the standard deviation (``ddof=1``) as in
        ``scipy.stats.gaussian_kde``, for every kernel; or h itself, as in scikit-learn's
        ``KernelDensity`` (*not* the factor that scipy's ``bw_method`` takes).

    Raises
    ------
    ParameterError
        If ``bandwidth`` is neither "scott" nor a positive number.
    NullModelError
        If the samples are fewer than two, not finite, or all equal.

    References
    ----------
    Scott, D. W. (1992). Multivariate Density Estimation. Wiley.
    """
    if isinstance(bandwidth, str) and bandwidth != "scott":
        raise ParameterError(
            f"bandwidth={bandwidth!r} is unknown; use 'scott' or a number in logit units."
        )
    if not isinstance(bandwidth, str) and not (bandwidth > 0 and math.isfinite(bandwidth)):
        raise ParameterError(
            f"bandwidth={bandwidth!r} is out of range; use 'scott' or a positive number."
        )
    if samples.size < 2:
        raise NullModelError(
            f"no distribution can be fitted to {samples.size} samples; use more text."
        )
    if bad := samples.size - int(np.isfinite(samples).sum()):
        raise NullModelError(
            f"{bad} of {samples.size} samples are NaN or infinite; look for the fault in the model."
        )
    if samples.min() == samples.max():
        raise NullModelError(
            f"all {samples.size} samples equal {samples[0]:g}, so they have no distribution; "
            "use more text or less trim."
        )
    if not isinstance(bandwidth, str):
        return float(bandwidth)
    with np.errstate(over="ignore", invalid="ignore"):
        h = float(samples.size ** (-1 / 5) * samples.std(ddof=1))
    if not (h > 0 and math.isfinite(h)):
        raise NullModelError(
            f"samples between {samples.min():g} and {samples.max():g} have no standard deviation "
            "in float64; look for the fault in the model."
        )
    return h


def linear_binning(samples: Array, start: float, step: float, bins: int) -> Array:
    """Split every sample between its two neighbouring grid points, by proximity.

    Returns the weights of the points ``start + step * arange(bins)``, float64 [bins], sum 1.

    References
    ----------
    Wand, M. P. (1994). Fast computation of multivariate kernel estimators. Journal of
    Computational and Graphical Statistics 3, 433-445.
    """
    position = (samples - start) / step
    left = np.clip(position.astype(np.int64), 0, bins - 2)
    right_share = position - left
    weights = np.bincount(left, 1 - right_share, bins) + np.bincount(left + 1, right_share, bins)
    return np.asarray(weights / samples.size, dtype=np.float64)


def fit_cdf(
    samples: NDArray[Any],
    kernel: str = "gaussian",
    bandwidth: str | float = "scott",
    points: int = POINTS,
) -> tuple[Array, Array]:
    """Fit the CDF of a kernel density estimate.

    The grid covers all samples and every kernel's reach. Between grid points the CDF is to be
    interpolated linearly, with an error of at most ``step**2 / 8`` times the steepest slope of the
    density: about ``0.03 * (step / s)**2`` for bell-shaped samples of standard deviation s, that is
    1e-7 where the default 8,192 points span 15 s. Outliers widen the grid: at 150 s the error is
    1e-5, and ten times the points bring it back. The samples are binned more finely than the grid,
    to a small part of the bandwidth, so binning adds almost no error.

    Parameters
    ----------
    samples : ndarray [any shape], any float dtype
        Pooled router logits; computed in float64.
    kernel : {"gaussian", "epanechnikov", "tophat", "linear"}
        Kernel as in scikit-learn's ``KernelDensity``: the last three vanish beyond one bandwidth.
    bandwidth : "scott" or float
        See :func:`bandwidth_of`.
    points : int
        Number of grid points.

    Returns
    -------
    x : ndarray, float64 [points]
        The grid, strictly ascending, in the unit of the samples.
    cdf : ndarray, float64 [points]
        Non-decreasing, from exactly 0 to exactly 1.

    Raises
    ------
    ParameterError
        If ``kernel``, ``bandwidth`` or ``points`` is out of range.
    NullModelError
        If the samples have no distribution, or ``points`` are too few to resolve the bandwidth.
    """
    check_kernel(kernel)
    if isinstance(points, bool) or not isinstance(points, int) or not 4 <= points <= MAX_BINS:
        raise ParameterError(
            f"points={points!r:.60} is out of range; use a whole number from 4 to {MAX_BINS}."
        )
    samples = np.asarray(samples, dtype=np.float64).ravel()
    h = bandwidth_of(samples, bandwidth)
    kernel_cdf, reach = KERNELS[kernel]
    low, high = float(samples.min()) - reach * h, float(samples.max()) + reach * h
    # one more step at both ends, so that binning moves no weight beyond the last point
    step = (high - low) / (points - 3)
    if not step <= h:
        needed = (high - low) / h + 4
        advice = f"points={needed:.0f} or more" if needed <= MAX_BINS else "a larger one"
        raise NullModelError(
            f"{points} grid points from {low:g} to {high:g} are too few for the bandwidth {h:g}; "
            f"use {advice}, or look for outliers."
        )
    x = np.linspace(low - step, high + step, points)
    if not (x[1:] > x[:-1]).all():
        raise NullModelError(
            f"samples between {samples.min():g} and {samples.max():g} lie too close together for "
            "float64; look for the fault in the model."
        )
    refine = max(1, min(math.ceil(BINS_PER_BANDWIDTH * step / h), MAX_BINS // points))
    bins, fine = (points - 1) * refine + 1, step / refine
    weights = linear_binning(samples, float(x[0]), fine, bins)
    lags = kernel_cdf(np.arange(1 - bins, bins, dtype=np.float64) * (fine / h))
    from scipy.signal import fftconvolve  # half a second to import, which no evaluation needs

    cdf = np.asarray(fftconvolve(lags, weights, mode="valid")[::refine], dtype=np.float64)
    cdf = cdf.clip(0, 1)
    cdf[0] = 0.0  # exact; the transform leaves rounding errors of 1e-16
    cdf = np.maximum.accumulate(cdf)
    cdf[-1] = 1.0
    return x, cdf
