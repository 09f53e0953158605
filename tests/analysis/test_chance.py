"""Uninformative accuracies are distinguished from others."""

from __future__ import annotations

import pytest
from statsmodels.stats.proportion import proportion_confint

from lm_eval_bh.analysis.table.chance import note
from lm_eval_bh.analysis.table.experiments import load_experiments


@pytest.mark.parametrize("right", range(0, 61))
@pytest.mark.parametrize("chance", [0.25, 0.5])
def test_at_chance_where_the_binomial_interval_holds_it(right, chance):
    low, high = proportion_confint(right, 60, method="beta")
    assert (note(right / 60, 60, chance) == "at chance") == (low <= chance <= high)


def test_where_nothing_can_be_guessed_only_zero_says_nothing():
    assert note(0.0, 50, None) == "all wrong"
    assert note(0.02, 50, None) is None


def test_tables_say_so(write):
    write("bh", right=(0, 0, 0, 0))
    frame = load_experiments([write.folder]).frame.set_index("task")
    assert frame.loc["bh_lambada", "accuracy_note"] == "all wrong"
    assert frame.loc["bh_hellaswag", "accuracy_note"] == "at chance"  # 0 of 4, with four choices
    assert frame.loc["bh_hellaswag", "chance_accuracy"] == 0.25
    assert frame.loc["bh_wikitext", ["accuracy_note", "chance_accuracy"]].isna().all()
