"""Every family of transformers that records router logits, with tiny random models."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from families import EXPERTS, IDS, TOP_K, build, examine, families, null_of, run, stock
from plain_picks import faults

from lm_eval_bh import BHRoutingIntegration, ModelError, ParameterError
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.selection import reject

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about tiny configurations

# These are refused for a reason, or want more than a tiny configuration; all others must work.
REFUSED = {"doge", "ernie4_5_vl_moe", "jetmoe", "llama4", "longcat_flash"}
NOT_BUILT = {"dbrx", "switch_transformers", "zaya"}
ROOT = Path(__file__).resolve().parents[3]
TRANSFORMERS = re.search(
    r"^transformers==([\d.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M
)[1]
SUPPORTED = [name for name in families() if name not in REFUSED | NOT_BUILT]
# These select as many experts as they always do.
RIGID = {"diffusion_gemma", "gemma4", "openai_privacy_filter", "phimoe"}
EAGER_CRASHES = {"gpt_oss", "nemotron_h", "openai_privacy_filter"}


@pytest.fixture(params=SUPPORTED)
def family(request):
    """Return a working family; with the constraints' version all of these have to work."""
    if transformers.__version__ != TRANSFORMERS and examine(request.param).behaviour is None:
        pytest.skip(f"{request.param} here: {examine(request.param).fault}")
    return request.param


def test_no_family_gets_lost():
    """Most return the triple that ``min_w`` needs; transformers 5.19 has fewer families."""
    assert sum(examine(name).behaviour is not None for name in families()) > 45
    if transformers.__version__ == TRANSFORMERS:
        assert {name for name in families() if not examine(name).built} == NOT_BUILT


@pytest.mark.parametrize("family", sorted(REFUSED & set(families())))
def test_what_is_refused_is_refused_when_constructed_in_one_sentence(family):
    with pytest.raises(ModelError, match=r"not supported|no MoE routers") as caught:
        BHRoutingIntegration(build(family), rule="topk", max_k=2)
    assert str(caught.value).count("\n") == 0


def test_static_k_is_the_stock_model_of_that_k_bit_for_bit(family):
    """Correction biases are nonzero here, so that the order of experts differs from the logits'."""
    model = stock(family)
    own = run(model, IDS)
    for k in (1, TOP_K, 6):
        if family in RIGID and k != examine(family).behaviour.slots:
            continue
        expected = own if k == TOP_K else run(build(family, k), IDS)
        with BHRoutingIntegration(model, rule="topk", max_k=k) as routing:
            assert torch.equal(run(model, IDS), expected), k
            assert routing.get_routing_stats()["mean_experts_per_token"] == k
        null = null_of(model)
        with BHRoutingIntegration(model, min_k=k, max_k=k, kde=null):
            assert torch.equal(run(model, IDS), expected), k
    assert torch.equal(run(model, IDS), own)  # and no trace is left


def test_weight_by_benefit_with_mass_is_what_a_slow_plain_reference_picks(family):
    """The base is the router's own weight, of the experts that it ranks first; or its softmax."""
    assert faults(family, "min_w") == ()


@pytest.mark.parametrize("rule", ["top_p", "min_p"])
def test_shares_are_of_the_weights_that_the_router_gives(family, rule):
    if family in RIGID:
        with pytest.raises(ParameterError, match="use rule=min_w"):
            BHRoutingIntegration(stock(family), rule=rule, max_k=2)
    else:
        assert faults(family, rule) == ()


def test_a_router_whose_sum_depends_on_k_keeps_the_sum_that_its_block_reckons_with():
    family = "openai_privacy_filter"
    if family not in families():
        pytest.skip("this version of transformers does not have it")
    model = build(family)
    for k in (1, 2):
        expected = run(build(family, k), IDS)
        with BHRoutingIntegration(model, rule="topk", max_k=k):
            torch.testing.assert_close(run(model, IDS), expected)


def test_phimoe_has_two_slots_whatever_it_says():
    model = build("phimoe")
    assert {router.top_k for router in find_routers(model)} == {2}
    with BHRoutingIntegration(model, rule="topk", max_k=1) as routing:
        assert run(model, IDS).isfinite().all()
        assert routing.counters.mean() == 1
    with pytest.raises(ParameterError, match="at most 2"):
        BHRoutingIntegration(model, rule="topk", max_k=4)


