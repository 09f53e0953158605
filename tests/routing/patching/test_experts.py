"""The ragged experts forward: correct, without leaks, and without work for unused slots."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssConfig, OlmoeConfig, OlmoeForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from lm_eval_bh import BHRoutingIntegration, NullModel, ParameterError
from lm_eval_bh.routing.patching import experts as ragged
from lm_eval_bh.routing.patching.experts import RowsComputed, ragged_experts_forward
from lm_eval_bh.routing.patching.experts_switch import ExpertsSwitch
from lm_eval_bh.routing.releases import returned_cache

HIDDEN, INNER, EXPERTS, SLOTS = 48, 32, 8, 4
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
IMPLEMENTATIONS = ["ragged", "eager", "grouped_mm", "batched_mm"]


class PlainExperts(nn.Module):
    """Experts without a gate, with biases and a norm after them: the forward's other branches."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = False, True, False, True
    num_experts = EXPERTS

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(EXPERTS, INNER, HIDDEN))
        self.up_proj_bias = nn.Parameter(torch.empty(EXPERTS, INNER))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))
        self.down_proj_bias = nn.Parameter(torch.empty(EXPERTS, HIDDEN))
        self.act_fn = nn.SiLU()
        self.post_expert_norm = nn.LayerNorm(HIDDEN)

    def one(self, expert, row):
        inner = self.act_fn(self.up_proj[expert] @ row + self.up_proj_bias[expert])
        return self.post_expert_norm(self.down_proj[expert] @ inner + self.down_proj_bias[expert])


class GatedExperts(OlmoeExperts):
    """OLMoE's experts."""

    def __init__(self) -> None:
        super().__init__(
            OlmoeConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
        )

    def one(self, expert, row):
        gate, up = (self.gate_up_proj[expert] @ row).chunk(2)
        return self.down_proj[expert] @ (nn.functional.silu(gate) * up)


class InterleavedExperts(GptOssExperts):
    """The experts of gpt-oss: transposed weights, biases, gate and up interleaved."""

    def __init__(self) -> None:
        super().__init__(
            GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
        )

    def one(self, expert, row):
        both = row @ self.gate_up_proj[expert] + self.gate_up_proj_bias[expert]
        return self._apply_gate(both) @ self.down_proj[expert] + self.down_proj_bias[expert]


def make(kind, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    module = kind()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.to(dtype)


@pytest.mark.parametrize("tokens", [1, 5])
def test_experts_of_transformers_that_know_no_norm(tokens):
    """Those of 5.18 and 5.19 lack the attribute."""
    module = make(GatedExperts, torch.float64)
    if not hasattr(module, "has_post_expert_norm"):
        pytest.skip("this release lacks it: all other tests show that nothing is missed")
    hidden = torch.randn(tokens, HIDDEN, dtype=torch.float64)
    indices = torch.arange(tokens * 2).reshape(tokens, 2) % EXPERTS
    weights = torch.rand(tokens, 2, dtype=torch.float64)
    expected = ragged_experts_forward(module, hidden, indices, weights)
    del module.has_post_expert_norm
    assert torch.equal(ragged_experts_forward(module, hidden, indices, weights), expected)


def routed(tokens, dtype=torch.float32, seed=0, hidden=HIDDEN, experts=EXPERTS):
    """Hidden states, indices and weights of tokens with 0 to all slots used, in any position."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype)
    scores = torch.randn(tokens, experts, generator=generator)
    indices = scores.topk(SLOTS, -1).indices
    unused = torch.rand(tokens, SLOTS, generator=generator) < 0.45
    weights = torch.rand(tokens, SLOTS, generator=generator).to(dtype)
    return states, indices.masked_fill(unused, experts), weights.masked_fill(unused, 0.0)


def reference(module, states, indices, weights):
    """Loop over tokens and slots, in float64."""
    out = []
    for row, chosen, weight in zip(states, indices.tolist(), weights, strict=True):
        value = torch.zeros_like(row)
        for slot, expert in enumerate(chosen):
            if expert < module.num_experts:
                value = value + weight[slot] * module.one(expert, row)
        out.append(value)
    return torch.stack(out)


def poison(*shapes):
    """Leave NaN in memory that the allocator is about to hand out again."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        held = [torch.full(s, float("nan"), dtype=dtype) for s in shapes for _ in range(3)]
        del held


def small_model(layers=1, dtype=torch.float32):
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=SLOTS,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return OlmoeForCausalLM(config).eval().to(dtype)


def small_null(layers=1):
    generator = torch.Generator().manual_seed(0)
    return NullModel.fit(
        {layer: torch.randn(2000, EXPERTS, generator=generator) for layer in range(layers)}
    )


def patched(model, **changes):
    layers = model.config.num_hidden_layers
    return BHRoutingIntegration(
        model, **({"alpha": 0.5, "max_k": SLOTS, "kde": small_null(layers)} | changes)
    )


@pytest.fixture
def some_ids():
    return torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tokens", [1, 7, 150])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", [GatedExperts, PlainExperts, InterleavedExperts])
