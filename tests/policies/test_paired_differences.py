"""Differences of perplexities: scipy's bootstrap of the same documents, and interpolation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lm_eval_bh.policies.paired_differences import Ladder, PairedBootstrap

RNG = np.random.default_rng(3)
TOKENS = RNG.integers(50, 500, 40).astype(float)
OURS = TOKENS * RNG.normal(3.0, 0.3, 40)
THEIRS = OURS + TOKENS * RNG.normal(0.05, 0.05, 40)


def difference_of(ours, theirs, tokens, axis=-1):
    total = tokens.sum(axis)
    return np.exp(ours.sum(axis) / total) - np.exp(theirs.sum(axis) / total)


def test_the_interval_is_that_of_scipy():
    found = PairedBootstrap(TOKENS, 20_000).compare(OURS, THEIRS)
    expected = stats.bootstrap(
        (OURS, THEIRS, TOKENS),
        difference_of,
        paired=True,
        method="percentile",
        n_resamples=20_000,
        random_state=np.random.default_rng(1),
    ).confidence_interval
    assert found.difference == pytest.approx(difference_of(OURS, THEIRS, TOKENS))
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.high, abs=0.05 * width)
    assert found.relative == pytest.approx(found.perplexity / found.control - 1)
    assert found.relative_low < found.relative < found.relative_high


def test_equal_losses_differ_by_nothing():
    found = PairedBootstrap(TOKENS).compare(OURS, OURS)
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("mean", "share"), [(3.0, 0.0), (3.25, 0.25), (4.0, 1.0), (4.5, 1.5)])
def test_between_rungs_losses_are_interpolated(mean, share):
    ladder = Ladder({4: THEIRS, 3: OURS})
    np.testing.assert_allclose(ladder.at(mean), OURS + share * (THEIRS - OURS))


def test_of_three_rungs_the_two_around_count():
    ladder = Ladder({2: OURS, 3: THEIRS, 5: OURS})
    np.testing.assert_allclose(ladder.at(4), (THEIRS + OURS) / 2)
    np.testing.assert_allclose(ladder.at(2), OURS)
    np.testing.assert_allclose(Ladder({2: OURS}).at(7), OURS)
