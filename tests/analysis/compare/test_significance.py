"""Paired comparisons: against hand counts, against scipy, and on data with known answers."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lm_eval_bh.analysis.compare import paired_tests
from lm_eval_bh.analysis.compare.paired import COMPARISON, compare
from lm_eval_bh.analysis.compare.paired_measures import perplexity
from lm_eval_bh.analysis.compare.paired_tests import bootstrap_interval, mcnemar_exact, t_test, tost
from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.analysis.table.matched_budget import matched_budget
from lm_eval_bh.errors import ParameterError

WIKITEXT, LAMBADA, HELLASWAG = "bh_wikitext", "bh_lambada", "bh_hellaswag"
TOKENS, DOCUMENTS = 25, 4  # of every task that the fixture writes


@pytest.fixture
def two_runs(write):
    write("top", rule="topk", loss=(2.0, 2.0, 3.0, 2.5), right=(1, 1, 1, 0))
    write("bh", loss=(2.2, 2.1, 3.0, 2.6), right=(0, 0, 1, 1), log=True)
    return load_experiments([write.folder])


def test_perplexities_are_compared_document_by_document(two_runs, write):
    table = compare(two_runs)
    assert list(table) == list(COMPARISON)
    assert {name: str(kind) for name, kind in table.dtypes.items()} == COMPARISON
    row = table[(table["task"] == WIKITEXT)].iloc[0]
    losses = np.array([0.2, 0.1, 0.0, 0.1]) * write.lengths
    assert (row["metric"], row["documents"], row["reason"]) == ("perplexity", 4, None)
    assert (row["strategy"], row["baseline"]) == ("BH a=0.40, max 4", "top-4")
    assert row["ratio"] == pytest.approx(math.exp(losses.sum() / TOKENS))
    assert row["value"] / row["baseline_value"] == pytest.approx(row["ratio"])
    assert row["difference"] == pytest.approx(row["value"] - row["baseline_value"])
    perplexities = two_runs.frame.query("task == @WIKITEXT").set_index("strategy")["perplexity"]
    assert row["value"] == pytest.approx(perplexities["BH a=0.40, max 4"])
    # No resample of documents can be better than the best or worse than the worst of them.
    assert 1 <= row["ratio_low"] < row["ratio"] < row["ratio_high"] <= math.exp(0.2) + 1e-12
    assert row["difference_low"] < row["difference"] < row["difference_high"]


def test_accuracies_are_compared_by_flips(two_runs):
    row = compare(two_runs).query("metric == 'acc_norm'").iloc[0]
    assert (row["flips_worse"], row["flips_better"]) == (2, 1)
    assert (row["value"], row["baseline_value"], row["difference"]) == (0.5, 0.75, -0.25)
    assert row["p_value"] == 1.0  # of three flips, two in one direction say nothing
    assert row["test"] == "McNemar, exact"
    assert -1 <= row["difference_low"] <= -0.25 <= row["difference_high"] <= 1
    assert math.isnan(row["ratio"])


def test_p_values_are_adjusted_over_the_whole_table(write):
    write("top", rule="topk", loss=(2.0, 2.0, 3.0, 2.5))
    for number, alpha in enumerate((0.3, 0.4, 0.5)):
        write(f"bh{alpha}", alpha=alpha, loss=(2.1 + 0.1 * number, 2.2, 3.05, 2.6), log=True)
    table = compare(load_experiments([write.folder]))
    assert len(table) == 3 * 4
    for name, adjusted in (("p_value", "p_adjusted"), ("equivalence_p", "equivalence_p_adjusted")):
        expected = stats.false_discovery_control(table[name])
        assert table[adjusted].to_numpy() == pytest.approx(expected)
        assert (table[adjusted] >= table[name]).all()


def test_the_same_seed_gives_the_same_intervals(two_runs):
    first, again = compare(two_runs, seed=3), compare(two_runs, seed=3)
    pd.testing.assert_frame_equal(first, again)
    other = compare(two_runs, seed=4, resamples=50)
    assert (other["ratio_low"] != first["ratio_low"]).any()


def test_identical_runs_are_equivalent_where_that_can_be_known(write):
    write("top", rule="topk")
    write("bh", log=True)
    table = compare(load_experiments([write.folder])).set_index(["task", "metric"])
    wikitext = table.loc[(WIKITEXT, "perplexity")]
    assert (wikitext["ratio"], wikitext["ratio_low"], wikitext["ratio_high"]) == (1, 1, 1)
    assert (wikitext["p_value"], wikitext["equivalence_p"]) == (1, 0)
    assert wikitext["equivalent"] is True
    # Four documents without a flip do not prove that fewer than 1 % flip.
    hellaswag = table.loc[(HELLASWAG, "acc_norm")]
    assert (hellaswag["p_value"], hellaswag["equivalent"]) == (1, False)
    assert hellaswag["equivalence_p"] == pytest.approx(0.99**4)


def test_margins_are_the_users(two_runs):
    strict, loose = (
        compare(two_runs, margin=margin).query("task == @WIKITEXT").iloc[0]
        for margin in (0.001, 0.9)
    )
    assert strict["equivalence_p"] > 0.5 > loose["equivalence_p"]
    assert (strict["margin"], loose["margin"]) == (0.001, 0.9)


def test_either_baseline(write):
    write("top4", rule="topk", max_k=4, loss=2.0)
    write("top8", rule="topk", max_k=8, loss=2.5)
    write("bh", max_k=8, loss=2.4, log=True)
    loaded = load_experiments([write.folder])
    native = compare(loaded).query("task == @WIKITEXT").set_index("strategy")
    assert native["baseline"].to_dict() == {"top-8": "top-4", "BH a=0.40, max 8": "top-4"}
    assert native["ratio"]["BH a=0.40, max 8"] == pytest.approx(math.exp(0.4))
    same = compare(loaded, baseline="max_k").query("task == @WIKITEXT").set_index("strategy")
    assert same["baseline"].to_dict() == {"BH a=0.40, max 8": "top-8"}
    assert same["ratio"]["BH a=0.40, max 8"] == pytest.approx(math.exp(-0.1))


def test_the_stock_model_is_a_baseline_too(write):
    write("stock", model="hf", loss=2.0)
    write("bh", loss=2.2)
    row = compare(load_experiments([write.folder])).query("task == @WIKITEXT").iloc[0]
    assert (row["baseline"], row["metric"]) == ("top-4 (hf)", "word_perplexity")
    assert row["ratio"] == pytest.approx(math.exp(0.2 * TOKENS / (TOKENS - DOCUMENTS)))


def test_repeated_runs_and_analyses_are_no_further_tests(write):
    write("top", rule="topk")
    write("bh")
    write("again")
    write("looked", mode="analyze")
    table = compare(load_experiments([write.folder]))
    assert set(table["run_id"]) == {"run-2"}


def test_why_there_is_no_comparison(write):
    write("top", rule="topk", samples=False)
    write("bh", tasks=(WIKITEXT,))
    write("far", alpha=0.5, tasks=(LAMBADA,), samples=False)
    reasons = compare(load_experiments([write.folder])).set_index("task")["reason"]
    assert "no samples of the baseline" in reasons[WIKITEXT]
    assert "no samples of the configuration" in reasons[LAMBADA]
    alone = load_experiments([write.folder / "bh"])
    table = compare(alone)
    assert table["reason"].tolist() == ["its baseline was not run on this task"]
    assert table["equivalent"].tolist() == [None]
    assert pd.isna(table["p_adjusted"]).all()


def test_loglikelihoods_that_are_not_finite(write):
    write("top", rule="topk", loss=2.0)
    write("bh", loss=(2.0, math.inf, 2.0, 2.0))
    table = compare(load_experiments([write.folder])).query("task == @WIKITEXT")
    assert table["reason"].tolist() == ["a loglikelihood is not finite"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"baseline": "top-8"},
        {"margin": 0},
        {"accuracy_margin": 1.0},
        {"confidence": 95},
        {"resamples": 0},
    ],
)
def test_arguments_are_checked(two_runs, wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        compare(two_runs, **wrong)


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_binomial_test_of_the_flips(better, worse):
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar_exact(better, worse) == pytest.approx(expected)


def test_t_tests_are_scipys():
    differences = np.random.default_rng(0).normal(0.1, 1, 40)
    assert t_test(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    expected = max(
        stats.ttest_1samp(differences, -0.5, alternative="greater").pvalue,
        stats.ttest_1samp(differences, 0.5, alternative="less").pvalue,
    )
    assert tost(differences, -0.5, 0.5) == pytest.approx(expected)
    constant = np.full(5, 0.2)
    assert t_test(constant) == 0
    assert tost(constant, -0.1, 0.1) == 1
    assert tost(constant, -0.3, 0.3) == 0


def test_intervals_cover_as_often_as_they_say():
    """Of 200 samples with a true log ratio of 0.02, about 95 % have it in their interval."""
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        weights = rng.integers(50, 400, 60).astype(float)
        losses = weights * rng.normal(0.02, 0.05, 60)
        low, high = bootstrap_interval(perplexity, losses, weights, resamples=400, seed=seed)
        covered += low <= math.exp(0.02) <= high
    assert 0.88 < covered / 200 < 0.99


def test_an_interval_does_not_depend_on_the_batch(monkeypatch):
    rng = np.random.default_rng(3)
    one, other, weights = rng.uniform(2, 3, (3, 40)) * [[1.0], [1.0], [20.0]]
    found = []
    for at_once in (2_000_000, 700):
        monkeypatch.setattr(paired_tests, "DRAWS_AT_ONCE", at_once)
        found.append(bootstrap_interval(perplexity, one - other, weights, resamples=500, seed=5))
    assert found[0] == found[1]
    means = [
        (one - other)[drawn].mean(1) / weights[drawn].mean(1)
        for drawn in [np.random.default_rng(5).integers(0, 40, (500, 40))]
    ]
    assert found[0] == pytest.approx(np.exp(np.quantile(means, [0.025, 0.975])))


def test_the_linearised_ratio_has_the_ratios_mean_and_its_standard_error():
    rng = np.random.default_rng(2)
    weights = rng.integers(50, 400, 300).astype(float)
    losses = weights * rng.normal(0.03, 0.1, 300)
    ratio = losses.sum() / weights.sum()
    influence = ratio + (losses - ratio * weights) / weights.mean()
    assert influence.mean() == pytest.approx(ratio)
    low, high = bootstrap_interval(perplexity, losses, weights)
    assert (math.log(high) - math.log(low)) / (2 * 1.96) == pytest.approx(
        influence.std(ddof=1) / math.sqrt(300), rel=0.05
    )


# Static top-k at the same number of experts


def frame_of(*rows):
    """Return a frame of (k or None, mean experts, perplexity, accuracy)."""
    return pd.DataFrame(
        [
            {
                "group": 1,
                "task": "t",
                "baseline": k is not None,
                "max_k": k if k is not None else 8,
                "avg_experts_model": experts,
                "perplexity": np.nan,
                "word_perplexity": perplexity,
                "target_perplexity": np.nan,
                "byte_perplexity": 1.5,
                "accuracy": accuracy,
            }
            for k, experts, perplexity, accuracy in rows
        ],
        index=[f"row {number}" for number in range(len(rows))],
    ).astype({"max_k": "Int64"})


def test_measured_within_two_percent():
    frame = frame_of((4, 4.0, 20.0, 0.5), (8, 8.0, 10.0, 0.75), (None, 4.07, 15.0, 0.6))
    found = matched_budget(frame).loc["row 2"]
    assert found.to_dict() == {
        "matched_metric": "word_perplexity",
        "matched_perplexity": pytest.approx(20.0),
        "matched_accuracy": 0.5,
        "matched_by": "measured",
        "matched_k_low": 4,
        "matched_k_high": 4,
    }


def test_interpolated_in_log_perplexity():
    frame = frame_of(
        (2, 2.0, 99.0, 0.1), (4, 4.0, 20.0, 0.5), (8, 8.0, 10.0, 0.75), (None, 6.0, 15.0, 0.6)
    )
    found = matched_budget(frame).loc["row 3"]
    assert found["matched_perplexity"] == pytest.approx(math.sqrt(20.0 * 10.0))
    assert found["matched_accuracy"] == pytest.approx(0.625)
    assert found["matched_by"] == "interpolated"
    assert (found["matched_k_low"], found["matched_k_high"]) == (4, 8)


def test_nothing_is_claimed_outside_the_measured_range():
    frame = frame_of((4, 4.0, 20.0, 0.5), (8, 8.0, 10.0, 0.75), (None, 2.5, 30.0, 0.4))
    found = matched_budget(frame)
    assert found.isna().all(axis=None)
    assert found.index.tolist() == frame.index.tolist()


def test_published_contribution_loses_to_interpolated_static_top_k_or_not():
    """With others' numbers of OLMoE-1B-7B: 12.202 at 4.96 experts, top-5 measured 12.299."""
    frame = frame_of(
        (8, 8.0, 11.051, 0.0), (5, 5.0, 12.299, 0.0), (4, 4.0, 14.117, 0.0), (None, 4.96, 12.202, 0)
    )
    found = matched_budget(frame).loc["row 3"]
    assert (found["matched_by"], found["matched_perplexity"]) == ("measured", pytest.approx(12.299))