def test_forward_and_backward_equal_a_float64_loop_over_tokens(kind, dtype, tokens):
    module = make(kind, dtype)
    states, indices, weights = routed(tokens, dtype)
    exact = copy.deepcopy(module).double()
    inputs = [states.requires_grad_(), weights.requires_grad_()]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    poison((tokens, HIDDEN), (tokens * SLOTS, HIDDEN), (tokens * SLOTS, 2 * INNER))

    out = ragged_experts_forward(module, states, indices, weights)
    expected = reference(exact, doubles[0], indices, doubles[1])
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(pull.to(dtype))
    expected.backward(pull.to(dtype).double())

    assert out.dtype == dtype
    got = [out, *(x.grad for x in [*inputs, *module.parameters()])]
    want = [expected, *(x.grad for x in [*doubles, *exact.parameters()])]
    for a, b in zip(got, want, strict=True):
        if b is None:  # no token uses a parameter of any expert
            assert a is None
            continue
        scale = b.abs().max().item() + 1e-9
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_without_gradients_nothing_changes(dtype):
    module = make(GatedExperts, dtype)
    states, indices, weights = routed(90, dtype)
    with torch.no_grad():
        out = ragged_experts_forward(module, states, indices, weights)
    assert torch.equal(out, ragged_experts_forward(module, states, indices, weights).detach())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_many_experts_with_few_rows_each_are_grouped_and_right(dtype, monkeypatch):
    config = OlmoeConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=40)
    module = OlmoeExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    module, calls = module.to(dtype), []
    module._rows_computed = RowsComputed()
    grouped = ragged._grouped
    monkeypatch.setattr(ragged, "_grouped", lambda *args: calls.append(1) or grouped(*args))
    states, indices, weights = routed(24, dtype, experts=40)
    poison((24 * SLOTS, HIDDEN), (24 * SLOTS, 2 * INNER), (24 * SLOTS, INNER))
    out = ragged_experts_forward(module, states.requires_grad_(), indices, weights)
    out.sum().backward()
    grads = [states.grad.clone(), *(p.grad.clone() for p in module.parameters())]
    assert calls == [1]
    assert module._rows_computed.total == int((indices < 40).sum())
    states.grad = None
    module = module.double().requires_grad_()
    module.zero_grad()
    exact = states.detach().double().requires_grad_()
    expected = ragged_experts_forward(module, exact, indices, weights.double())
    expected.sum().backward()
    assert calls == [1]  # float64 goes expert by expert
    want = [expected, exact.grad, *(p.grad for p in module.parameters())]
    for a, b in zip([out, *grads], want, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=TOLERANCE[dtype] * b.abs().max().item()
        )


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_tokens_without_any_expert_get_zero(tokens):
    states, indices, weights = routed(tokens)
    poison((tokens, HIDDEN))
    out = ragged_experts_forward(
        make(GatedExperts), states, torch.full_like(indices, EXPERTS), weights
    )
    assert torch.equal(out, torch.zeros(tokens, HIDDEN))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_uninitialised_leaks_from_unused_slots(some_ids, implementation, dtype):
    model = small_model(2, dtype)
    tokens = some_ids.numel()
    shapes = [(tokens * n, width) for n in (1, SLOTS) for width in (HIDDEN, INNER, 2 * INNER)]
    with patched(model, experts="eager"):
        expected = model(some_ids).logits.detach()
    with patched(model, experts=implementation):
        for _ in range(3):
            model.zero_grad()
            poison(*shapes)
            out = model(some_ids, labels=some_ids)
            poison(*shapes)
            out.loss.backward()
            torch.testing.assert_close(
                out.logits, expected, rtol=0, atol=10 * TOLERANCE[dtype] * expected.abs().max()
            )
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_taken_on_accelerators_gives_the_same(dtype, monkeypatch, some_ids):
    model = small_model(2, dtype)
    with patched(model) as routing:
        expected = model(some_ids).logits
        used = routing.rows_computed
    monkeypatch.setattr(ragged, "_uncompiled", elsewhere)
    with patched(model) as routing:
        torch.testing.assert_close(
            model(some_ids).logits, expected, rtol=0, atol=10 * TOLERANCE[dtype]
        )
        if dtype == torch.float32:  # no blocks to fill up
            assert routing.rows_computed == used


