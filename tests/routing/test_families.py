"""Routers of other families, with tiny random models: their own scores are kept."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lm_eval_bh import BHRoutingIntegration, NullModel, ParameterError
from lm_eval_bh.routing.nulls.calibration import collect_router_logits
from lm_eval_bh.routing.routers import find_routers

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 4,
}
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 8}),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {"num_experts": 8, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 8, "norm_topk_prob": True}),
    "flex_olmo": (FlexOlmoForCausalLM, FlexOlmoConfig, {"num_experts": 8, "pad_token_id": 0}),
    "granitemoe": (GraniteMoeForCausalLM, GraniteMoeConfig, {"num_local_experts": 8}),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"num_local_experts": 8, "layer_types": ["full_attention"] * 2},
    ),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {
            "n_routed_experts": 8,
            "num_local_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "head_dim": 8,
        },
    ),
}
SOFTMAX = {"mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo"}
NORMALIZING = {"mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "deepseek_v3"}


@pytest.fixture(params=FAMILIES)
def family(request):
    """Yield (name, model, ids, null) of a tiny random model."""
    torch.manual_seed(0)
    model_class, config_class, extra = FAMILIES[request.param]
    model = model_class(config_class(**COMMON | extra)).eval()
    for router in find_routers(model):
        torch.nn.init.normal_(router.weight, std=0.3)
    ids = torch.randint(2, 64, (2, 20))
    logits = collect_router_logits(
        model, [r.module for r in find_routers(model)], [ids], progress=False
    )
    return request.param, model, ids, NullModel.fit(logits)


def test_routers_are_described_rightly(family):
    name, model, _, _ = family
    routers = find_routers(model)
    assert len(routers) == 2
    assert {(r.num_experts, r.top_k) for r in routers} == {(8, 4)}
    assert {r.softmax for r in routers} == {name in SOFTMAX}
    assert {r.normalizes for r in routers} == {name in NORMALIZING}


def test_a_softmax_router_is_one(family):
    """The list of softmax routers is a claim about other people's code, so it is checked."""
    name, model, _, _ = family
    for router in find_routers(model):
        logits, weights, indices = router.module(torch.randn(50, 32))
        scores = torch.softmax(logits.float(), -1)
        top, expected = scores.topk(4, -1)
        if router.normalizes:
            top = top / top.sum(-1, keepdim=True)
        same = torch.equal(indices, expected) and torch.allclose(weights.float(), top)
        assert same or name not in SOFTMAX


def test_the_model_own_top_k_is_unchanged_bit_for_bit(family):
    _, model, ids, null = family
    with torch.no_grad():
        expected = model(ids).logits
        for arguments in ({"rule": "topk"}, {"min_k": 4, "kde": null}):
            with BHRoutingIntegration(model, max_k=4, **arguments):
                assert torch.equal(model(ids).logits, expected)


def test_fewer_experts_keep_the_scores_of_the_router(family):
    """What is kept has the router's own weights, rescaled as it rescales; the rest is nothing."""
    _, model, ids, null = family
    seen = []
    experts = "auto"
    with BHRoutingIntegration(model, alpha=0.5, max_k=4, kde=null, experts=experts) as routing:
        for router, hook in zip(routing.routers, routing._hooks, strict=True):
            hidden = torch.randn(50, 32)
            handle = hook.router.module._forward_hooks
            output = router.module(hidden)
            saved, own_hooks = dict(handle), handle
            own_hooks.clear()
            own = router.module(hidden)
            own_hooks.update(saved)
            seen.append((output, own, router))
        with torch.no_grad():
            assert model(ids).logits.isfinite().all()
        assert routing.get_routing_stats()["mean_experts_per_token"] < 4
    for (logits, weights, indices), (own_logits, own_weights, own_indices), router in seen:
        assert torch.equal(logits, own_logits)
        dense, own_dense = torch.zeros(50, 9), torch.zeros(50, 9)
        dense.scatter_(1, indices, weights.float())
        own_dense.scatter_(1, own_indices, own_weights.float())
        kept = dense[:, :8] > 0
        assert (kept.sum(-1) >= 1).all()
        assert (kept.sum(-1) < 4).any()
        assert not (kept & (own_dense[:, :8] == 0)).any()
        expected = own_dense[:, :8] * kept
        if router.normalizes:
            expected *= own_dense.sum(-1, keepdim=True) / expected.sum(-1, keepdim=True)
        torch.testing.assert_close(dense[:, :8], expected)


def test_scores_that_are_no_softmax_are_never_made_up(family):
    name, model, _, null = family
    if name in SOFTMAX:
        with BHRoutingIntegration(model, alpha=0.5, max_k=6, kde=null, temperature=2.0):
            return
    with pytest.raises(ParameterError, match="at most 4"):
        BHRoutingIntegration(model, max_k=6, kde=null)
    with pytest.raises(ParameterError, match="leave it at 1"):
        BHRoutingIntegration(model, max_k=4, kde=null, temperature=2.0)
