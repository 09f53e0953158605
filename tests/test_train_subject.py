"""The recipe of the shipped models: its fast experts equal the stock ones, its biases balance."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SETTINGS = {
    "experts": 16,
    "intermediate": 8,
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "pad_token_id": 1,
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("train_subject")
    ALL_EXPERTS_FUNCTIONS.register("grouped_experts", module.grouped_experts)
    return module


@pytest.fixture
def windows():
    return torch.randint(0, 50, (6, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["olmoe", "glm4_moe"])
def model(request, script):
    torch.manual_seed(0)
    return getattr(script, request.param)(**SETTINGS)


def test_the_fast_experts_have_the_stock_loss_and_gradients(script, model, windows):
    found = {}
    for experts in ("eager", "grouped_experts"):
        model.set_experts_implementation(experts)
        model.zero_grad()
        loss = script.language_loss(model(input_ids=windows[:, :-1]).logits, windows)
        loss.backward()
        found[experts] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for stock, fast in zip(*found.values(), strict=True):
        torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-6)


def test_loads_are_counted_from_one_question_to_the_next_and_validation_hides_none(
    script, model, windows
):
    loads = script.Loads(model)
    each = 4 * windows[:, 1:].numel()  # 4 experts a token
    for _ in range(2):
        model(input_ids=windows[:, :-1])
        assert loads.take().sum(1).tolist() == [each, each]
        found = script.validate(model, loads, windows, text_bytes=500)
        assert len(found["dead_experts"]) == len(found["largest_load_over_mean"]) == 2
        assert min(found["largest_load_over_mean"]) >= 1


def test_a_bias_goes_up_below_the_mean_load_and_down_above_it(script):
    loads = script.Loads(script.glm4_moe(**SETTINGS))
    served = torch.full((2, 16), 5.0)
    served[0, 3], served[0, 7] = 4, 6
    loads.move_biases(served, 0.25)
    first, second = (gate.e_score_correction_bias for gate in loads.gates)
    assert (first[3], first[7]) == (0.25, -0.25)
    assert torch.count_nonzero(first) == 2
    assert torch.count_nonzero(second) == 0


def test_moving_biases_alone_evens_out_loads(script, windows):
    torch.manual_seed(0)
    model = script.glm4_moe(**SETTINGS)
    for block in model.model.layers:  # what a router that learns does to loads
        block.mlp.gate.weight.data *= 30
    loads = script.Loads(model)
    largest = []
    with torch.no_grad():
        for _ in range(200):
            model(input_ids=windows[:, :-1])
            served = loads.take()
            largest.append(float((served.amax(1) / served.mean(1)).max()))
            loads.move_biases(served, 3e-3)
    assert largest[0] > 1.5
    assert largest[-1] < 1.3
