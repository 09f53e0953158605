import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import gaussian_kde
from sklearn.neighbors import KernelDensity

from lm_eval_bh.errors import NullModelError, ParameterError
from lm_eval_bh.routing.tables.kde import KERNELS, bandwidth_of, fit_cdf

RNG = np.random.default_rng(0)
SMALL = np.concatenate([RNG.normal(-0.4, 0.8, 180), 1 + RNG.gamma(2, 0.6, 20)])


def exact_cdf(samples, kernel, h, at):
    """Return the mean of the kernel's CDF over all samples: the definition."""
    return KERNELS[kernel][0]((at[:, None] - samples[None, :]) / h).mean(1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bandwidth", ["scott", 0.25])
def test_matches_the_definition(kernel, bandwidth):
    x, cdf = fit_cdf(SMALL, kernel, bandwidth)
    at = np.linspace(x[0] - 1, x[-1] + 1, 3001)
    exact = exact_cdf(SMALL, kernel, bandwidth_of(SMALL, bandwidth), at)
    # the tophat's density jumps, by 1 / (2 n h) a sample, and so bends the CDF within a step
    tolerance = 2e-5 if kernel == "tophat" else 2e-6
    np.testing.assert_allclose(np.interp(at, x, cdf), exact, rtol=0, atol=tolerance)


def test_matches_scipy():
    kde = gaussian_kde(SMALL)
    assert bandwidth_of(SMALL) == pytest.approx(float(np.sqrt(kde.covariance[0, 0])), rel=1e-12)
    x, cdf = fit_cdf(SMALL)
    at = np.linspace(x[0], x[-1], 501)
    exact = [kde.integrate_box_1d(-np.inf, z) for z in at]
    np.testing.assert_allclose(np.interp(at, x, cdf), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_matches_scikit_learn(kernel):
    """Its KernelDensity gives a density, which is integrated with the trapezoidal rule."""
    density = KernelDensity(kernel=kernel, bandwidth=0.3).fit(SMALL[:, None])
    x, cdf = fit_cdf(SMALL, kernel, 0.3)
    at = np.linspace(x[0], x[-1], 40_001)
    values = np.exp(density.score_samples(at[:, None]))
    integral = np.concatenate([[0], np.cumsum((values[1:] + values[:-1]) / 2) * (at[1] - at[0])])
    np.testing.assert_allclose(np.interp(at, x, cdf), integral, rtol=0, atol=2e-4)


def test_is_accurate_at_full_size():
    """320,000 logits with a heavier right tail: within 2e-7 of the exact CDF (asked: 1e-6)."""
    rng = np.random.default_rng(1)
    called = rng.random(320_000) < 0.1
    right = 1 + rng.gamma(2, 0.6, called.size)
    samples = np.where(called, right, rng.normal(-0.4, 0.8, called.size))
    x, cdf = fit_cdf(samples)
    at = rng.uniform(x[0], x[-1], 60)
    exact = exact_cdf(samples, "gaussian", bandwidth_of(samples), at)
    np.testing.assert_allclose(np.interp(at, x, cdf), exact, rtol=0, atol=2e-7)


def test_is_accurate_with_heavy_tails():
    """Student's t with two degrees of freedom spans hundreds of interquartile ranges."""
    samples = np.random.default_rng(2).standard_t(2, 20_000)
    x, cdf = fit_cdf(samples, points=2**16)
    at = np.concatenate([np.linspace(-8, 8, 301), np.linspace(x[0], x[-1], 301)])
    exact = exact_cdf(samples, "gaussian", bandwidth_of(samples), at)
    np.testing.assert_allclose(np.interp(at, x, cdf), exact, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    samples=arrays(
        np.float64,
        st.integers(2, 50),
        elements=st.floats(-1e3, 1e3).map(lambda value: round(value, 3)),
    ).filter(lambda values: values.min() < values.max()),
    kernel=st.sampled_from(list(KERNELS)),
)
def test_is_a_cdf(samples, kernel):
    x, cdf = fit_cdf(samples, kernel, points=1024)
    h = bandwidth_of(samples)
    assert x.shape == cdf.shape == (1024,)
    assert x.dtype == cdf.dtype == np.float64
    assert (np.diff(x) > 0).all()
    assert (np.diff(cdf) >= 0).all()
    assert cdf[0] == 0
    assert cdf[-1] == 1
    assert x[0] <= samples.min() - h
    assert x[-1] >= samples.max() + h


def test_accepts_any_shape_and_dtype():
    values = SMALL.astype(np.float32)
    for other in (values.reshape(20, 10), values.astype(np.float64)):
        for one, two in zip(fit_cdf(values), fit_cdf(other), strict=True):
            np.testing.assert_array_equal(one, two)


def test_shifts_and_scales_with_the_samples():
    x, cdf = fit_cdf(SMALL)
    moved_x, moved_cdf = fit_cdf(SMALL * 8 + 3)
    np.testing.assert_allclose(moved_x, x * 8 + 3, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moved_cdf, cdf, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"kernel": "gausian"}, "did you mean 'gaussian'"),
        ({"bandwidth": "silverman"}, "'silverman' is unknown; use 'scott'"),
        ({"bandwidth": 0.0}, "positive number"),
        ({"bandwidth": float("nan")}, "positive number"),
        ({"points": 3}, "points=3"),
        ({"points": True}, "points=True"),
        ({"points": 10.0}, "points=10.0"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(ParameterError, match=message):
        fit_cdf(SMALL, **parameters)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "0 samples"),
        ([1.0], "1 samples"),
        ([0.1] * 640, "all 640 samples equal 0.1"),
        ([0.0, np.nan, np.inf, 1.0], "2 of 4 samples are NaN or infinite"),
        ([-1e308, 1e308], "no standard deviation"),
        ([1e16, 1e16 + 2, 1e16 + 4], "too close together"),
    ],
)
def test_samples_without_a_distribution(samples, message):
    with pytest.raises(NullModelError, match=message):
        fit_cdf(np.array(samples))


def test_too_coarse_a_grid_says_how_many_points_it_takes():
    with pytest.raises(NullModelError, match=r"use points=\d+ or more") as caught:
        fit_cdf(SMALL, bandwidth=1e-3)
    needed = int(str(caught.value).split("points=")[1].split()[0])
    x, _ = fit_cdf(SMALL, bandwidth=1e-3, points=needed)
    assert x[1] - x[0] <= 1e-3
