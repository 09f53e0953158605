"""The bootstrap that sweeps use gives the harness's standard errors to the bit."""

from __future__ import annotations

import random

import pytest
from lm_eval.api import metrics

from lm_eval_bh.harness.sweep.exact_bootstrap import exact_bootstrap, replicates


@pytest.mark.parametrize("documents", [1, 2, 7, 50, 64])
def test_standard_errors_are_the_harness_s_to_the_bit(documents, monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    rng = random.Random(documents)
    xs = [-rng.expovariate(0.1) for _ in range(documents)]
    theirs = metrics.bootstrap_stderr(metrics.perplexity, xs, 3000)
    with exact_bootstrap():
        ours = metrics.stderr_for_metric(metrics.perplexity, 3000)(xs)
    assert ours == theirs
    assert metrics._bootstrap_internal_no_mp(metrics.perplexity, xs, 3000) == replicates(xs, 3000)


@pytest.mark.parametrize("xs", [[], [1, 2], [-1e6, -1.0]])
def test_what_it_cannot_do_is_left_to_the_harness(xs):
    assert replicates(xs, 1000) is None


def test_other_metrics_are_the_harness_s_own(monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    xs = [0.0, 1.0, 1.0, 3.0]
    theirs = metrics.bootstrap_stderr(metrics.median, xs, 1000)
    before = metrics.bootstrap_stderr
    with exact_bootstrap():
        assert metrics.bootstrap_stderr(metrics.median, xs, 1000) == theirs
    assert metrics.bootstrap_stderr is before