def elsewhere(module, states, indices, weights):
    """Take the branch of ``ragged_experts_forward`` for devices other than a CPU."""
    ragged._count(module, (indices < module.num_experts).sum())
    return ragged._grouped(module, states, indices, weights)


def test_only_used_slots_cost_arithmetic():
    module = make(GatedExperts)
    module._rows_computed = RowsComputed()
    states, indices, weights = routed(200)
    used = int((indices < EXPERTS).sum())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ragged_experts_forward(module, states, indices, weights)
    assert counter.get_total_flops() == used * 6 * HIDDEN * INNER
    assert module._rows_computed.total == used < indices.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_fills_up_blocks_of_rows_and_counts_them(dtype):
    module = make(GatedExperts, dtype)
    module._rows_computed = RowsComputed()
    states, indices, weights = routed(200, dtype)
    rows_of = torch.bincount(indices.flatten(), minlength=EXPERTS + 1)[:EXPERTS]
    wanted = sum(-(-n // 16) * 16 if n > 16 else n for n in rows_of.tolist())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ragged_experts_forward(module, states, indices, weights)
    assert module._rows_computed.total == wanted
    assert counter.get_total_flops() == wanted * 6 * HIDDEN * INNER


def test_rows_computed_are_the_experts_that_were_counted(some_ids):
    model = small_model(2)
    with patched(model) as routing, torch.no_grad():
        assert routing.rows_computed == 0
        for _ in range(2):
            model(some_ids)
        histogram = sum(routing.counters.histogram)
        assert routing.rows_computed == int((histogram * torch.arange(EXPERTS + 1)).sum())
    assert routing.rows_computed is None
    for experts in ("eager", "grouped_mm", "batched_mm"):
        with patched(model, experts=experts) as routing, torch.no_grad():
            model(some_ids)
            assert routing.rows_computed is None


def test_a_counter_adds_up_what_lies_on_devices():
    counter = RowsComputed()
    rows = torch.tensor(3)
    for value in (2, rows, rows):
        counter.add(value)
    assert counter.total == 8
    assert rows == 3


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_given_no_experts_and_changes_no_real_token(some_ids, side, implementation):
    model = small_model(2)
    mask = torch.ones_like(some_ids)
    for row, missing in ((1, 4), (2, 7)):
        span = slice(0, missing) if side == "left" else slice(some_ids.shape[1] - missing, None)
        mask[row, span] = 0
    padded = some_ids * mask
    with patched(model, experts=implementation) as routing, torch.no_grad():
        alone = [
            model(ids[keep.bool()][None]).logits[0] for ids, keep in zip(padded, mask, strict=True)
        ]
        rows = routing.rows_computed
        mean = routing.counters.mean()
        routing.reset_stats()
        if side == "left":
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            batched = model(padded, attention_mask=mask, position_ids=positions).logits
        else:  # as lm-eval does it: no attention mask
            with routing.real_tokens(mask):
                batched = model(padded).logits
        assert routing.counters.tokens(0) == mask.sum()
        assert routing.counters.mean() == mean
        if rows is not None:
            assert routing.rows_computed == 2 * rows
    for logits, expected, keep in zip(batched, alone, mask, strict=True):
        torch.testing.assert_close(logits[keep.bool()], expected, rtol=1e-4, atol=1e-4)


def test_padding_of_a_model_that_knows_no_unused_slots_is_left_alone(some_ids):
    model = small_model()
    expected = model(some_ids).logits
    mask = torch.ones_like(some_ids)
    mask[:, -2:] = 0
    with (
        BHRoutingIntegration(model, rule="topk", max_k=SLOTS) as routing,
        routing.real_tokens(mask),
    ):
        assert torch.equal(model(some_ids).logits, expected)
        assert routing.counters.tokens(0) == mask.sum()


def test_a_mask_of_other_tokens_is_refused(some_ids):
    model = small_model()
    with (
        patched(model) as routing,
        pytest.raises(ParameterError, match=r"a mask for \(3, 8\) tokens"),
        routing.real_tokens(torch.ones(3, 8)),
    ):
        model(some_ids)
    with patched(model) as routing:
        model(some_ids)  # and it is forgotten with the block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decoding_one_token_equals_the_whole_sequence(some_ids, dtype, implementation):
    model = small_model(2, dtype)
    with patched(model, experts=implementation), torch.no_grad():
        expected = model(some_ids[:1]).logits
        read = model(some_ids[:1, :-1], use_cache=True)
        out = model(some_ids[:1, -1:], **returned_cache(read), use_cache=True).logits
    torch.testing.assert_close(
        out[:, -1], expected[:, -1], rtol=0, atol=20 * TOLERANCE[dtype] * expected.abs().max()
    )


@pytest.mark.parametrize(
    ("what", "backend"), [("model", "eager"), ("block", "aot_eager"), ("block", "inductor")]
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_patched_then_compiled_gives_the_same(some_ids, what, backend):
    if backend == "inductor" and not (shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("inductor needs a C++ compiler")
    model = small_model()
    torch._dynamo.reset()
    with patched(model) as routing, torch.no_grad():
        expected = model(some_ids).logits
        rows = routing.rows_computed
        compiled = torch.compile(model, backend=backend) if what == "model" else model
        if what == "block":
            model.model.layers[0].mlp.compile(backend=backend)
        for _ in range(2):
            torch.testing.assert_close(compiled(some_ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert routing.rows_computed == 3 * rows
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["patch", "dispatch"])
@pytest.mark.parametrize("place", ["disk", "cpu"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_spread_over_devices_gives_the_same(some_ids, tmp_path, first, place):
    model = small_model(2)
    with patched(model), torch.no_grad():
        expected = model(some_ids).logits
    places = {name.rpartition(".")[0]: "cpu" for name, _ in model.named_parameters()}
    places |= {"model.rotary_emb": "cpu", "model.layers.1.mlp.experts": place}

    def dispatch():
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)

    if first == "dispatch":
        dispatch()
    with patched(model) as routing, torch.no_grad():
        if first == "patch":
            dispatch()
        torch.testing.assert_close(model(some_ids).logits, expected)
        assert routing.rows_computed > 0
    remove_hook_from_submodules(model)


@pytest.mark.parametrize("unused_slots", [True, False])
@pytest.mark.parametrize("experts", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("own", ["eager", "grouped_mm"])
def test_restoring_leaves_no_trace(own, experts, unused_slots):
    model = small_model(2)
    model.set_experts_implementation(own)
    modules = [layer.mlp.experts for layer in model.model.layers]
    before = [dict(module.__dict__) for module in modules]
    switch = ExpertsSwitch(model, experts, unused_slots=unused_slots)
    ran = model.get_experts_implementation()[""]
    if experts == "auto":
        assert ran == ("bh_ragged" if unused_slots else own)
    else:
        assert ran == {"ragged": "bh_ragged"}.get(experts, experts)
    assert switch.skips_unused == (unused_slots or experts == "ragged")
    switch.restore(model)
    assert model.get_experts_implementation()[""] == own
    assert [dict(module.__dict__) for module in modules] == before
    switch.restore(model)  # twice does no harm
    assert model.get_experts_implementation()[""] == own
