"""Weights, benefits, predicted norms, nulls of the unselected, one family, by plain references."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from statsmodels.stats.multitest import multipletests
from transformers import AutoModelForCausalLM

from lm_eval_bh import (
    BHRoutingIntegration,
    ModelError,
    NullModel,
    NullModelError,
    ParameterError,
    RoutingConfig,
    select_experts,
)
from lm_eval_bh.routing.family import family_cutoff, family_level
from lm_eval_bh.routing.methods.scores import LEAST, STATISTICS, log_predicted_norms
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.benefit import measure_benefits
from lm_eval_bh.routing.tables.calibration import calibrate, calibrate_and_check
from lm_eval_bh.routing.tables.measure import measure
from lm_eval_bh.routing.tables.norm_regression import PENALTY
from lm_eval_bh.routing.tables.null_kind import NullKind

FACTORED = [name for name, row in STATISTICS.items() if row.table]


@pytest.fixture(scope="module")
def texts(demo_texts):
    return demo_texts[:12]


@pytest.fixture(scope="module")
def tiny_model(tiny_model_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="module")
def made(tiny_model, tokenizer, texts):
    """Return null models by kind, calibrated once each."""
    known = {}

    def make(statistic="benefit", scope="model", origin="unselected"):
        kind = NullKind(statistic, scope, 0, origin)
        if kind not in known:
            known[kind] = calibrate(
                tiny_model,
                tokenizer,
                [router.module for router in find_routers(tiny_model)],
                texts,
                model_name="tiny-olmoe",
                revision=None,
                text_name="demo",
                tokens=2048,
                length=128,
                kind=kind,
                progress=False,
            )
        return known[kind]

    return make


def heard(model, ids):
    """Return every layer's router logits, hidden states, own weights and own indices."""
    found = []
    handles = [
        router.module.register_forward_hook(
            lambda module, args, output: found.append(
                (output[0], args[0].flatten(0, -2), *output[1:])
            )
        )
        for router in find_routers(model)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def plain_scores(null, layer, logits, hidden_states):
    """Return the statistic word by word: log softmax weight plus the log of the factor."""
    scores = np.log(np.exp(logits - logits.max(1, keepdims=True)))
    scores -= np.log(np.exp(scores).sum(1, keepdims=True))
    if null.header.statistic in ("contribution", "benefit"):
        scores += np.log(null.factors[layer])
    elif null.header.statistic == "predicted":
        table = null.factors[layer]
        norms = hidden_states @ table[:-2] + table[-2]
        scores += np.log(np.maximum(norms, LEAST * table[-1]))
    return scores


class TestBenefit:
    def test_it_is_the_gradient_of_the_loss_times_each_experts_output(self, tiny, ids):
        """By central differences, as exact as norms and softmax in float32 allow."""
        tiny.double().set_experts_implementation("eager")  # others know no float64
        routers = find_routers(tiny)
        found = measure_benefits(tiny, [r.module for r in routers], [ids], 64, progress=False)
        layer = 2

        def loss(change):
            def nudge(module, args, output):
                logits, weights, indices = output
                return logits, weights + change(weights, indices), indices

            handle = routers[layer].module.register_forward_hook(nudge)
            with torch.no_grad():
                logits = tiny(ids).logits
            handle.remove()
            return float(
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
                )
            )

        indices = heard(tiny, ids)[layer][3]
        uses = torch.bincount(indices.flatten(), minlength=64)
        expert = int(torch.where(uses == uses[uses > 1].min())[0][0])
        slopes = []
        for token, slot in (indices == expert).nonzero().tolist():

            def at(step, token=token, slot=slot):
                def change(weights, indices):
                    delta = torch.zeros_like(weights)
                    delta[token, slot] = step
                    return delta

                return change

            slopes.append((loss(at(1e-3)) - loss(at(-1e-3))) / 2e-3)
        assert found[layer, expert] == pytest.approx(np.sqrt(np.mean(np.square(slopes))), rel=5e-3)

    def test_the_model_is_left_as_it_was(self, tiny, ids):
        before = {name: p.requires_grad for name, p in tiny.named_parameters()}
        state = {name: value.clone() for name, value in tiny.state_dict().items()}
        measure_benefits(tiny, [r.module for r in find_routers(tiny)], [ids], 64, progress=False)
        assert {name: p.requires_grad for name, p in tiny.named_parameters()} == before
        assert all(p.grad is None for p in tiny.parameters())
        assert not tiny.training
        assert not any(getattr(m, "gradient_checkpointing", False) for m in tiny.modules())
        assert not any(r.module._forward_hooks for r in find_routers(tiny))
        for name, value in tiny.state_dict().items():
            assert torch.equal(value, state[name])

    def test_checkpointing_changes_nothing(self, tiny, ids):
        modules = [r.module for r in find_routers(tiny)]
        with_it = measure_benefits(tiny, modules, [ids], 64, progress=False)
        tiny.supports_gradient_checkpointing = False
        without = measure_benefits(tiny, modules, [ids], 64, progress=False)
        np.testing.assert_allclose(with_it, without, rtol=1e-4)

    def test_a_model_without_gradients_is_named_and_what_to_use(self, tiny, ids):
        for router in find_routers(tiny):
            router.module.register_forward_hook(
                lambda module, args, output: (output[0], output[1].detach(), output[2])
            )
        detach = tiny.lm_head.register_forward_hook(lambda module, args, output: output.detach())
        with pytest.raises(ModelError, match="use statistic=contribution"):
            measure_benefits(tiny, [r.module for r in find_routers(tiny)], [ids], 64, False)
        detach.remove()


