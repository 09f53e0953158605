"""A grid from one pass equals each configuration alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_eval_bh import BHRoutingIntegration, NullModel, ParameterError, RoutingConfig
from lm_eval_bh.policies.preview import analyze_grid
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.parameter_grid import grid_of
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.calibration import collect_router_logits
from lm_eval_bh.routing.tables.null_kind import NullKind

KINDS = [(s, n) for s in ("logit", "contribution") for n in ("layer", "expert", "model")]


@pytest.fixture(scope="module")
def batches(ids):
    return [ids, ids[:1, :17]]


@pytest.fixture(scope="module")
def nulls(tiny_model_folder, ids):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    modules = [router.module for router in find_routers(model)]
    logits = collect_router_logits(model, modules, [ids], progress=False)
    norms = torch.linspace(0.5, 2, 4 * 64).view(4, 64).double().numpy()
    found = {
        NullKind(statistic, scope, None): NullModel.fit(
            logits, null_scope=scope, norms=norms if statistic == "contribution" else None
        )
        for statistic, scope in KINDS
    }
    # A rule without test takes any null model with output norms.
    found[NullKind("contribution", None, None, None)] = found[
        NullKind("contribution", "layer", None)
    ]
    return found


def configurations():
    rules = ["bh", "storey", "top_p"]
    for statistic, null in KINDS:
        yield from grid_of(rules, [0.5], [8, 20], min_k=2, statistic=statistic, null_scope=null)
    yield from grid_of(["topk", "min_p", "random_k"], [0.3], [4, 8])
    rules = ["topk", "random_k", "min_p", "oea", "xshare", "batch_min_w"]
    yield from grid_of(rules, [0.3, 0.5], [4, 8], decode_batch=64, step_budget=12)


def test_every_row_is_what_the_configuration_alone_would_select(tiny, nulls, batches):
    configs = list(configurations())
    rows = analyze_grid(tiny, find_routers(tiny), batches, configs, nulls, progress=False)
    assert [row.config for row in rows] == configs
    for row in rows:
        config = row.config
        seen = []
        routing = BHRoutingIntegration(
            tiny,
            config.replaced(mode="analyze"),
            null_model=nulls[config.null_kind] if config.needs_null else "auto",
        )
        routing.observers.append(lambda *what, seen=seen: seen.append(what))
        with routing, torch.no_grad():
            for batch in batches:
                tiny(batch)
        counts = torch.cat([selection.counts for _, _, selection in seen]).double()
        assert row.mean_experts == pytest.approx(float(counts.mean()))
        assert row.ceiling_share == pytest.approx(float((counts == config.max_k).double().mean()))
        adaptive = not METHODS[config.rule].fixed_count
        floor = float((counts == config.min_k).double().mean()) if adaptive else 0
        assert row.floor_share == pytest.approx(floor)
        overlaps, masses = [], []
        for _, logits, selection in seen:
            weights = torch.softmax(logits, -1)
            own = logits.topk(8).indices.tolist()
            for token, chosen in enumerate(selection.indices.tolist()):
                used = {expert for expert in chosen if expert < 64}
                overlaps.append(len(used & set(own[token])) / len(used | set(own[token])))
                masses.append(float(weights[token, sorted(used)].sum()))
        assert row.overlap == pytest.approx(sum(overlaps) / len(overlaps))
        assert row.distinct_experts == pytest.approx(routing.counters.mean_distinct())
        assert (row.distinct_experts is None) == (config.decode_batch is None)
        assert row.retained_mass == pytest.approx(sum(masses) / len(masses), rel=1e-5)
        layer = torch.cat([s.counts for at, _, s in seen if at == 2]).double().mean()
        assert row.layer_means[2] == pytest.approx(float(layer))


def test_the_model_is_run_once_and_left_as_it_was(tiny, nulls, batches):
    calls = []
    handle = tiny.model.register_forward_hook(lambda *_: calls.append(1))
    expected = tiny(batches[0]).logits
    calls.clear()
    analyze_grid(tiny, find_routers(tiny), batches, list(configurations()), nulls, progress=False)
    handle.remove()
    assert len(calls) == len(batches)
    assert torch.equal(tiny(batches[0]).logits, expected)
    assert not any(router.module._forward_hooks for router in find_routers(tiny))


def test_a_grid_that_does_not_fit_the_model_is_refused(tiny, batches, nulls):
    with pytest.raises(ParameterError, match="more than the model's 64 experts"):
        analyze_grid(tiny, find_routers(tiny), batches, grid_of(["bh"], [0.4], [65]), nulls)


def test_a_method_of_a_step_needs_to_know_its_rows(tiny, batches):
    with pytest.raises(ParameterError, match=r"rule=oea decides .* say by decode_batch"):
        analyze_grid(tiny, find_routers(tiny), batches, grid_of(["oea"], [0.4], [8]), {}, False)


def test_a_rule_without_alpha_has_one_row_for_each_max_k():
    found = [(config.rule, config.max_k) for config in grid_of(["oea", "bh"], [0.3, 0.4], [8])]
    assert found == [("oea", 8), ("bh", 8), ("bh", 8)]


def test_only_the_layers_of_a_configuration_count(tiny, nulls, batches):
    configs = [RoutingConfig(alpha=0.5, layers=layers) for layers in ("all", "2", "first2")]
    every, third, two = analyze_grid(tiny, find_routers(tiny), batches, configs, nulls, False)
    assert third.layer_means == every.layer_means[2:3]
    assert third.mean_experts == pytest.approx(every.layer_means[2])
    assert two.mean_experts == pytest.approx(sum(every.layer_means[:2]) / 2)


def test_a_target_is_refused_since_the_rule_is_not_at_work(tiny, nulls, batches):
    with pytest.raises(ParameterError, match="needs passes with the rule applied"):
        analyze_grid(
            tiny, find_routers(tiny), batches, [RoutingConfig(target_experts=5)], nulls, False
        )


@pytest.mark.parametrize("empty", range(3))
def test_an_empty_grid_is_refused(empty):
    axes = [["bh"], [0.4], [8]]
    axes[empty] = []
    with pytest.raises(ParameterError, match="grid is empty"):
        grid_of(*axes)
