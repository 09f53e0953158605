"""Statistics: logits or contributions, with a null shared by all experts or one per expert."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from lm_eval_bh import (
    BHRoutingIntegration,
    ModelError,
    NullModel,
    NullModelError,
    ParameterError,
    RoutingConfig,
    select_experts,
)
from lm_eval_bh.resources import shipped
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.selection import reject
from lm_eval_bh.routing.tables import kde
from lm_eval_bh.routing.tables.calibration import calibrate
from lm_eval_bh.routing.tables.contribution import OutputNorms
from lm_eval_bh.routing.tables.find import cached_null, resolve_null
from lm_eval_bh.routing.tables.measure import measure
from lm_eval_bh.routing.tables.measurement import hearing_experts
from lm_eval_bh.routing.tables.null_kind import NullKind

KINDS = [(s, n) for s in ("logit", "contribution") for n in ("layer", "expert", "model")]
TESTS = [name for name, rule in METHODS.items() if rule.tests and not rule.joint]
EXPERTS = 16
NORMS = np.random.default_rng(1).lognormal(size=(1, EXPERTS))
OFFSETS = torch.linspace(-1, 1, EXPERTS)


def router_logits(seed: int, tokens: int = 600) -> torch.Tensor:
    """Return logits of experts with different means, as in a trained router."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, EXPERTS, generator=generator) + OFFSETS


def fitted(statistic: str, null: str, **options) -> NullModel:
    norms = NORMS if statistic == "contribution" else None
    return NullModel.fit({0: router_logits(0)}, null_scope=null, norms=norms, **options)


class TestNorms:
    @torch.no_grad()
    def test_they_are_the_mean_norms_of_what_the_experts_give_their_tokens(self, tiny, ids):
        seen = []
        layer = tiny.model.layers[1].mlp
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        modules = [r.module for r in find_routers(tiny)]
        norms = measure(["norms"], tiny, modules, [ids], progress=False)["norms"]
        handle.remove()
        hidden = seen[0].reshape(-1, 128)
        _, _, chosen = layer.gate(hidden)
        assert norms.shape == (4, 64)
        called = [e for e in range(64) if (chosen == e).any()]
        for expert in called:
            rows = hidden[(chosen == expert).any(-1)]
            gate, up = F.linear(rows, layer.experts.gate_up_proj[expert]).chunk(2, -1)
            out = F.linear(F.silu(gate) * up, layer.experts.down_proj[expert])
            assert norms[1, expert] == pytest.approx(float(out.norm(dim=-1).mean()), rel=1e-5)
        for expert in set(range(64)) - set(called):
            assert norms[1, expert] == pytest.approx(norms[1, called].mean())

    def test_measuring_changes_no_output_and_leaves_no_hook(self, tiny, ids):
        expected = tiny(ids).logits
        modules = [r.module for r in find_routers(tiny)]
        with hearing_experts(tiny, modules, [OutputNorms(tiny, modules)]):
            assert torch.equal(tiny(ids).logits, expected)
        assert not any(module._forward_pre_hooks for module in tiny.modules())

    def test_experts_that_cannot_be_run_one_by_one_are_refused(self):
        block = torch.nn.Module()
        block.gate = torch.nn.Linear(2, 2)
        block.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
        with pytest.raises(ModelError, match="output norms"):
            OutputNorms(block, [block.gate])


class TestPValues:
    @pytest.mark.parametrize(("statistic", "null"), KINDS)
    def test_they_are_taken_from_the_distribution_of_the_statistic(self, statistic, null):
        model, z = fitted(statistic, null), router_logits(1)
        values = z.double().numpy()
        if statistic == "contribution":
            values = np.log(torch.softmax(z.double(), -1).numpy() * NORMS)
        x, cdf = model.cdf(0)
        expected = (
            1 - np.interp(values, x, cdf)
            if null != "expert"
            else np.stack([1 - np.interp(values[:, e], x[e], cdf[e]) for e in range(EXPERTS)], 1)
        )
        np.testing.assert_allclose(model.p_values(0, z).numpy(), expected, atol=1e-6)

    @pytest.mark.parametrize(("statistic", "null"), KINDS)
    def test_they_are_about_uniform_on_other_tokens(self, statistic, null):
        p = fitted(statistic, null).p_values(0, router_logits(2, 4000))
        quantiles = torch.quantile(p.flatten(), torch.linspace(0, 1, 11, dtype=p.dtype))
        torch.testing.assert_close(
            quantiles, torch.linspace(0, 1, 11, dtype=p.dtype), atol=0.03, rtol=0
        )

    def test_each_experts_null_is_its_own(self):
        z = router_logits(2, 4000)
        by_expert = fitted("logit", "expert").p_values(0, z).mean(0)
        pooled = fitted("logit", "layer").p_values(0, z).mean(0)
        assert float((by_expert - 0.5).abs().max()) < 0.05
        assert float(pooled[0]) > 0.7
        assert float(pooled[-1]) < 0.3


