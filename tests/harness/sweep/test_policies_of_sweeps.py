"""Policies are configurations of a sweep, run by the loaded model."""

from __future__ import annotations

import json

import pytest
import torch

from lm_eval_bh.analysis.table.experiments import load_experiments
from lm_eval_bh.errors import PolicyError
from lm_eval_bh.harness.logs.log_options import LogOptions
from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.policy import Policy


def test_a_policy_stands_beside_static_top_k(run, tmp_path):
    arguments = ["--tasks", "bh_demo_wikitext", "--limit", 2, "--device", "cpu", "--baselines", 8]
    command = ["sweep", "--model", "tiny-olmoe", "--output-dir", tmp_path, *arguments]
    code, _, err = run(*command, "--policies", "tiny-olmoe")
    assert code == 0, err
    frame = load_experiments([tmp_path]).frame.set_index("config_name")
    policy = Policy.load("tiny-olmoe")
    assert set(frame.index) == {
        "8experts_topk_baseline",
        "8experts_min_w_target_4_benefit_mass_02",
    }
    row = frame.loc["8experts_min_w_target_4_benefit_mass_02"]
    assert 3 < row["avg_experts"] < 5
    assert row["word_perplexity"] > frame.loc["8experts_topk_baseline", "word_perplexity"]
    (file,) = tmp_path.glob("runs/*policy*/*/results_*.json")
    config = json.loads(file.read_text())["config"]
    assert config["model_args"]["policy"] == "tiny-olmoe"
    assert config["bh"]["config"]["statistic"] == policy.config.statistic
    code, out, _ = run(*command, "--policies", "tiny-olmoe")
    assert code == 0
    assert "2 of 2 experiments are done" in out


@torch.no_grad()
def test_rerouting_goes_back_and_forth():
    ids = torch.randint(3, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
    lm = BHLM("tiny-olmoe", alpha=0.4, device="cpu")
    policy, options = Policy.load("tiny-olmoe"), LogOptions("off", None, None)
    before = lm.model(ids).logits
    lm.reroute(policy, options)
    assert lm.routing_config == policy.config
    with_policy = lm.model(ids).logits
    assert not with_policy.equal(before)
    with pytest.raises(PolicyError, match="was made for"):
        lm.reroute(Policy(RoutingConfig(rule="topk", max_k=3), "0" * 64, 4, 64, 8), options)
    assert lm.model(ids).logits.equal(with_policy)
    lm.reroute(RoutingConfig(alpha=0.4), options)
    assert lm.model(ids).logits.equal(before)
