"""A method is one file: two test methods work in hf-bh and in a folder without the package."""

import importlib
import subprocess
import sys

import lm_eval
import pandas as pd
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from lm_eval_bh import BHRoutingIntegration, ParameterError, RoutingConfig
from lm_eval_bh.harness.sweep import runner
from lm_eval_bh.harness.sweep.sweep_config import SweepConfig
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.routing import methods
from lm_eval_bh.routing.methods import METHODS

FILES = {
    "toy_mean": '''"""The experts above the token's mean weight, and some to spare."""

import torch

from .base import SCORED
from .declare import Parameter, integer, level
from .shares import Shares


class ToyMean(Shares):
    """Take the experts whose weight is at least alpha times the mean, and ``spare`` more."""

    name, label, source, alpha = "toy_mean", "toy mean", "this test", "share of the mean weight"
    declared = SCORED | {
        "alpha": level(alpha),
        "spare": Parameter(0, "how many more", *integer("a number of experts", 0)),
    }

    def count(self, ranked, level):
        """Return how many weigh enough, int64 ``[tokens]``."""
        weights = torch.softmax(ranked, dim=-1)
        enough = weights >= level.to(weights) * weights.mean(-1, keepdim=True)
        return enough.sum(-1) + self.settings["spare"]
''',
    "toy_k": '''"""A fixed count needs no function."""

from .topk import TopK


class ToyK(TopK):
    """Static top-k under another name."""

    name, label, source = "toy_k", "toy-k", "this test"
''',
}
IDS = torch.arange(5, 65).reshape(2, 30)

# What runs where this package cannot be imported.
ELSEWHERE = """
import sys
sys.modules["lm_eval_bh"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, dtype=torch.float32
)
with torch.no_grad():
    torch.save(model(torch.arange(5, 65).reshape(2, 30)).logits, sys.argv[2])
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Add files to the folder of methods for the duration of a test."""
    folder = tmp_path / "methods"
    folder.mkdir()
    known = dict(METHODS)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    modules = [f"{methods.__name__}.{name}" for name in FILES]
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
        importlib.import_module(f"{methods.__name__}.{name}")
    yield
    METHODS.clear()
    METHODS.update(known)
    for name in modules:
        del sys.modules[name]
        delattr(methods, name.rpartition(".")[2])


def test_two_toys_from_a_sweep_to_the_report(toys, tmp_path, run):
    config = SweepConfig(
        pretrained="tiny-olmoe",
        tasks=("bh_demo_lambada",),
        baselines=(8,),
        max_k=(8,),
        alphas=(0.9,),
        rules=("toy_mean", "toy_k"),
        limit=4,
    )
    folder = tmp_path / "sweep"
    runner.run(runner.plan(config, folder), device="cpu", say=lambda line: None)

    code, out, _ = run("aggregate", folder, "--resamples", 99)
    assert code == 0
    table = pd.read_csv(folder / "bh_routing_results.csv").set_index("rule")
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

    assert run("report", folder, "--panel", "pareto", "--output", tmp_path / "pareto.png")[0] == 0
    assert run("report", folder, "--resamples", 99)[0] == 0
    report = (folder / "bh_routing_report.md").read_text()
    assert "toy mean a=0.90, max 8" in report
    assert "toy-8" in report


def test_its_own_parameter_is_known_to_it_alone(toys):
    assert RoutingConfig(rule="toy_mean", spare=2).as_dict()["spare"] == 2
    with pytest.raises(ParameterError, match="spare must be a number of experts: found -1"):
        RoutingConfig(rule="toy_mean", spare=-1)
    with pytest.raises(ParameterError, match="spare=1 has no meaning with rule=top_p"):
        RoutingConfig(rule="top_p", spare=1)


def test_its_own_parameter_in_hf_bh(toys):
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)
    means = []
    for spare in (0, 1):
        found = lm_eval.simple_evaluate(
            "hf-bh",
            model_args=f"pretrained={tiny_olmoe()},rule=toy_mean,alpha=0.9,max_k=32,spare={spare}",
            tasks=["bh_demo_wikitext"],
            task_manager=manager,
            limit=2,
            device="cpu",
            bootstrap_iters=0,
        )
        means.append(found["config"]["bh"]["summary"]["mean_experts_per_token"])
    assert means[1] == pytest.approx(means[0] + 1, abs=0.05)


def test_its_file_goes_with_an_exported_folder(toys, tmp_path, run):
    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=torch.float32)
    parameters = {"rule": "toy_mean", "alpha": 0.9, "max_k": 24, "spare": 1}
    with BHRoutingIntegration(model, **parameters) as routing, torch.no_grad():
        expected = model(IDS).logits
        assert routing.get_routing_stats()["std_experts_per_token"] > 0.5
    routing.policy().save(tmp_path / "toy.safetensors")
    out = tmp_path / "out"
    command = ["policy", "export", tmp_path / "toy.safetensors", "--to", "hf", "--output-dir", out]
    assert run(*command, "--model", "tiny-olmoe")[0] == 0
    assert (out / "toy_mean.py").read_text() == FILES["toy_mean"]
    found = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(out), str(found)], check=True)
    torch.testing.assert_close(torch.load(found), expected, rtol=0, atol=2e-5)