class TestSelection:
    @pytest.mark.parametrize("rule", TESTS)
    @pytest.mark.parametrize(("statistic", "null"), KINDS)
    def test_counts_are_those_of_the_p_values_and_the_smallest_serve(self, statistic, null, rule):
        model, z = fitted(statistic, null), router_logits(1, 100)
        p = model.p_values(0, z)
        selection = select_experts(z, model, alpha=0.5, rule=rule, max_k=EXPERTS)
        rejected = reject(p, 0.5, rule).sum(-1).clamp(min=1)
        assert selection.counts.tolist() == rejected.tolist()
        for token, count in enumerate(selection.counts.tolist()):
            chosen = selection.indices[token, :count]
            left = torch.ones(EXPERTS, dtype=torch.bool)
            left[chosen] = False
            assert not left.any() or p[token, chosen].max() <= p[token, left].min()
            assert (p[token, chosen].diff() >= 0).all()
            torch.testing.assert_close(
                selection.weights[token, :count], torch.softmax(z[token], -1)[chosen]
            )

    @pytest.mark.parametrize(("statistic", "null"), KINDS)
    def test_only_logits_under_a_shared_null_rank_like_the_logits(self, statistic, null):
        z = router_logits(1)
        chosen = select_experts(z, fitted(statistic, null), min_k=4, max_k=4).indices
        same = (chosen == z.topk(4).indices).all(-1).float().mean()
        assert (
            same == 1
            if (statistic, null) in (("logit", "layer"), ("logit", "model"))
            else same < 0.5
        )

    def test_equal_p_values_fall_by_logit(self):
        z = 50 + router_logits(1)  # above every distribution: all p-values are 0
        chosen = select_experts(z, fitted("logit", "expert"), max_k=EXPERTS, alpha=0.4).indices
        assert torch.equal(chosen, z.argsort(dim=-1, descending=True, stable=True))

    def test_controls_share_out_contributions(self):
        z = router_logits(1, 200)
        shares = torch.softmax(z, -1) * torch.from_numpy(NORMS[0]).float()
        order = shares.argsort(dim=-1, descending=True)
        model = fitted("contribution", "layer")
        for rule in ("topk", "top_p", "min_p"):
            selection = select_experts(z, model, rule=rule, alpha=0.5, max_k=6)
            for token, count in enumerate(selection.counts.tolist()):
                assert selection.indices[token, :count].tolist() == order[token, :count].tolist()
        held = (shares / shares.sum(-1, keepdim=True)).sort(descending=True).values.cumsum(-1)
        expected = 1 + (held < 0.5).sum(-1)
        counts = select_experts(z, model, rule="top_p", alpha=0.5, max_k=EXPERTS).counts
        assert (counts == expected).float().mean() > 0.99  # but for rounding at the edge


