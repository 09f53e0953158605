"""Tests for every device; LM_EVAL_BH_DEVICE names it, and scripts/gpu_day.sh runs them.

On a CPU these are tests like any other. On another device its results are compared with the CPU's.
"""

from __future__ import annotations

import os

import pytest
import torch
from lm_eval import simple_evaluate
from transformers import AutoModelForCausalLM

from lm_eval_bh import BHRoutingIntegration, NullModel, select_experts
from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.harness.sweep.task_names import new_task_manager
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.speed.phase import SpeedSettings, measure

DEVICE = torch.device(os.environ.get("LM_EVAL_BH_DEVICE", "cpu"))
TASK = "bh_demo_lambada"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def null():
    return NullModel.load(shipped("kde_models") / "tiny-olmoe.safetensors")


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 4000, (3, 40), generator=generator)


def model_on(device, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=dtype).to(device).eval()


@pytest.mark.parametrize("rule", ["bh", "by", "holm", "storey", "topk", "top_p", "min_p", "min_w"])
def test_a_selection_is_that_of_the_cpu(rule, null):
    """The same logits give the same experts, and weights equal to rounding."""
    logits = 2 * torch.randn(500, 64, generator=torch.Generator().manual_seed(1))
    options = {"layer": 0, "rule": rule, "max_k": 8}
    options |= {} if rule == "topk" else {"alpha": 0.05 if rule == "min_w" else 0.4}
    ours = select_experts(logits.to(DEVICE), null, **options)
    theirs = select_experts(logits, null, **options)
    assert ours.indices.device.type == DEVICE.type
    same = (ours.indices.cpu() == theirs.indices).all(-1)
    # The last digit of a softmax differs between devices, and so may experts at a threshold.
    assert same.float().mean() >= (0.99 if rule in ("top_p", "min_p", "min_w") else 1.0)
    torch.testing.assert_close(ours.weights.cpu()[same], theirs.weights[same])


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_with_min_k_and_max_k_at_the_model_s_own_nothing_changes(dtype, ids):
    model = model_on(DEVICE, dtype)
    before = model(ids.to(DEVICE)).logits
    with BHRoutingIntegration(model, alpha=0.4, min_k=8, max_k=8):
        assert torch.equal(model(ids.to(DEVICE)).logits, before)
    assert torch.equal(model(ids.to(DEVICE)).logits, before)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_ragged_experts_compute_what_one_expert_after_the_other_does(dtype, ids):
    model = model_on(DEVICE, dtype)
    logits = {}
    for experts in ("ragged", "eager"):
        with BHRoutingIntegration(model, alpha=0.4, experts_implementation=experts) as routing:
            logits[experts] = model(ids.to(DEVICE)).logits.float()
            assert 1 < routing.get_routing_stats()["mean_experts_per_token"] < 8
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
    torch.testing.assert_close(logits["ragged"], logits["eager"], **close)


@torch.no_grad()
def test_decoding_with_a_cache_writes_what_reading_it_again_says(ids):
    model = model_on(DEVICE)
    with BHRoutingIntegration(model, alpha=0.4):
        written = model.generate(ids.to(DEVICE), max_new_tokens=8, do_sample=False, pad_token_id=1)
        again = model(written[:, :-1]).logits[:, ids.shape[1] - 1 :].argmax(-1)
    assert (again == written[:, ids.shape[1] :]).float().mean() > 0.9


def test_an_evaluation_counts_as_on_the_cpu():
    tasks = {"tasks": [TASK], "task_manager": new_task_manager(defaults=False)}
    found = {}
    for device in {"cpu", str(DEVICE)}:
        arguments = {"pretrained": "tiny-olmoe", "alpha": 0.4, "dtype": "float32"}
        lm = BHLM.create_from_arg_obj(arguments, {"device": device, "batch_size": 4})
        results = simple_evaluate(lm, **tasks, limit=8, bootstrap_iters=0)
        found[device] = results["config"]["bh"]["summary"]
    ours, theirs = found[str(DEVICE)], found["cpu"]
    assert ours["tokens"] == theirs["tokens"]
    assert ours["seconds"] > 0
    means = ours["mean_experts_per_token"], theirs["mean_experts_per_token"]
    assert means[0] == pytest.approx(means[1], abs=0.01)


def test_the_speed_phase_runs():
    arguments = {"pretrained": "tiny-olmoe", "rule": "topk", "max_k": 1, "log_routing": "off"}
    lm = BHLM.create_from_arg_obj(arguments, {"device": str(DEVICE)})
    tasks = new_task_manager(defaults=False).load([TASK])["tasks"]
    few = SpeedSettings(rounds=7, batches=1, documents=2, prompt=2, steps=1, array=2**20)
    found = measure(lm, "tiny-olmoe", tasks, [{"alpha": 0.4}], batch_size=2, settings=few)
    assert len(found["rounds"]) == 7
    assert found["dtype"] == str(lm.model.dtype).removeprefix("torch.")