def test_fewer_experts_are_the_first_of_the_routers_own(family):
    """A token with c experts has the experts and weights of top-c."""
    model = copy.deepcopy(stock(family))
    behaviour = examine(family).behaviour
    max_k = behaviour.slots if family in RIGID else TOP_K
    null = null_of(model)
    routers = find_routers(model)
    inputs = {}
    for layer, router in enumerate(routers):
        router.module.register_forward_pre_hook(
            lambda _, args, layer=layer: inputs.update({layer: copy.deepcopy(args)})
        )
    seen = {}
    with BHRoutingIntegration(model, alpha=0.5, max_k=max_k, kde=null) as routing:
        routing.observers.append(lambda at, z, selection: seen.update({at: (z, selection)}))
        run(model, IDS)
    own = {}  # what each router takes of the same input at every k
    for layer, router in enumerate(routers):
        for k in range(1, max_k + 1):
            if family not in RIGID:
                router.module.top_k = k
            with torch.no_grad():
                own[layer, k] = router.module.forward(*inputs[layer])
        router.module.top_k = router.top_k
    counts = set()
    for layer, (z, selection) in seen.items():
        rejected = reject(null.p_values(layer, z.float()), 0.5).sum(-1).clamp(1, max_k)
        assert torch.equal(selection.counts, rejected)
        for token, count in enumerate(rejected.tolist()):
            counts.add(count)
            indices = selection.indices[token]
            assert (indices[count:] == EXPERTS).all()
            assert (selection.weights[token, count:] == 0).all()
            _, weights, taken = own[layer, count]
            dense = torch.zeros(EXPERTS).scatter(
                0, indices[:count], selection.weights[token, :count]
            )
            if family in RIGID:
                assert set(indices[:count].tolist()) <= set(taken[token].tolist())
                continue
            expected = torch.zeros(EXPERTS).scatter(0, taken[token], weights[token])
            torch.testing.assert_close(dense, expected)
    assert len(counts) > 1


def test_what_a_router_is_said_to_do_is_what_it_does(family):
    model = copy.deepcopy(stock(family))
    seen = []
    for router in find_routers(model):
        router.module.register_forward_hook(lambda _, __, out: seen.append(out))
    run(model, IDS)
    for logits, weights, indices in seen:
        assert logits.shape == (IDS.numel(), EXPERTS)
        sums = weights.float().sum(-1)
        behaviour = examine(family).behaviour
        assert bool(sums.std() < 1e-3 * sums.mean()) == behaviour.normalizes
        scores = torch.softmax(logits.float(), -1)
        top = scores.topk(behaviour.slots, -1).values
        plain = weights.float().sort(-1, descending=True).values
        same = any(torch.allclose(plain, t) for t in (top, top / top.sum(-1, keepdim=True)))
        assert same == behaviour.softmax
        assert indices.shape[-1] == behaviour.slots


def test_experts_agree_on_unused_slots_or_are_refused(family):
    model = stock(family)
    null = null_of(model)
    arguments = {"alpha": 0.5, "max_k": 2, "kde": null}
    with BHRoutingIntegration(model, **arguments) as routing:
        expected = run(model, IDS)
        assert routing.get_routing_stats()["mean_experts_per_token"] < 2
    for experts in ("eager", "grouped_mm", "batched_mm"):
        if experts == "eager" and family in EAGER_CRASHES:
            with pytest.raises(ParameterError, match="use experts_implementation=ragged"):
                BHRoutingIntegration(model, experts=experts, **arguments).patch_model()
            continue
        with BHRoutingIntegration(model, experts=experts, **arguments):
            torch.testing.assert_close(run(model, IDS), expected, rtol=1e-4, atol=1e-4)


def test_scores_that_are_no_softmax_are_never_made_up():
    model = build("deepseek_v3")
    null = null_of(model)
    with pytest.raises(ParameterError, match="leave it at 1"):
        BHRoutingIntegration(model, max_k=4, kde=null, temperature=2.0)
    with pytest.raises(ParameterError, match="at most 4"):
        BHRoutingIntegration(model, max_k=6, kde=null, mode="analyze")
    # A softmax of the top-k's logits is a rescaled softmax; Granite's router works since 5.21.
    family = "granitemoe" if examine("granitemoe").behaviour is not None else "mixtral"
    with BHRoutingIntegration(build(family), rule="top_p", alpha=0.4, temperature=2.0):
        pass


def test_analyze_mode_changes_no_bit_of_a_router_with_a_bias():
    model = build("deepseek_v3")
    null = null_of(model)
    expected = run(model, IDS)
    usage = {}
    for mode in ("analyze", "patch"):
        with BHRoutingIntegration(
            model, alpha=0.5, max_k=3, kde=null, mode=mode, layers="0"
        ) as routing:
            out = run(model, IDS)
            usage[mode] = routing.counters.usage[0]
        assert torch.equal(out, expected) == (mode == "analyze")
    assert torch.equal(usage["analyze"], usage["patch"])


def test_the_table_in_the_documentation_is_the_one_that_comes_out_now(monkeypatch):
    if transformers.__version__ != TRANSFORMERS:
        pytest.skip(f"the table is of transformers {TRANSFORMERS}")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import table_families

    page = (ROOT / table_families.PAGE).read_text(encoding="utf-8")
    assert table_families.with_table(page) == page