class TestFile:
    @pytest.mark.parametrize(("statistic", "null"), KINDS)
    def test_what_was_saved_is_loaded(self, statistic, null, tmp_path):
        model = fitted(statistic, null)
        model.save(tmp_path / "null.safetensors")
        again = NullModel.load(tmp_path / "null.safetensors")
        assert again.header == model.header
        assert (again.header.statistic, again.header.null_scope) == (statistic, null)
        assert again.digest() == model.digest()
        z = router_logits(3)
        assert torch.equal(again.p_values(0, z), model.p_values(0, z))

    def test_the_one_that_ships_is_of_pooled_logits(self, null):
        assert (null.header.statistic, null.header.null_scope) == ("logit", "layer")
        assert null.norms is None

    @pytest.mark.parametrize("broken", [-NORMS, NORMS[:, 1:], NORMS * np.nan])
    def test_broken_norms_are_one_clear_sentence(self, broken, tmp_path):
        path = tmp_path / "null.safetensors"
        fitted("contribution", "layer").save(path)
        from safetensors import safe_open

        from lm_eval_bh.routing.sealed_file import write_sealed
        from lm_eval_bh.routing.tables.null_file import METADATA_KEY

        with safe_open(path, framework="numpy") as file:
            header = {METADATA_KEY: file.metadata()[METADATA_KEY]}
        write_sealed(load_file(path) | {"norms": np.ascontiguousarray(broken)}, path, header)
        with pytest.raises(NullModelError, match="experts' norms"):
            NullModel.load(path)

    def test_other_norms_are_another_digest(self):
        one = fitted("contribution", "layer")
        other = NullModel(one.tables, one.header, one.norms * 2)
        assert one.digest() != other.digest()


def test_trim_leaves_each_tokens_extremes_out_of_the_experts_distributions():
    z = router_logits(0)
    model = NullModel.fit({0: z}, null_scope="expert", trim=3)
    rank = z.argsort(dim=-1).argsort(dim=-1)
    for expert in (0, 7, 15):
        kept = z[(rank[:, expert] >= 3) & (rank[:, expert] < EXPERTS - 3), expert]
        x, cdf = kde.fit_cdf(kept.numpy(), points=512)
        np.testing.assert_array_equal(model.cdf(0)[0][expert], x)
        np.testing.assert_array_equal(model.cdf(0)[1][expert], cdf)


def test_an_expert_that_is_always_called_for_leaves_nothing_to_fit():
    z = router_logits(0)
    z[:, 3] += 100
    with pytest.raises(NullModelError, match="layer 0, expert 3"):
        NullModel.fit({0: z}, null_scope="expert", trim=1)


