"""BHRoutingIntegration on tiny-olmoe: its effects, its limits, and its removal."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lm_eval_bh import (
    BHRoutingIntegration,
    ModelError,
    NullModel,
    ParameterError,
    RoutingConfig,
    RoutingError,
)
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.patching.hook import RouterHook
from lm_eval_bh.routing.routers import find_routers

STOCK_EXPERTS = ["eager", "grouped_mm", "batched_mm"]
TESTS = [name for name, rule in METHODS.items() if rule.tests and not rule.joint]


def hooks(model) -> list:
    """Every hook of any kind in any module of the model."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    )
    return [
        hook
        for module in model.modules()
        for kind in kinds
        for hook in getattr(module, kind).items()
    ]


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def reference(model, ids, null, *, alpha, rule, min_k, max_k, temperature=1.0, renormalize=False):
    """Run the whole model in float64, looping over tokens and experts, on direct p-values."""
    from lm_eval_bh.routing.selection import reject

    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")
    handles, counts = [], []

    def slow_experts(layer):
        router, experts = model.model.layers[layer].mlp.gate, model.model.layers[layer].mlp.experts

        def forward(module, args, output):
            (hidden,) = args
            flat = hidden.reshape(-1, hidden.shape[-1])
            z = flat @ router.weight.T
            rejected = reject(null.p_values(layer, z), alpha, rule).sum(-1)
            out = torch.zeros_like(flat)
            for token, row in enumerate(z):
                count = int(rejected[token].clamp(min_k, max_k))
                chosen = row.argsort(descending=True)[:count]
                weights = torch.softmax(row / temperature, -1)[chosen]
                if renormalize:
                    weights = weights / weights.sum()
                counts.append(count)
                for expert, weight in zip(chosen.tolist(), weights, strict=True):
                    gate, up = (experts.gate_up_proj[expert] @ flat[token]).chunk(2)
                    out[token] += weight * (
                        experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                    )
            return out.reshape(hidden.shape)

        return forward

    for layer, block in enumerate(model.model.layers):
        handles.append(block.mlp.register_forward_hook(slow_experts(layer)))
    try:
        return logits(model, ids), counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("rule", TESTS)
