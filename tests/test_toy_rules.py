"""A rule is one row: two that exist in this file alone go all the way from router to report."""

import pandas as pd
import pytest
from torch import Tensor

from lm_eval_bh.harness.sweep import runner
from lm_eval_bh.harness.sweep.sweep_config import SweepConfig
from lm_eval_bh.routing.methods import METHODS, Rule


def above_mean(scores, alpha: float, thresholds: Tensor | None) -> Tensor:
    """Take the experts whose weight is at least alpha times the mean weight, and at least one."""
    weights = scores.weights
    return (weights >= alpha * weights.mean(-1, keepdim=True)).sum(-1)


TOY = Rule("toy_mean", "toy mean", "this test", "share of the mean weight", above_mean)
TOY_FIXED = Rule("toy_k", "toy-k", "this test")


@pytest.fixture
def toys(monkeypatch):
    for rule in (TOY, TOY_FIXED):
        monkeypatch.setitem(METHODS, rule.name, rule)


def test_two_toy_rules_from_hf_bh_to_the_report(toys, tmp_path, run):
    config = SweepConfig(
        pretrained="tiny-olmoe",
        tasks=("bh_demo_lambada",),
        baselines=(8,),
        max_k=(8,),
        alphas=(0.9,),
        rules=("toy_mean", "toy_k"),
        limit=4,
    )
    runner.run(runner.plan(config, tmp_path), device="cpu", say=lambda line: None)

    code, out, _ = run("aggregate", tmp_path, "--resamples", 99)
    assert code == 0
    table = pd.read_csv(tmp_path / "bh_routing_results.csv").set_index("rule")
    assert table.loc["toy_mean", "strategy"] == "toy mean a=0.90, max 8"
    assert table.loc["toy_k", "strategy"] == "toy-8"
    assert table.loc["toy_mean", "adaptive"]
    assert 1 <= table.loc["toy_mean", "avg_experts"] < 8
    assert not table.loc["toy_k", "adaptive"]
    assert pd.isna(table.loc["toy_k", "alpha"])
    assert table.loc["toy_k", "avg_experts"] == 8
    # All of them serve the eight largest logits, so top-k's numbers are theirs.
    assert table.loc["toy_k", "accuracy"] == table.loc["topk", "accuracy"]
    assert "toy mean a=0.90" in out

    assert run("plot", tmp_path, "--panel", "pareto", "--output", tmp_path / "pareto.png")[0] == 0
    assert run("report", tmp_path, "--resamples", 99)[0] == 0
    report = (tmp_path / "bh_routing_report.md").read_text()
    assert "toy mean a=0.90, max 8" in report
    assert "toy-8" in report
