"""The rule of the recommendation, on tables written by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_bh.analysis.compare.recommendation import recommend
from lm_eval_bh.errors import ParameterError

WIKITEXT, LAMBADA = "wikitext", "lambada"


def tables(*configurations, tasks=(WIKITEXT,), native=True, group=1):
    """Return experiments and comparisons of (name, experts, ratio, upper end[, reason])."""
    rows, compared = [], []
    if native:
        configurations = (("top-8", 8, 1.0, 1.0), *configurations)
    for name, experts, ratio, high, *reason in configurations:
        for task in tasks:
            run = {"group": group, "run_id": f"{name} {task}", "task": task, "strategy": name}
            static = name.startswith("top")
            rows.append(
                run
                | {
                    "configuration": name,
                    "mode": "patch",
                    "adaptive": not static,
                    "baseline": static,
                    "max_k": experts if static else 8,
                    "native_top_k": 8,
                    "avg_experts_model": float(experts),
                    "perplexity": 10.0 * ratio,
                    "word_perplexity": None,
                    "target_perplexity": None,
                    "byte_perplexity": None,
                }
            )
            if name != "top-8":
                known = {"metric": "perplexity", "ratio": ratio, "ratio_high": high, "reason": None}
                why = {"metric": None, "ratio": None, "ratio_high": None, "reason": "".join(reason)}
                compared.append(run | (why if reason else known))
    columns = ["group", "run_id", "task", "metric", "ratio", "ratio_high", "reason"]
    return pd.DataFrame(rows), pd.DataFrame(compared, columns=columns)


def the_only(*arguments, **options):
    found = recommend(*tables(*arguments, **options))
    assert len(found) == 1
    return found[0]


def test_fewest_experts_within_the_margin():
    found = the_only(("BH a", 3, 1.02, 1.03), ("BH b", 4, 1.002, 1.009), ("BH c", 5, 1.0, 1.002))
    assert found.chosen.strategy == "BH b"
    assert "Use BH b: 4.00 experts per token instead of 8 (50 % fewer)" in found.sentence
    assert "0.20 % worse on average" in found.sentence
    assert "0.90 % worse at the worst end" in found.sentence
    assert [c.strategy for c in found.candidates] == ["BH a", "BH b", "BH c", "top-8"]


@pytest.mark.parametrize(("high", "qualifies"), [(1.0099, True), (1.01, True), (1.0101, False)])
def test_the_interval_must_end_within_the_margin(high, qualifies):
    found = the_only(("BH", 4, 1.0, high))
    assert found.candidates[0].qualifies == qualifies


def test_margin_is_an_argument():
    frame, compared = tables(("BH", 4, 1.02, 1.04))
    assert recommend(frame, compared)[0].chosen.strategy == "top-8"
    found = recommend(frame, compared, margin=0.05, confidence=0.9)[0]
    assert found.chosen.strategy == "BH"
    assert "at most 5 % worse" in found.rule
    assert "90 % interval" in found.rule


def test_the_rule_must_hold_on_every_task():
    frame, compared = tables(("BH", 4, 1.0, 1.001), tasks=(WIKITEXT, LAMBADA))
    assert recommend(frame, compared)[0].chosen.strategy == "BH"
    compared.loc[compared["task"] == LAMBADA, "ratio_high"] = 1.2
    found = recommend(frame, compared)[0]
    assert found.chosen.strategy == "top-8"
    assert found.candidates[0].verdict == "interval ends at 20.00 % worse on lambada"
    frame = frame[~((frame["strategy"] == "BH") & (frame["task"] == LAMBADA))]
    compared = compared[compared["task"] != LAMBADA]
    assert recommend(frame, compared)[0].candidates[0].verdict == "lambada was not run"


@pytest.mark.parametrize("experts", [3, 4, 4.05])  # within 2 % counts as equal
def test_no_adaptive_rule_that_a_static_top_k_beats(experts):
    # The static one is better but too uncertain to qualify: then neither is recommended.
    found = the_only(("BH", 4, 1.004, 1.009), ("top-4", experts, 1.0, 1.02))
    assert found.chosen.strategy == "top-8"
    verdicts = {c.strategy: c.verdict for c in found.candidates}
    assert "but top-4 is better" in verdicts["BH"]


@pytest.mark.parametrize(
    "static", [("top-6", 6, 0.9, 1.2), ("top-4", 4, 1.006, 1.2)], ids=["more experts", "worse"]
)
def test_a_static_top_k_that_costs_more_or_is_worse_beats_nothing(static):
    assert the_only(("BH", 4, 1.004, 1.009), static).chosen.strategy == "BH"


def test_static_before_adaptive_at_equal_experts():
    found = the_only(("BH", 4, 1.001, 1.005), ("top-4", 4, 1.001, 1.005))
    assert found.chosen.strategy == "top-4"


def test_none_qualifies():
    found = the_only(("BH", 2, 1.3, 1.4), ("top-4", 4, 1.1, 1.2))
    assert found.chosen.strategy == "top-8"
    assert found.sentence == (
        "No configuration with fewer experts qualifies: stay with top-8, the model's own top-k."
    )


def test_without_the_models_own_top_k_nothing_is_recommended():
    found = the_only(("BH", 2, 0, 0, "its baseline was not run on this task"), native=False)
    assert found.chosen is None
    assert "run it too" in found.sentence
    assert found.candidates[0].verdict == "wikitext: its baseline was not run on this task"


def test_without_a_perplexity_nothing_is_judged():
    frame, compared = tables(("BH", 4, 1.0, 1.0))
    found = recommend(frame.assign(perplexity=None), compared)[0]
    assert found.chosen is None
    assert "No task has a perplexity" in found.sentence


def test_unknown_experts_and_analysis_are_not_recommended():
    frame, compared = tables(("BH", 4, 1.0, 1.0), ("BH only looked at", 1, 1.0, 1.0))
    frame.loc[frame["strategy"] == "BH", "avg_experts_model"] = math.nan
    frame.loc[frame["strategy"] == "BH only looked at", "mode"] = "analyze"
    found = recommend(frame, compared)[0]
    assert found.chosen.strategy == "top-8"
    assert {c.strategy for c in found.candidates} == {"top-8", "BH"}


def test_the_unmodified_model_alone():
    frame, compared = tables()
    frame = frame.assign(mode="native", max_k=pd.NA, native_top_k=pd.NA, avg_experts_model=None)
    found = recommend(frame.astype({"avg_experts_model": float}), compared)[0]
    assert found.chosen is None
    assert "run --model hf-bh too" in found.sentence


def test_each_group_by_itself():
    one, two = (
        tables(("BH", 4, 1.0, high), group=number) for number, high in ((1, 1.001), (2, 1.5))
    )
    found = recommend(*(pd.concat(pair) for pair in zip(one, two, strict=True)))
    assert [(f.group, f.chosen.strategy) for f in found] == [(1, "BH"), (2, "top-8")]


@pytest.mark.parametrize("bad", [{"margin": 0}, {"margin": 1.5}, {"confidence": 1}])
def test_arguments_out_of_range(bad):
    with pytest.raises(ParameterError, match=next(iter(bad))):
        recommend(*tables(), **bad)


configurations = st.lists(
    st.tuples(st.booleans(), st.integers(1, 16), st.floats(0.95, 1.05), st.floats(0, 0.03)),
    max_size=6,
).map(
    lambda found: [
        (f"{'top' if static else 'BH'} {i}", experts, ratio, ratio + width)
        for i, (static, experts, ratio, width) in enumerate(found)
        if not (static and experts == 8)
    ]
)


@given(configurations, st.floats(0.001, 0.5), st.floats(0.001, 0.5))
def test_whatever_was_measured(found, first, second):
    frame, compared = tables(*found)
    strict, loose = (recommend(frame, compared, margin=m)[0] for m in sorted((first, second)))
    assert loose.chosen.experts <= strict.chosen.experts  # a wider margin never costs experts
    assert loose.chosen.worst <= 1 + max(first, second)
    for other in loose.candidates:
        if loose.chosen.adaptive and not other.adaptive:
            cheaper = other.experts <= loose.chosen.experts
            assert not (cheaper and other.log_ratio < loose.chosen.log_ratio)