class TestPredicted:
    def test_it_is_a_ridge_regression(self, tiny, ids):
        tiny.double().set_experts_implementation("eager")  # others know no float64
        routers = find_routers(tiny)
        modules = [r.module for r in routers]
        table = measure(["predictor"], tiny, modules, [ids], progress=False)["predictor"][1]
        _, x, _, _ = heard(tiny, ids)[1]
        experts = tiny.model.layers[1].mlp.experts
        norms = []
        for expert in range(64):
            gate, up = torch.nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, -1)
            out = torch.nn.functional.linear(
                torch.nn.functional.silu(gate) * up, experts.down_proj[expert]
            )
            norms.append(out.norm(dim=-1))
        norms = torch.stack(norms, -1).detach().numpy()
        x = x.detach().numpy()
        penalty = PENALTY * np.square(x).sum(0).mean()
        ridge = Ridge(alpha=penalty).fit(x, norms)
        np.testing.assert_allclose(table[-1], norms.mean(0), rtol=1e-9)
        np.testing.assert_allclose(x @ table[:-2] + table[-2], ridge.predict(x), rtol=1e-6)

    def test_a_prediction_never_falls_below_its_floor(self):
        table = torch.tensor([[1.0, -1.0], [0.0, 0.0], [2.0, 4.0]])  # coefficient, intercept, mean
        logs = log_predicted_norms(table, torch.tensor([[3.0], [-3.0]]))
        expected = torch.tensor([[3.0, 0.2], [0.1, 3.0]]).log()
        torch.testing.assert_close(logs, expected)

    def test_without_hidden_states_the_sentence_says_what_is_missing(self, made):
        with pytest.raises(ParameterError, match="give hidden_states"):
            made("predicted").p_values(0, torch.randn(3, 64))


EVERY_NULL = [
    (statistic, origin, scope)
    for statistic in ("logit", "weight", *FACTORED)
    for origin in ("all", "unselected")
    for scope in ("layer", "expert", "model")
    # Of all experts' scores each expert's null is fitted by the same code, whatever the statistic.
    if (origin, scope) != ("all", "expert") or statistic == "benefit"
]