@pytest.mark.parametrize("experts", ["ragged", *STOCK_EXPERTS])
def test_patched_model_equals_a_slow_reference(tiny, null, ids, rule, experts):
    ids = ids[:, :12]
    parameters = {"alpha": 0.5, "rule": rule, "min_k": 1, "max_k": 6}
    expected, counts = reference(tiny, ids, null, **parameters)
    if experts not in ("grouped_mm", "batched_mm"):  # whose kernels know no float64
        tiny.double()
    with BHRoutingIntegration(tiny, kde=null, experts=experts, **parameters) as routing:
        torch.testing.assert_close(logits(tiny, ids), expected.to(tiny.dtype), rtol=1e-4, atol=1e-4)
        assert routing.get_routing_stats()["mean_experts_per_token"] == pytest.approx(
            sum(counts) / len(counts)
        )


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.5}, {"renormalize": True}, {"max_k": 12}, {"max_k": 3}]
)
def test_weights_follow_their_parameters(tiny, null, ids, changes):
    ids = ids[:, :12]
    parameters = {"alpha": 0.5, "rule": "bh", "min_k": 2, "max_k": 8} | changes
    expected, _ = reference(tiny, ids, null, **parameters)
    with BHRoutingIntegration(tiny, kde=null, **parameters):
        torch.testing.assert_close(logits(tiny, ids).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", STOCK_EXPERTS)
@pytest.mark.parametrize("k", [8, 4, 16])
def test_equal_bounds_are_the_stock_model_with_top_k_bit_for_bit(
    tiny_model_folder, null, ids, dtype, implementation, k
):
    stock, patched = (
        AutoModelForCausalLM.from_pretrained(
            tiny_model_folder, dtype=dtype, experts_implementation=implementation
        )
        for _ in range(2)
    )
    for block in stock.model.layers:
        block.mlp.gate.top_k = k
    with BHRoutingIntegration(patched, alpha=0.4, min_k=k, max_k=k, kde=null):
        assert torch.equal(logits(patched, ids), logits(stock, ids))
    with BHRoutingIntegration(patched, rule="topk", max_k=k):
        assert torch.equal(logits(patched, ids), logits(stock, ids))


def test_bh_selects_fewer_experts_for_some_tokens_than_for_others(tiny, null, ids):
    means = []
    for alpha in (0.3, 0.4, 0.5, 0.6):
        with BHRoutingIntegration(tiny, alpha=alpha, kde=null) as routing:
            logits(tiny, ids)
            stats = routing.get_routing_stats()
        assert stats["std_experts_per_token"] > 0
        assert stats["sparsity_gain"] == pytest.approx(1 - stats["mean_experts_per_token"] / 8)
        means.append(stats["mean_experts_per_token"])
    assert 1 < means[0] < means[1] < means[2] < means[3] < 8


def test_analyze_mode_changes_no_bit_and_counts_what_patch_mode_would_select(tiny, null, ids):
    before = logits(tiny, ids)
    with BHRoutingIntegration(tiny, alpha=0.4, kde=null, mode="analyze") as routing:
        assert torch.equal(logits(tiny, ids), before)
        stats = routing.get_routing_stats()
    assert stats["mean_experts_per_token"] == 8
    assert 1 < stats["bh_would_select_mean"] < 8
    # In the first layer nothing upstream differs yet, so there the two modes must agree exactly.
    with BHRoutingIntegration(tiny, alpha=0.4, kde=null, layers="0", mode="analyze") as watched:
        logits(tiny, ids)
    with BHRoutingIntegration(tiny, alpha=0.4, kde=null, layers="0") as patched:
        logits(tiny, ids)
    assert watched.counters.mean(0) == patched.counters.mean(0)


@pytest.mark.parametrize("mode", ["patch", "analyze"])
@pytest.mark.parametrize("experts", ["auto", "ragged", *STOCK_EXPERTS])
def test_unpatching_leaves_no_trace(tiny, null, ids, mode, experts):
    before, found, implementation = (
        logits(tiny, ids),
        hooks(tiny),
        tiny.get_experts_implementation(),
    )
    with BHRoutingIntegration(tiny, alpha=0.4, kde=null, mode=mode, experts=experts):
        assert hooks(tiny) != found
    assert hooks(tiny) == found
    assert tiny.get_experts_implementation() == implementation
    assert not any(getattr(module, "_is_expert_parallel", False) for module in tiny.modules())
    assert torch.equal(logits(tiny, ids), before)


def test_unpatching_happens_after_an_exception_too(tiny, null, ids):
    found = hooks(tiny)
    with pytest.raises(KeyError), BHRoutingIntegration(tiny, kde=null):
        raise KeyError("in the user's code")
    assert hooks(tiny) == found


def test_a_failed_patch_is_rolled_back(tiny, null):
    found = hooks(tiny)
    routing = BHRoutingIntegration(tiny, kde=null)
    routing.null_model = NullModel.fit({0: torch.randn(500, 64)})  # knows one layer of four
    with pytest.raises(ParameterError):
        routing.patch_model()
    assert hooks(tiny) == found


def test_patching_twice_is_refused_and_leaves_the_first_in_place(tiny, null, ids):
    with BHRoutingIntegration(tiny, kde=null) as first:
        found = hooks(tiny)
        with pytest.raises(ModelError, match="patched already"):
            first.patch_model()
        with pytest.raises(ModelError, match="patched already"):
            BHRoutingIntegration(tiny, kde=null).patch_model()
        assert hooks(tiny) == found
        logits(tiny, ids)


def test_only_the_layers_asked_for_are_patched(tiny, null, ids):
    with BHRoutingIntegration(tiny, alpha=0.4, kde=null, layers="last2") as routing:
        patched = [
            layer
            for layer, router in enumerate(find_routers(tiny))
            if any(isinstance(hook, RouterHook) for hook in router.module._forward_hooks.values())
        ]
        logits(tiny, ids)
    assert patched == routing.layers == [2, 3]
    assert [routing.counters.tokens(layer) for layer in range(4)] == [0, 0, 80, 80]


def test_reconfiguring_is_the_same_as_patching_anew(tiny, null, ids):
    with BHRoutingIntegration(tiny, alpha=0.6, kde=null) as routing:
        logits(tiny, ids)
        routing.configure(RoutingConfig(alpha=0.3, max_k=4))
        again = logits(tiny, ids)
        stats = routing.get_routing_stats()
        with pytest.raises(ParameterError, match="64 experts"):
            routing.configure(RoutingConfig(max_k=65))
        assert torch.equal(logits(tiny, ids), again)
    with BHRoutingIntegration(tiny, alpha=0.3, max_k=4, kde=null) as fresh:
        assert torch.equal(logits(tiny, ids), again)
        assert fresh.get_routing_stats() == stats


@pytest.mark.parametrize("experts", ["ragged", "eager", "grouped_mm"])
def test_generate_with_a_cache_equals_recomputing_every_token(tiny, null, ids, experts):
    prompt = ids[:1, :10]
    with BHRoutingIntegration(tiny, alpha=0.5, kde=null, experts=experts), torch.no_grad():
        cached = tiny.generate(
            prompt, max_new_tokens=12, do_sample=False, use_cache=True, eos_token_id=-1
        )
        plain = prompt
        for _ in range(12):
            plain = torch.cat([plain, tiny(plain).logits[:, -1:].argmax(-1)], -1)
    assert torch.equal(cached, plain)


def test_padding_never_counts(tiny, null, ids):
    masked = torch.ones_like(ids)
    masked[1, :15] = 0  # padded on the left, as for generation
    padded = ids.masked_fill(masked == 0, 1)
    with BHRoutingIntegration(tiny, alpha=0.5, kde=null) as routing:
        logits(tiny, padded, attention_mask=masked)
        assert routing.counters.tokens(0) == 80 - 15
        batched = [h.clone() for h in routing.counters.histogram]
        routing.reset_stats()
        logits(tiny, ids[:1])
        position = (masked[1:].cumsum(-1) - 1).clamp(min=0)[:, 15:]
        logits(tiny, ids[1:, 15:], position_ids=position)
        assert all(
            torch.equal(a, b) for a, b in zip(batched, routing.counters.histogram, strict=True)
        )
        routing.reset_stats()
        tiny.generate(
            padded, attention_mask=masked, max_new_tokens=5, do_sample=False, eos_token_id=-1
        )
        assert routing.counters.tokens(0) == 80 - 15 + 2 * 4


def test_gradients_reach_the_router_through_the_selected_weights(tiny, null, ids):
    with BHRoutingIntegration(tiny, alpha=0.5, kde=null):
        loss = tiny(ids, labels=ids).loss
        loss.backward()
    for router in find_routers(tiny):
        assert router.weight.grad is not None
        assert router.weight.grad.isfinite().all()
        assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("experts", STOCK_EXPERTS)
def test_gradients_are_those_of_every_stock_experts_implementation(tiny, null, ids, experts):
    gradients = []
    for implementation in ("ragged", experts):
        tiny.zero_grad()
        with BHRoutingIntegration(tiny, alpha=0.5, kde=null, experts=implementation):
            tiny(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in tiny.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_patched_model_can_be_copied_and_saved(tiny, null, ids, tmp_path):
    with BHRoutingIntegration(tiny, alpha=0.4, kde=null):
        expected = logits(tiny, ids)
        twin = copy.deepcopy(tiny)
        torch.save(tiny, tmp_path / "model.pt")
        tiny.save_pretrained(tmp_path / "pretrained")
    assert torch.equal(logits(twin, ids), expected)
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False), ids), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained", dtype=torch.float32)
    assert torch.equal(logits(plain, ids), logits(tiny, ids))