def test_repeats_of_a_top_k_are_averaged():
    frame = frame_of((4, 4.0, 10.0, 0.4), (4, 4.0, 40.0, 0.6), (None, 4.0, 15.0, 0.6))
    found = matched_budget(frame).loc["row 2"]
    assert found["matched_perplexity"] == pytest.approx(20.0)
    assert found["matched_accuracy"] == pytest.approx(0.5)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 16), min_size=2, max_size=6, unique=True),
    st.floats(1, 16),
)
def test_a_match_lies_between_its_neighbours(ks, experts):
    frame = frame_of(*((k, float(k), 100.0 / k, k / 20) for k in ks), (None, experts, 1.0, 1.0))
    found = matched_budget(frame).iloc[-1]
    if found["matched_by"] is None:
        assert not min(ks) <= experts <= max(ks)
        return
    low, high = found["matched_k_low"], found["matched_k_high"]
    assert 100 / high - 1e-9 <= found["matched_perplexity"] <= 100 / low + 1e-9
    assert low / 20 - 1e-9 <= found["matched_accuracy"] <= high / 20 + 1e-9
    if found["matched_by"] == "measured":
        assert abs(low - experts) <= 0.02 * experts
    else:
        assert low < experts < high


def test_the_table_of_experiments_has_the_matches(write):
    write("top2", rule="topk", max_k=2, loss=3.0, right=(0, 0, 0, 0))
    write("top4", rule="topk", max_k=4, loss=2.0, right=(1, 1, 1, 1))
    write("bh", loss=2.1, log=True)
    frame = load_experiments([write.folder]).frame
    row = frame[frame["adaptive"] & (frame["task"] == WIKITEXT)].iloc[0]
    share = (row["avg_experts"] - 2) / 2
    assert 0 < share < 1
    assert row["matched_metric"] == "perplexity"
    assert row["matched_perplexity"] == pytest.approx(math.exp(3 - share))
    assert row["matched_by"] == "interpolated"
    hellaswag = frame[frame["adaptive"] & (frame["task"] == HELLASWAG)].iloc[0]
    assert hellaswag["matched_metric"] is None
    assert hellaswag["matched_accuracy"] == pytest.approx(share)
    assert frame[frame["baseline"]]["matched_by"].isna().all()
