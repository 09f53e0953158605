"""Every metric on a case counted by hand, and by properties of all cases."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from lm_eval_bh.analysis.table import metrics, stability

# Two layers, four experts, ten tokens; max_k = 3, min_k = 1.
HISTOGRAM = np.array([[0, 5, 3, 2, 0], [0, 8, 0, 2, 0]])
USAGE = np.array([[10, 7, 0, 0], [4, 4, 3, 3]])
EMPTY = np.zeros((2, 5), dtype=np.int64)

usages = arrays(
    np.int64, st.tuples(st.integers(1, 4), st.integers(2, 9)), elements=st.integers(0, 50)
)


@st.composite
def counts(draw):
    """Return counts int [layers, tokens] between two bounds, and the bounds."""
    min_k = draw(st.integers(1, 4))
    max_k = draw(st.integers(min_k, 7))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 12)))
    return draw(arrays(np.int64, shape, elements=st.integers(min_k, max_k))), min_k, max_k


def histogram_of(values):
    return np.stack([np.bincount(layer, minlength=9) for layer in values])


def cross_of(values):
    return [0, *((values[1:] * values[:-1]).sum(-1)).tolist()]


def test_every_category_has_its_two_metrics_and_the_companions_stand_beside_them():
    companions = {"normalized_selection_entropy", "mid_range_rate"}
    sixteen = [
        name for names in metrics.CATEGORIES.values() for name in names if name not in companions
    ]
    assert (len(metrics.CATEGORIES), len(sixteen), len(set(metrics.METRICS))) == (8, 16, 18)


def test_perplexity_weighs_documents_by_their_tokens():
    # 6 + 2 nats over 3 + 1 tokens
    assert metrics.perplexity([-6.0, -2.0], [3, 1]) == pytest.approx(math.exp(2))
    assert metrics.perplexity([-8.0, -2.0], [3, 1]) == pytest.approx(math.exp(2.5))
    assert metrics.perplexity([], []) is None
    assert metrics.perplexity([-1e6], [1]) == math.inf


def test_the_standard_error_of_the_perplexity_is_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 400, 300)
    loglikelihoods = -tokens * rng.normal(3, 0.3, 300)
    bootstrapped = stats.bootstrap(
        (loglikelihoods, tokens),
        lambda nats, counts, axis: np.exp(-nats.sum(axis) / counts.sum(axis)),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        random_state=np.random.default_rng(1),
    )
    error = metrics.perplexity_stderr(loglikelihoods, tokens)
    assert error == pytest.approx(bootstrapped.standard_error, rel=0.05)
    # Documents with equal loss per token give no variance, whatever their lengths.
    assert metrics.perplexity_stderr([-6.0, -2.0], [3, 1]) == pytest.approx(0)
    assert metrics.perplexity_stderr([-6.0], [3]) is None
    assert metrics.perplexity_stderr([], []) is None


def test_average_accuracy_weighs_tasks_alike():
    assert metrics.avg_task_accuracy({"a": 0.25, "b": 0.75, "c": 0.5}) == 0.5
    assert metrics.avg_task_accuracy({}) is None


def test_efficiency():
    assert metrics.expert_activation_ratio(2.0, 8) == 0.25
    assert metrics.flops_reduction_pct(75.0, 100.0) == 25.0
    assert metrics.flops_reduction_pct(150.0, 100.0) == -50.0
    assert metrics.expert_activation_ratio(None, 8) is metrics.expert_activation_ratio(2.0, None)
    assert metrics.flops_reduction_pct(None, 1.0) is metrics.flops_reduction_pct(1.0, None) is None


def test_speed():
    assert metrics.tokens_per_second(500, 2.0) == 250.0
    assert metrics.latency_ms_per_token(500, 2.0) == 4.0
    for tokens, seconds in ((0, 2.0), (None, 2.0), (500, 0.0), (500, None)):
        assert metrics.tokens_per_second(tokens, seconds) is None
        assert metrics.latency_ms_per_token(tokens, seconds) is None


def test_utilization_is_the_share_of_experts_that_served():
    assert metrics.expert_utilization(USAGE) == 6 / 8
    assert metrics.expert_utilization(EMPTY) is None


def test_gini_by_hand():
    # First layer, ascending 0 0 7 10, weights -3 -1 1 3: (7 + 30) / (4 * 17)
    # Second layer, ascending 3 3 4 4: (-9 - 3 + 4 + 12) / (4 * 14)
    assert metrics.gini_coefficient(USAGE) == pytest.approx((37 / 68 + 4 / 56) / 2)
    assert metrics.gini_coefficient(np.array([[0, 0, 0, 9]])) == 0.75  # 1 - 1/N
    assert metrics.gini_coefficient(EMPTY) is None


@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 1000))
def test_gini_of_equal_usage_is_zero(layers, experts, times):
    assert metrics.gini_coefficient(np.full((layers, experts), times)) == pytest.approx(0)


@given(usages, st.randoms(use_true_random=False))
def test_distribution_does_not_depend_on_the_names_of_the_experts(usage, random):
    order = list(range(usage.shape[1]))
    random.shuffle(order)
    for metric in (metrics.gini_coefficient, metrics.expert_utilization):
        value, shuffled = metric(usage), metric(usage[:, order])
        assert (value is None) == (shuffled is None) == (not usage.any())
        if value is not None:
            assert shuffled == pytest.approx(value, abs=1e-12)
            assert 0 <= value <= 1
    if usage.any():
        assert metrics.gini_coefficient(usage) <= 1 - 1 / usage.shape[1] + 1e-12
        assert metrics.gini_coefficient(3 * usage) == pytest.approx(metrics.gini_coefficient(usage))


@given(arrays(np.int64, st.integers(2, 12), elements=st.integers(0, 50)))
def test_gini_is_half_the_relative_mean_difference(usage):
    if usage.any():
        differences = np.abs(usage[:, None] - usage[None]).mean()
        assert metrics.gini_coefficient(usage[None]) == pytest.approx(
            differences / (2 * usage.mean())
        )


def test_behaviour_by_hand():
    # Pooled: 13 tokens with one expert, 3 with two, 4 with three.
    assert metrics.adaptive_range(HISTOGRAM) == 2
    entropy = -sum(p * math.log(p) for p in (0.65, 0.15, 0.2))
    assert metrics.selection_entropy(HISTOGRAM) == pytest.approx(entropy)
    assert metrics.normalized_selection_entropy(HISTOGRAM, 1, 3) == pytest.approx(
        entropy / math.log(3)
    )


def test_constraints_by_hand():
    assert metrics.ceiling_hit_rate(HISTOGRAM, 3) == 20
    assert metrics.floor_hit_rate(HISTOGRAM, 1, 3) == 65
    assert metrics.mid_range_rate(HISTOGRAM, 1, 3) == 15


def test_fixed_counts_are_ceiling_hits_and_never_floor_hits():
    fixed = np.array([[0, 0, 0, 10, 0]] * 2)
    assert metrics.ceiling_hit_rate(fixed, 3) == 100
    assert metrics.floor_hit_rate(fixed, 3, 3) == 0
    assert metrics.mid_range_rate(fixed, 3, 3) == 0
    assert metrics.adaptive_range(fixed) == 0
    assert metrics.selection_entropy(fixed) == 0
    assert metrics.normalized_selection_entropy(fixed, 3, 3) is None
    assert metrics.layer_expert_variance(fixed) == 0
    assert metrics.layer_consistency_score(fixed, [0, 90]) is None


def test_nothing_is_measured_without_tokens():
    assert metrics.adaptive_range(EMPTY) is None
    assert metrics.selection_entropy(EMPTY) is None
    assert metrics.normalized_selection_entropy(EMPTY, 1, 3) is None
    assert metrics.ceiling_hit_rate(EMPTY, 3) is None
    assert metrics.floor_hit_rate(EMPTY, 1, 3) is None
    assert metrics.mid_range_rate(EMPTY, 1, 3) is None
    assert metrics.layer_expert_variance(EMPTY) is None
    assert metrics.layer_consistency_score(EMPTY, [0, 0]) is None


@given(counts())
def test_ranges(drawn):
    values, min_k, max_k = drawn
    histogram = histogram_of(values)
    rates = (
        metrics.ceiling_hit_rate(histogram, max_k),
        metrics.floor_hit_rate(histogram, min_k, max_k),
        metrics.mid_range_rate(histogram, min_k, max_k),
    )
    assert sum(rates) == pytest.approx(100)
    assert all(0 <= rate <= 100 for rate in rates)
    assert metrics.adaptive_range(histogram) == np.ptp(values) <= max_k - min_k
    assert 0 <= metrics.selection_entropy(histogram) <= math.log(max_k - min_k + 1) + 1e-12
    normalized = metrics.normalized_selection_entropy(histogram, min_k, max_k)
    assert normalized is None if min_k == max_k else 0 <= normalized <= 1


@given(counts(), st.randoms(use_true_random=False))
def test_the_order_of_tokens_does_not_matter(drawn, random):
    values, _, _ = drawn
    order = list(range(values.shape[1]))
    random.shuffle(order)
    assert (histogram_of(values) == histogram_of(values[:, order])).all()
    assert cross_of(values) == cross_of(values[:, order])


def test_layer_variance_by_hand():
    # The layers' means are 1.7 and 1.4.
    assert metrics.layer_expert_variance(HISTOGRAM) == pytest.approx(0.15**2)
    assert metrics.layer_expert_variance(HISTOGRAM[:1]) is None


@given(counts())
def test_consistency_is_the_mean_correlation_of_adjacent_layers(drawn):
    values, _, _ = drawn
    pairs = [(x, y) for x, y in pairwise(values) if np.ptp(x) and np.ptp(y)]
    score = metrics.layer_consistency_score(histogram_of(values), cross_of(values))
    if not pairs:
        assert score is None
    else:
        assert score == pytest.approx(np.mean([np.corrcoef(x, y)[0, 1] for x, y in pairs]))
        assert -1 <= score <= 1


def test_consistency_extremes():
    up, down = np.array([1, 2, 3, 4]), np.array([4, 3, 2, 1])
    for values, expected in (([up, up, up], 1), ([up, down], -1), ([up, down, down], 0)):
        layers = np.stack(values)
        assert metrics.layer_consistency_score(
            histogram_of(layers), cross_of(layers)
        ) == pytest.approx(expected)


def sample(doc_id, experts, tokens=None, layer=0):
    return {
        "sample_id": doc_id,
        "request": 0,
        "token_ids": tokens or list(range(len(experts))),
        "layers": [{"layer": layer, "selected_experts": experts}],
    }


def test_overlap_by_hand():
    first = [sample(0, [[1, 2, -1], [3, -1, -1]]), sample(1, [[0, 1, 2]])]
    second = [sample(0, [[2, 1, -1], [3, 4, -1]]), sample(1, [[3, 4, -1]])]
    # 2/2, 1/2 and 0/5
    assert stability.expert_overlap_score(first, second) == pytest.approx(1.5 / 3)
    assert stability.expert_overlap_score(second, first) == pytest.approx(1.5 / 3)
    assert stability.expert_overlap_score(first, first) == 1
    assert stability.expert_overlap_score(first, []) is None
    assert stability.expert_overlap_score(first, [sample(0, [[1, 2, -1]], layer=5)]) is None


def test_overlap_counts_tokens_up_to_the_first_difference_of_the_text():
    first = [sample(0, [[1], [2], [3]], tokens=[7, 8, 9])]
    second = [sample(0, [[1], [4], [3]], tokens=[7, 5, 9])]
    assert stability.expert_overlap_score(first, second) == 1
    assert stability.expert_overlap_score(first, [sample(0, [[1]], tokens=[6])]) is None


@given(st.lists(st.tuples(*[st.sets(st.integers(0, 7), max_size=5)] * 2), min_size=1))
def test_jaccard_of_sets(pairs):
    def padded(sets, width):
        return np.array([sorted(s) + [-1] * (width - len(s)) for s in sets])

    found = stability.jaccard(padded([a for a, _ in pairs], 5), padded([b for _, b in pairs], 6))
    assert found.tolist() == [len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]


def test_determinism_is_the_percentage_of_equal_outputs():
    assert stability.output_determinism({0: "a", 1: "b"}, {0: "a", 1: "c"}) == 50
    assert stability.output_determinism({0: "a", 1: "b"}, {1: "b", 2: "c"}) == 100
    assert stability.output_determinism({0: "a"}, {1: "a"}) is None
