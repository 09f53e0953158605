"""On CUDA "auto" measures up to how many tokens copies of the weights are the faster way."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from lm_eval_bh.routing.patching import experts_choice
from lm_eval_bh.routing.patching.experts_choice import batched_up_to, measurable
from lm_eval_bh.routing.patching.experts_switch import ExpertsSwitch

WAYS = ["grouped_mm_experts_forward", "batched_mm_experts_forward"]


@pytest.fixture
def experts(monkeypatch):
    """Give an experts module that knows unused slots, and forget earlier measurements."""
    monkeypatch.setattr(experts_choice, "_known", {})
    config = OlmoeConfig(hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_experts=8)
    config.vocab_size = 16
    model = OlmoeForCausalLM(config).eval()
    switch = ExpertsSwitch(model, "auto", unused_slots=True, slots=4)
    yield model.model.layers[0].mlp.experts
    switch.restore(model)


@pytest.mark.parametrize(("slow", "wanted"), [(WAYS[0], 8), (WAYS[1], 0)])
def test_the_faster_way_is_found_with_real_weights(slow, wanted, experts, monkeypatch):
    real, results = getattr(experts_choice, slow), {name: [] for name in WAYS}

    def slowed(*args):
        time.sleep(0.002)
        results[slow].append(real(*args))
        return results[slow][-1]

    other = next(name for name in WAYS if name != slow)
    quick = getattr(experts_choice, other)

    def kept(*args):
        results[other].append(quick(*args))
        return results[other][-1]

    monkeypatch.setattr(experts_choice, slow, slowed)
    monkeypatch.setattr(experts_choice, other, kept)
    assert batched_up_to(experts, 4) == wanted
    for one, another in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, another)
    calls = len(results[slow])
    assert batched_up_to(experts, 4) == wanted
    assert len(results[slow]) == calls  # once a process


def test_a_real_measurement_finds_a_number_of_tokens(experts):
    assert batched_up_to(experts, 4) in (0, *experts_choice.TOKENS)


def test_what_would_copy_too_much_is_not_tried(experts, monkeypatch):
    monkeypatch.setattr(experts_choice, "MOST_BYTES", 4 * 3 * 32 * 16 * 4)  # one token's four slots
    monkeypatch.setattr(experts_choice, WAYS[0], lambda *args: time.sleep(0.002))
    assert batched_up_to(experts, 4) == 1


def test_nothing_is_measured_without_cuda(experts):
    assert not hasattr(experts, "_batched_up_to")
    assert not measurable(experts)
    assert not measurable(nn.Linear(2, 2, device="meta"))