@pytest.mark.parametrize(("statistic", "origin", "scope"), EVERY_NULL)
def test_every_null_is_fitted_to_the_scores_of_its_experts(
    made, tiny_model, tokenizer, texts, statistic, origin, scope
):
    """Its quantiles are those of the scores themselves, computed here one by one."""
    from lm_eval_bh.routing.tables.texts import text_batches

    null = made(statistic, scope, origin)
    batches = text_batches(tokenizer, texts, tokens=2048, length=128, batch=8)
    passes = [heard(tiny_model, batch) for batch in batches]
    by_layer = []
    for layer in range(4):
        logits = torch.cat([each[layer][0] for each in passes]).double().numpy()
        hidden = torch.cat([each[layer][1] for each in passes]).double().numpy()
        scores = logits if statistic == "logit" else plain_scores(null, layer, logits, hidden)
        if origin == "unselected":
            own = np.argsort(-logits, axis=1, kind="stable")[:, :8]
            np.put_along_axis(scores, own, np.nan, axis=1)
        by_layer.append(scores)
    if scope == "model":
        samples, (x, cdf) = np.concatenate([s.ravel() for s in by_layer]), null.cdf(3)
    elif scope == "layer":
        samples, (x, cdf) = by_layer[1].ravel(), null.cdf(1)
    else:
        samples = by_layer[1][:, 5]
        x, cdf = (table[5] for table in null.cdf(1))
    samples = samples[~np.isnan(samples)]
    at = np.quantile(samples, [0.05, 0.3, 0.6, 0.95])
    width = np.interp(at, x, cdf)
    np.testing.assert_allclose(width, [0.05, 0.3, 0.6, 0.95], atol=0.03)


@pytest.mark.parametrize("statistic", ["weight", *FACTORED])
@pytest.mark.parametrize("rule", ["bh", "p_value", "holm", "min_w"])
def test_decisions_at_work_are_those_of_the_p_values(made, tiny, ids, statistic, rule):
    """In a model: statsmodels on p-values that are computed apart, or plain comparisons."""
    null = made(statistic)
    alpha = {"p_value": 0.02, "bh": 0.3, "holm": 0.6, "min_w": 0.0}[rule]
    if rule == "min_w":
        logits, hidden = heard(tiny, ids)[0][:2]
        scores = plain_scores(null, 0, logits.double().numpy(), hidden.double().numpy())
        alpha = float(np.exp(np.quantile(scores, 0.93)))
    options = {} if rule == "min_w" else {"null_scope": "model", "null_from": "unselected"}
    seen = []
    routing = BHRoutingIntegration(
        tiny, alpha=alpha, rule=rule, statistic=statistic, null_model=null, **options
    )
    routing.observers.append(lambda *what: seen.append(what))
    inputs = []
    for router in routing.routers:
        router.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with routing, torch.no_grad():
        tiny(ids)
    counts = set()
    for (layer, logits, selection), hidden in zip(seen, inputs, strict=True):
        hidden = hidden.flatten(0, -2)
        p_values = null.p_values(layer, logits, hidden).numpy()
        scores = plain_scores(null, layer, logits.double().numpy(), hidden.double().numpy())
        # statsmodels takes 70 ms a token for Holm's procedure.
        for token in range(0, len(logits), 128 if rule == "holm" else 1):
            first = logits[token].topk(8).indices.numpy()
            if rule == "min_w":
                passed = [e for e in first if scores[token, e] >= np.log(alpha)]
            elif rule == "p_value":
                passed = [e for e in first if p_values[token, e] <= alpha]
            else:
                method = {"bh": "fdr_bh", "holm": "holm"}[rule]
                rejected = multipletests(p_values[token], alpha=alpha, method=method)[0].sum()
                passed = np.argsort(-scores[token], kind="stable")[: min(rejected, 8)].tolist()
            candidates = first if rule in ("p_value", "min_w") else np.arange(64)
            best = candidates[np.argmax(scores[token, candidates])]
            chosen = set(selection.indices[token, : selection.counts[token]].tolist())
            assert chosen == (set(passed) or {best})
            counts.add(len(chosen))
    assert len(counts) > 2