def test_router_logits_are_still_returned(tiny, null, ids):
    with torch.no_grad():
        before = tiny(ids, output_router_logits=True).router_logits
        with BHRoutingIntegration(tiny, alpha=0.4, kde=null):
            after = tiny(ids, output_router_logits=True).router_logits
    assert len(after) == len(before) == 4
    assert torch.equal(after[0], before[0])


def test_nan_logits_name_their_layer(tiny, null, ids):
    with torch.no_grad():
        tiny.model.layers[2].mlp.gate.weight[5, 0] = float("nan")
    with BHRoutingIntegration(tiny, rule="topk"), pytest.raises(RoutingError, match="layer 2"):
        logits(tiny, ids)


def test_a_dense_model_is_refused():
    dense = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=32,
        )
    )
    with pytest.raises(ModelError, match="no MoE routers"):
        BHRoutingIntegration(dense)


def test_a_null_model_of_another_router_is_refused_naming_both(tiny, null, ids):
    with torch.no_grad():
        tiny.model.layers[0].mlp.gate.weight.add_(0.1)
    tiny.config._name_or_path = tiny.name_or_path = "another/model"
    with pytest.raises(ParameterError.__mro__[1], match="another/model") as caught:
        BHRoutingIntegration(tiny, kde=null)
    assert "tiny-olmoe" in str(caught.value)


def test_the_null_model_is_found_by_fingerprint_in_either_dtype(tiny_model_folder, null):
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=dtype)
        assert BHRoutingIntegration(model).null_model.header == null.header


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"max_k": 65}, "64 experts"),
        ({"layers": "0-9"}, "4 MoE layers"),
        ({"experts": "fast"}, "experts_implementation must be one of .* found 'fast'"),
        ({"mode": "watch"}, "mode must be patch or analyze: found 'watch'"),
        ({"kde": "nowhere.safetensors"}, "does not exist"),
    ],
)
def test_bad_arguments_are_one_sentence_and_change_nothing(tiny, arguments, sentence):
    found = hooks(tiny)
    with pytest.raises(ValueError, match=sentence):
        BHRoutingIntegration(tiny, **arguments)
    assert hooks(tiny) == found


def test_a_compiled_model_is_refused(tiny, null):
    with pytest.raises(ModelError, match=r"before torch\.compile"):
        BHRoutingIntegration(torch.compile(tiny, backend="eager"), kde=null)


def test_a_pass_that_failed_midway_does_not_spoil_the_next(tiny, null, ids):
    expected = logits(tiny, ids)
    router = tiny.model.layers[0].mlp.gate

    def fail(module, args):
        raise MemoryError("in the last layer")

    with BHRoutingIntegration(tiny, rule="topk"):
        healthy = router.weight.clone()
        handle = tiny.model.layers[3].register_forward_pre_hook(fail)
        with torch.no_grad():
            router.weight[0, 0] = float("nan")
            with pytest.raises(MemoryError):
                tiny(ids)
            router.weight.copy_(healthy)
        handle.remove()
        assert torch.equal(logits(tiny, ids), expected)
