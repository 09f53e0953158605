"""The state of a forward pass belongs to the pass: checkpointing, threads, caches, masks."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from lm_eval_bh import BHRoutingIntegration, RoutingConfig, RoutingError
from lm_eval_bh.routing.patching.query_mask import query_mask

PAD = 1


@pytest.fixture
def masks(ids):
    """Two masks of the same shape, padded on different sides of different rows."""
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :15] = 0
    right[1, 22:] = 0
    return left, right


def checkpointing(model, **arguments):
    """Switch transformers' activation checkpointing on, under the name that it has."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(arguments)
    return model.train()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def contrast(model, ids, masks):
    """Two forwards with different padding, one loss."""
    first, second = (
        model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].logsumexp(-1).mean()
        for mask in masks
    )
    return first - second


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("experts", ["ragged", "eager", "grouped_mm"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_gives_the_same_gradients_and_counts(
    tiny, null, ids, masks, reentrant, experts, when
):
    found = []
    for checkpointed in (False, True):
        tiny.zero_grad()
        if checkpointed and when == "before":
            checkpointing(tiny, use_reentrant=reentrant)
        with BHRoutingIntegration(tiny, alpha=0.5, kde=null, experts=experts) as routing:
            if checkpointed and when == "after":
                checkpointing(tiny, use_reentrant=reentrant)
            tiny.train()
            contrast(tiny, ids, masks).backward()
            found.append((gradients(tiny), routing.counters.histogram, routing.counters.usage))
    (plain, *counted), (recomputed, *counted_too) = found
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-8)
    for mine, theirs in zip(counted, counted_too, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert int(counted[0][0].sum()) == sum(int(mask.sum()) for mask in masks)
    for layer in tiny.model.layers:
        assert not type(getattr(layer, "_gradient_checkpointing_func", None)).__module__.startswith(
            "lm_eval_bh"
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_after_the_block_says_so(tiny, null, ids, reentrant):
    checkpointing(tiny, use_reentrant=reentrant)
    with BHRoutingIntegration(tiny, alpha=0.5, kde=null):
        loss = tiny(ids, labels=ids).loss
    with pytest.raises(RoutingError, match=r"call backward\(\) before the model is unpatched"):
        loss.backward()
    with BHRoutingIntegration(tiny, alpha=0.5, kde=null) as routing:
        loss = tiny(ids, labels=ids).loss
        routing.configure(RoutingConfig(alpha=0.6))
        with pytest.raises(RoutingError, match="configured anew"):
            loss.backward()


def test_backward_after_the_block_is_right_where_nothing_was_replaced(tiny, null, ids):
    checkpointing(tiny, use_reentrant=False)
    tiny(ids, labels=ids).loss.backward()
    expected = gradients(tiny)
    tiny.zero_grad()
    with BHRoutingIntegration(tiny, alpha=0.5, kde=null, mode="analyze") as routing:
        loss = tiny(ids, labels=ids).loss
    loss.backward()
    assert torch.equal(gradients(tiny), expected)
    assert routing.counters.tokens(0) == ids.numel()


def test_a_model_that_is_checkpointed_as_a_whole_is_counted_once(tiny, null, ids, masks):
    found = []
    with BHRoutingIntegration(tiny, alpha=0.5, kde=null) as routing:
        for wrap in (
            lambda run, *a: run(*a),
            lambda run, *a: checkpoint(run, *a, use_reentrant=False),
        ):
            tiny.zero_grad()
            routing.reset_stats()
            losses = [
                wrap(lambda mask: tiny(ids, attention_mask=mask).logits[mask.bool()].mean(), mask)
                for mask in masks
            ]
            sum(losses).backward()
            found.append((gradients(tiny), routing.counters.histogram[1]))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_checkpointing_that_is_not_transformers_own(tiny, null, ids, masks):
    """Without padding nothing needs to be stated; with padding, gradients would be wrong."""
    with BHRoutingIntegration(tiny, alpha=0.5, kde=null) as routing:
        tiny(ids, labels=ids, use_cache=False).loss.backward()
        expected, counted = gradients(tiny), routing.counters.histogram[2].clone()
        tiny.zero_grad()
        routing.reset_stats()
        for at, layer in enumerate(tiny.model.layers):
            tiny.model.layers[at] = checkpoint_wrapper(layer)
        tiny(ids, labels=ids, use_cache=False).loss.backward()
        torch.testing.assert_close(gradients(tiny), expected)
        assert torch.equal(routing.counters.histogram[2], counted)
        loss = contrast(tiny, ids, masks)
        with pytest.raises(RoutingError, match="the activation checkpointing of the model itself"):
            loss.backward()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("experts", ["ragged", "eager"])
def test_gradients_are_finite_differences(tiny, null, ids, experts, checkpointed):
    """In float64 along a random direction; the softmax of OLMoE's router stays float32."""
    tiny.double()
    if checkpointed:
        checkpointing(tiny, use_reentrant=False)
    generator = torch.Generator().manual_seed(0)
    parameters = [p for name, p in tiny.named_parameters() if "mlp" in name]
    directions = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.std() for p in parameters
    ]
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    step = 5e-4

    def loss():
        logits = tiny(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        scored = mask[:, 1:].bool()
        return torch.nn.functional.cross_entropy(logits[scored], ids[:, 1:][scored])

    with BHRoutingIntegration(tiny, alpha=0.5, kde=null, experts=experts) as routing:
        loss().backward()
        slope = sum(
            float((p.grad * d).sum().detach()) for p, d in zip(parameters, directions, strict=True)
        )
        values, usage = [], []
        with torch.no_grad():
            for sign in (1, -2):
                for p, d in zip(parameters, directions, strict=True):
                    p.add_(d, alpha=sign * step)
                routing.reset_stats()
                values.append(float(loss().detach()))
                usage.append(torch.stack(routing.counters.usage))
    assert torch.equal(*usage)  # selections are constant in so small a step
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=5e-3)


def test_all_ways_to_compute_experts_have_the_same_gradients(tiny, null, ids, masks):
    """Of every parameter in float64, checkpointed or not, with varying experts per token."""
    tiny.double()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpointing(tiny, use_reentrant=False)
        for experts in ("eager", "ragged"):
            tiny.zero_grad()
            with BHRoutingIntegration(tiny, alpha=0.5, kde=null, experts=experts) as routing:
                contrast(tiny, ids, masks).backward()
                assert routing.get_routing_stats()["std_experts_per_token"] > 0
            found.append({name: p.grad.clone() for name, p in tiny.named_parameters()})
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("experts", ["ragged", "eager"])
@pytest.mark.parametrize("models", [1, 2])
def test_threads_do_not_meet(tiny_model_folder, null, ids, masks, experts, models):
    """One patched model in two threads, or two models: padding of the other never interferes."""
    loaded = [
        AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        for _ in range(models)
    ]
    routings = [
        BHRoutingIntegration(model, alpha=alpha, kde=null, experts=experts).patch_model()
        for model, alpha in zip(loaded, (0.5, 0.3), strict=False)
    ]
    work = [(loaded[at % models], masks[at]) for at in range(2)]
    wrong: list[object] = []
    times = 25

    def run(model, mask):
        with torch.no_grad():
            return model(ids, attention_mask=mask).logits[mask.bool()]

    expected = [run(*each) for each in work]
    counted = [routing.counters.histogram[0].clone() for routing in routings]

    def repeat(at):
        try:
            for _ in range(times):
                if not torch.allclose(run(*work[at]), expected[at], atol=1e-4):
                    wrong.append(at)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=repeat, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for routing, once in zip(routings, counted, strict=True):
        assert torch.equal(routing.counters.histogram[0], once * (times + 1))


GENERATION = {
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
    "chunks": {"prefill_chunk_size": 7},
    "guidance": {"guidance_scale": 1.5},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


ONE_ROW = ("lookup", "assistant")  # transformers does them for one row only


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        *((how, 1) for how in (*GENERATION, "assistant")),
        *((how, 2) for how in GENERATION if how not in ONE_ROW),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_generation_of_every_kind_does_what_it_does_in_the_stock_model(
    tiny, tiny_model_folder, null, ids, how, rows
):
    """With 64 of 64 experts the patched model is another stock model, whatever runs it."""
    arguments = GENERATION.get(how) or {
        "assistant_model": AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    }
    mask = torch.ones_like(ids[:rows])
    mask[0, :5] = 0
    prompt = ids[:rows].masked_fill(mask == 0, PAD)
    common = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
    with BHRoutingIntegration(tiny, rule="topk", max_k=8):
        expected = tiny.generate(prompt, **common, **arguments)
    assert torch.equal(tiny.generate(prompt, **common, **arguments), expected)
    with BHRoutingIntegration(tiny, alpha=0.5, kde=null) as routing:
        tiny.generate(prompt, **common, **arguments)
        tokens = routing.counters.tokens(0)
    if how in ("static", "chunks"):
        assert tokens == int(mask.sum()) + 5 * rows
    else:
        assert tokens > 0


def test_a_static_cache_changes_no_count(tiny, null, ids):
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    prompt = ids.masked_fill(mask == 0, PAD)
    found = []
    for cache in (None, "static"):
        with BHRoutingIntegration(tiny, alpha=0.5, kde=null) as routing:
            output = tiny.generate(
                prompt,
                attention_mask=mask,
                max_new_tokens=5,
                do_sample=False,
                eos_token_id=None,
                cache_implementation=cache,
            )
            found.append((output, *routing.counters.histogram, *routing.counters.usage))
            assert routing.counters.tokens(0) == int(mask.sum()) + 2 * 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class TestQueryMask:
    """The tokens of a pass that an attention mask marks as real."""

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("kind", ["bool", "float", "dict"])
    @pytest.mark.parametrize("cached", [0, 3])
    def test_a_mask_in_four_dimensions_says_what_one_in_two_says(self, side, kind, cached):
        keys, length = 8, 5
        real = torch.ones(3, keys, dtype=torch.bool)
        real[1, slice(0, 5) if side == "left" else slice(5, None)] = False
        causal = torch.ones(keys, keys, dtype=torch.bool).tril()
        whole = (causal & real[:, None, :])[:, None, cached : cached + length]
        room = torch.nn.functional.pad(whole, (0, 4))  # of a static cache
        for mask in (whole[..., : cached + length], room):
            if kind == "float":
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            cache = type("Cache", (), {"get_seq_length": lambda _: torch.tensor(cached)})()
            given = {"full_attention": mask, "sliding": None} if kind == "dict" else mask
            found = query_mask(given, 3, length, cache)
            assert torch.equal(found, real[:, cached : cached + length])
        assert torch.equal(
            query_mask(real[:, : cached + length].long(), 3, length),
            real[:, cached : cached + length],
        )

    @pytest.mark.parametrize(
        "mask", [torch.ones(3, 4), torch.ones(2, 5), torch.ones(3, 5, 5), "flex", {}, {"a": None}]
    )
    def test_what_is_none_is_not_understood(self, mask):
        assert query_mask(mask, 3, 5) is None


class TestPaddingThatCannotBeTold:
    def test_is_told_once(self, tiny, null, ids, caplog):
        padded = ids.clone()
        padded[0, 30:] = PAD
        with BHRoutingIntegration(tiny, alpha=0.5, kde=null), caplog.at_level(logging.WARNING):
            for _ in range(3):
                tiny(padded)
        assert [r.getMessage().count("padding cannot be told") for r in caplog.records] == [1]

    def test_is_told_of_masks_that_are_not_understood(self, tiny, null, ids, caplog):
        with BHRoutingIntegration(tiny, alpha=0.5, kde=null) as routing:
            tiny.model.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
            )
            with caplog.at_level(logging.WARNING):
                tiny(ids, attention_mask=torch.ones(2, 7))
            assert routing.counters.tokens(0) == ids.numel()
        assert "unsupported format" in caplog.text

    def test_is_not_told_where_there_is_none(self, tiny, null, ids, caplog):
        caplog.set_level(logging.WARNING)
        with BHRoutingIntegration(tiny, alpha=0.5, kde=null) as routing:
            tiny(ids)
            tiny(ids, attention_mask=torch.ones_like(ids))
            with routing.real_tokens(torch.ones_like(ids)):
                tiny(ids.masked_fill(ids == ids[0, -1], PAD))
        assert caplog.text == ""


def test_a_layer_that_is_called_by_itself_is_counted_and_checked(tiny):
    routing = BHRoutingIntegration(tiny, rule="topk", max_k=3)
    hidden = torch.randn(2, 5, tiny.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with routing, torch.no_grad():
        tiny.model.layers[1].mlp(hidden)
        assert routing.counters.mean() == 3
        assert torch.as_tensor(routing.counters.histogram[1]).sum() == 10
        with pytest.raises(RoutingError, match="layer 1 hold NaN"):
            tiny.model.layers[1].mlp(hidden * torch.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("graph", [False, True], ids=["no-grad", "grad"])
def test_the_layer_whose_logits_are_not_finite_is_named(tiny, ids, dtype, graph):
    tiny.to(dtype)
    last = len(tiny.model.layers) - 1
    with BHRoutingIntegration(tiny, rule="topk", max_k=3), torch.set_grad_enabled(graph):
        tiny(ids)
        with torch.no_grad():
            tiny.model.layers[last].mlp.gate.weight[0] = torch.inf
        with pytest.raises(RoutingError, match=f"layer {last} hold NaN or infinite"):
            tiny(ids)
