"""The gain affine restores the mean and deviation of each layer's routed output."""

from __future__ import annotations

import pytest
import torch

from lm_eval_bh import BHRoutingIntegration, Policy
from lm_eval_bh.routing.heard import calibration_batches


@pytest.fixture
def routing(tiny, tokenizer, demo_texts):
    return BHRoutingIntegration(
        tiny, rule="topk", max_k=2, affine=True, tokenizer=tokenizer, texts=demo_texts[:2]
    )


def outputs(model, batches):
    """Return the routed output of every layer, float64 ``[tokens, hidden]``."""
    found = [[] for _ in model.model.layers]
    handles = [
        layer.mlp.register_forward_hook(
            lambda module, args, output, parts=parts: parts.append(output.flatten(0, -2).double())
        )
        for layer, parts in zip(model.model.layers, found, strict=True)
    ]
    with torch.no_grad():
        for ids in batches:
            model(ids)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in found]


def test_with_it_every_layer_has_the_mean_and_deviation_of_the_full_model(
    tiny, tokenizer, demo_texts, routing
):
    batches = calibration_batches(tiny, tokenizer, demo_texts[:2])
    full = outputs(tiny, batches)
    with routing:
        aligned = outputs(tiny, batches)
    with BHRoutingIntegration(tiny, rule="topk", max_k=2):
        plain = outputs(tiny, batches)
    for wanted, found, without in zip(full, aligned, plain, strict=True):
        torch.testing.assert_close(found.mean(0), wanted.mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.std(0), wanted.std(0), rtol=1e-3, atol=1e-4)
        assert (without.std(0) / wanted.std(0) - 1).abs().max() > 0.05


def test_a_policy_keeps_it_and_unpatching_leaves_nothing(tiny, ids, routing, tmp_path):
    with torch.no_grad():
        stock = tiny(ids).logits
        with routing:
            expected = tiny(ids).logits
        assert torch.equal(tiny(ids).logits, stock)
        routing.policy().save(tmp_path / "policy.safetensors")
        policy = Policy.load(tmp_path / "policy.safetensors")
        with BHRoutingIntegration(tiny, policy=policy):
            assert torch.equal(tiny(ids).logits, expected)
    assert policy.digest() == routing.policy().digest()
    assert not any(module._forward_hooks for module in tiny.modules())