def test_one_family_is_benjamini_hochberg_over_all_decisions():
    rng = np.random.default_rng(0)
    for m in (1, 7, 4096):
        p = np.sort(np.concatenate([rng.random(m), rng.random(m // 3) / 500]))
        for alpha in (0.01, 0.2, 0.9):
            rejected = multipletests(p, alpha=alpha, method="fdr_bh", is_sorted=True)[0]
            cutoff = family_cutoff(torch.from_numpy(p), alpha)
            assert (p <= cutoff).sum() == rejected.sum()
            if rejected.any():
                level = family_level(torch.from_numpy(p), cutoff)
                assert level <= alpha * (1 + 1e-12)
                assert family_cutoff(torch.from_numpy(p), level * (1 + 1e-12)) == cutoff


class TestOneFamilyAtWork:
    CONFIG: ClassVar = {
        "statistic": "benefit",
        "null_scope": "model",
        "null_from": "unselected",
        "family": "all",
    }

    def test_a_level_becomes_one_cutoff(self, made, tiny, tokenizer, texts, ids):
        null = made("benefit")
        routing = BHRoutingIntegration(
            tiny, alpha=0.2, null_model=null, tokenizer=tokenizer, texts=texts, **self.CONFIG
        )
        (cutoff,) = set(routing.solution.alphas.values())
        assert routing.describe()["alpha"] == 0.2
        with (
            torch.no_grad(),
            BHRoutingIntegration(
                tiny,
                alpha=cutoff,
                rule="p_value",
                null_model=null,
                statistic="benefit",
                null_scope="model",
                null_from="unselected",
            ) as same,
        ):
            expected = tiny(ids).logits
        with torch.no_grad(), routing:
            assert torch.equal(tiny(ids).logits, expected)
        assert routing.get_routing_stats() == same.get_routing_stats()

    def test_a_target_is_met_and_its_level_said(self, made, tiny, tokenizer, texts):
        routing = BHRoutingIntegration(
            tiny,
            target_experts=4,
            null_model=made("benefit"),
            tokenizer=tokenizer,
            texts=texts,
            **self.CONFIG,
        )
        assert routing.solution.mean_experts == pytest.approx(4, rel=0.02)
        assert 0 < routing.solution.level <= 1
        assert routing.describe()["alpha"] == routing.solution.level


class TestMass:
    @pytest.mark.parametrize("temperature", [1.0, 1.5])
    def test_kept_weights_are_multiplied_by_the_share_to_its_power(
        self, tiny, ids, made, temperature
    ):
        for options in (
            {"rule": "topk", "max_k": 3},
            {"rule": "min_w", "alpha": 0.03},
            {"rule": "min_w", "alpha": 0.03, "max_k": 5},
            {"rule": "min_w", "alpha": 0.01, "statistic": "benefit"},
        ):
            options |= {"temperature": temperature}
            if "statistic" in options:
                options |= {"null_model": made("benefit")}
            seen = {}
            for mass in (None, 0.0, 0.5, 1.0):
                found = seen[mass] = []
                routing = BHRoutingIntegration(tiny, mass=mass, **options)
                routing.observers.append(lambda *what, found=found: found.append(what))
                with routing, torch.no_grad():
                    tiny(ids)
            (_, logits, plain), *_ = seen[None]
            native = torch.softmax(logits / temperature, -1).topk(8).values.sum(-1, keepdim=True)
            kept = plain.weights.sum(-1, keepdim=True)
            for mass in (0.0, 0.5, 1.0):
                weights = seen[mass][0][2].weights
                torch.testing.assert_close(weights, plain.weights * (native / kept) ** mass)

    def test_where_weights_sum_to_one_full_mass_is_what_the_model_does(self, tiny, ids):
        for module in (router.module for router in find_routers(tiny)):
            module.norm_topk_prob = True
        results = []
        for mass in (None, 1.0):
            with torch.no_grad(), BHRoutingIntegration(tiny, rule="topk", max_k=3, mass=mass):
                results.append(tiny(ids).logits)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("mass", [0.0, 0.3, 1.0])
    def test_where_weights_are_rescaled_kept_ones_stay_as_among_the_native(self, tiny, ids, mass):
        for module in (router.module for router in find_routers(tiny)):
            module.norm_topk_prob = True
        seen = []
        routing = BHRoutingIntegration(tiny, rule="topk", max_k=3, mass=mass)
        routing.observers.append(lambda *what: seen.append(what))
        with routing, torch.no_grad():
            tiny(ids)
        _, logits, picked = seen[0]
        native = torch.softmax(logits, -1).topk(8).values
        kept = native[:, :3] / native.sum(-1, keepdim=True)
        expected = kept * kept.sum(-1, keepdim=True) ** -mass
        torch.testing.assert_close(picked.weights, expected, rtol=1e-4, atol=1e-6)


def test_k_per_layer_gives_every_layer_its_own_static_k(tiny, ids):
    routing = BHRoutingIntegration(tiny, rule="topk", k_per_layer="5-3-2-8")
    seen = []
    routing.observers.append(
        lambda layer, logits, selection: seen.append(selection.counts.unique())
    )
    with routing, torch.no_grad():
        tiny(ids)
    assert [each.tolist() for each in seen] == [[5], [3], [2], [8]]
    assert routing.config.max_k == 8
    assert routing.get_routing_stats()["mean_experts_per_token"] == 4.5
    with torch.no_grad():
        with BHRoutingIntegration(tiny, rule="topk", k_per_layer=[4, 4, 4, 4]):
            per_layer = tiny(ids).logits
        with BHRoutingIntegration(tiny, rule="topk", max_k=4):
            assert torch.equal(tiny(ids).logits, per_layer)


@pytest.mark.parametrize("statistic", FACTORED)
def test_a_null_model_survives_its_file(made, statistic, tmp_path):
    null = made(statistic)
    null.save(tmp_path / "null.safetensors")
    again = NullModel.load(tmp_path / "null.safetensors")
    assert again.header == null.header
    assert again.digest() == null.digest()
    assert again.header.null_from == "unselected"


def test_the_held_out_unselected_are_uniform_under_their_null(tiny_model, tokenizer, demo_texts):
    _, report = calibrate_and_check(
        tiny_model,
        tokenizer,
        [router.module for router in find_routers(tiny_model)],
        demo_texts,
        model_name="tiny",
        revision=None,
        text_name="demo",
        tokens=8192,
        length=128,
        kind=NullKind("weight", "layer", 0, "unselected"),
        progress=False,
    )
    assert all(layer.ks_distance < 0.05 for layer in report)


def test_benefits_are_no_norms(made):
    """The statistics differ, rather than being one number under two names."""
    benefits, norms = made("benefit").factors, made("contribution").factors
    correlation = [spearmanr(a, b).statistic for a, b in zip(benefits, norms, strict=True)]
    assert max(correlation) < 0.99


def test_select_experts_takes_arrays_and_paths(made, tmp_path):
    null = made("benefit", "layer")
    null.save(tmp_path / "null.safetensors")
    logits = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    options = {"layer": 1, "alpha": np.float32(0.5), "max_k": np.int64(8)}
    expected = select_experts(torch.from_numpy(logits), null, **options)
    found = select_experts(logits.tolist(), str(tmp_path / "null.safetensors"), **options)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rule": "min_w", "alpha": 0}, "positive number: found 0"),
        ({"rule": "p_value", "alpha": 1.5}, "strictly between 0 and 1: found 1.5"),
        ({"mass": 1.1}, "mass must be a number from 0 to 1: found 1.1"),
        ({"mass": 0.5, "renormalize": True}, "renormalize=True contradicts mass=0.5"),
        ({"rule": "topk", "k_per_layer": "5-x"}, "numbers of experts joined by '-'"),
        ({"rule": "bh", "k_per_layer": "5-3"}, "has no meaning with rule=bh"),
        ({"rule": "topk", "k_per_layer": "5-3", "max_k": 4}, "max_k=4 contradicts"),
        ({"family": "all", "budget": "layer", "target_experts": 4}, "contradicts family='all'"),
        ({"family": "all", "rule": "holm"}, "family='all' has no meaning with rule=holm"),
        ({"null_from": "selected"}, "null_from must be all or unselected"),
        ({"rule": "min_w", "null_scope": "model"}, "has no meaning with rule=min_w"),
    ],
)
def test_contradictions_are_one_clear_sentence(arguments, sentence):
    with pytest.raises(ParameterError) as caught:
        RoutingConfig(**arguments)
    assert sentence in str(caught.value)


def test_k_per_layer_of_another_length_is_refused(tiny):
    with pytest.raises(ParameterError, match="each of the 4 routed layers: found 3"):
        BHRoutingIntegration(tiny, rule="topk", k_per_layer="4-4-4")


def test_a_null_of_all_experts_is_none_of_the_unselected(made, tiny):
    null = made("weight", "model", "all")
    with pytest.raises(NullModelError, match="has null_from=all, not null_from=unselected"):
        BHRoutingIntegration(
            tiny, statistic="weight", null_scope="model", null_from="unselected", null_model=null
        )