class TestInAModel:
    @pytest.fixture(autouse=True)
    def own_cache(self, monkeypatch, tmp_path, demo_texts):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(
            "lm_eval_bh.routing.tables.calibration.wikitext_train_texts", lambda: demo_texts[:12]
        )

    def test_kde_auto_calibrates_what_is_asked_once_and_keeps_it(self, tiny, tokenizer, caplog):
        routers = find_routers(tiny)
        kind = NullKind("contribution", "expert", 2)
        with caplog.at_level(logging.WARNING):
            made = resolve_null("auto", tiny, routers, tokenizer, kind)
        assert "statistic=contribution, null_scope=expert, null_from=all, trim=2" in caplog.text
        assert made.header.trim == 2
        assert made.norms.shape == (4, 64)
        assert cached_null(made.header.fingerprint, kind).is_file()
        caplog.clear()
        again = resolve_null("auto", tiny, routers, tokenizer, kind)
        assert again.digest() == made.digest()
        assert not caplog.text
        assert resolve_null("auto", tiny, routers, tokenizer).header.statistic == "logit"

    def test_a_patched_model_is_calibrated_as_it_is_without_the_patch(self, tiny, tokenizer):
        routers = find_routers(tiny)
        wanted = RoutingConfig(statistic="contribution")
        clean = resolve_null("auto", tiny, routers, tokenizer, NullKind("contribution"))
        cached_null(clean.header.fingerprint, NullKind("contribution")).unlink()
        with BHRoutingIntegration(tiny, rule="topk", max_k=2, tokenizer=tokenizer) as routing:
            routing.configure(wanted)
            assert routing.patched
            with pytest.raises(ModelError, match="patched already"):
                BHRoutingIntegration(tiny, tokenizer=tokenizer, statistic="contribution", trim=1)
        np.testing.assert_allclose(routing.null_model.norms, clean.norms, rtol=1e-9)
        for (x, cdf), (y, other) in zip(routing.null_model.tables, clean.tables, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9)
            np.testing.assert_allclose(cdf, other, rtol=1e-9)

    def test_what_trim_is_taken_does_not_depend_on_what_came_before(self, tiny, tokenizer):
        routing = BHRoutingIntegration(tiny, trim=4, tokenizer=tokenizer)
        assert routing.null_model.header.trim == 4
        routing.configure(RoutingConfig())
        assert (routing.null_model.header.trim or 0) == 0

    def test_a_rule_without_test_takes_the_norms_of_any_null_model(self, tiny, tokenizer, ids):
        routers = find_routers(tiny)
        options = {"statistic": "contribution"}
        expert = resolve_null("auto", tiny, routers, tokenizer, NullKind("contribution", "expert"))
        pooled = resolve_null("auto", tiny, routers, tokenizer, NullKind("contribution"))
        usage = []
        for null in (expert, pooled):
            with BHRoutingIntegration(
                tiny, rule="top_p", alpha=0.4, kde=null, **options
            ) as routing:
                with torch.no_grad():
                    tiny(ids)
                usage.append(torch.stack(routing.counters.usage))
        assert torch.equal(*usage)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"statistic": "contribution"}, "has statistic=logit, not statistic=contribution"),
            ({"null_scope": "expert"}, "has null_scope=layer, not null_scope=expert"),
            ({"trim": 4}, "has trim=0, not trim=4"),
        ],
    )
    def test_a_null_model_of_something_else_is_refused(self, tiny, options, sentence):
        with pytest.raises(NullModelError) as caught:
            BHRoutingIntegration(
                tiny, kde=shipped("kde_models") / "tiny-olmoe.safetensors", **options
            )
        assert sentence in str(caught.value)
        assert "null_model=auto" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_the_model_takes_the_experts_with_the_smallest_p_values(
        self, tiny, ids, tokenizer, demo_texts
    ):
        routers = find_routers(tiny)
        null = calibrate(
            tiny,
            tokenizer,
            [r.module for r in routers],
            demo_texts[:12],
            model_name="tiny-olmoe",
            revision=None,
            text_name="demo",
            kind=NullKind("contribution", "expert"),
        )
        seen = []
        routing = BHRoutingIntegration(
            tiny, alpha=0.5, kde=null, statistic="contribution", null="expert"
        )
        routing.observers.append(lambda *what: seen.append(what))
        with routing, torch.no_grad():
            tiny(ids)
        differing = 0
        for layer, logits, selection in seen:
            p = null.p_values(layer, logits)
            rejected = reject(p, 0.5).sum(-1).clamp(1, 8)
            assert torch.equal(selection.counts, rejected)
            for token, count in enumerate(rejected.tolist()):
                chosen = selection.indices[token, :count]
                assert p[token, chosen].max() <= p[token].sort().values[count - 1]
                differing += set(chosen.tolist()) != set(logits[token].topk(count).indices.tolist())
        assert differing > 20

    def test_the_same_numbers_at_every_batch_size(self, tiny, ids):
        tiny.double()
        for rule, alpha in (("top_p", 0.4), ("min_p", 0.3), ("random_k", 0.4)):
            usage = []
            for batches in ([ids], ids.split(1)):
                routing = BHRoutingIntegration(tiny, rule=rule, alpha=alpha, experts="ragged")
                with routing, torch.no_grad():
                    for batch in batches:
                        tiny(batch)
                    usage.append(torch.stack(routing.counters.usage))
            assert torch.equal(*usage), rule


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"statistic": "logits"}, "did you mean 'logit'"),
        ({"null_scope": "pool"}, "null_scope must be layer, expert or model: found 'pool'"),
        ({"trim": -1}, "trim must be an integer from 0 to 4294967295: found -1"),
        ({"rule": "random_k", "seed": 2**62}, "seed must be an integer from 0 to"),
        (
            {"rule": "top_p", "null_scope": "expert"},
            "null_scope='expert' has no meaning with rule=top_p",
        ),
        ({"rule": "topk", "trim": 2}, "trim=2 has no meaning with rule=topk"),
        ({"rule": "random_k", "statistic": "contribution"}, "has no meaning with rule=random_k"),
        ({"budget": "layer"}, "without target_experts"),
        ({"budget": "all"}, "budget must be model or layer: found 'all'"),
        ({"target_experts": 8}, "between min_k=1 and max_k=8"),
        ({"target_experts": "5"}, "must be a number of experts: found '5'"),
        ({"target_experts": 5, "rule": "topk"}, "target_experts=5 has no meaning with rule=topk"),
    ],
)
def test_contradictions_are_one_clear_sentence(arguments, sentence):
    with pytest.raises(ParameterError) as caught:
        RoutingConfig(**arguments)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
