"""Selection against scipy, statsmodels, and the direct p-value computation."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import chisquare, false_discovery_control
from statsmodels.stats.multitest import multipletests
from transformers.generation.logits_process import MinPLogitsWarper, TopPLogitsWarper

from lm_eval_bh import NullModel, ParameterError, RoutingError, select_experts
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.storey import null_share
from lm_eval_bh.routing.selection import reject

STATSMODELS = {
    "bh": "fdr_bh",
    "by": "fdr_by",
    "holm": "holm",
    "hochberg": "simes-hochberg",
    "bonferroni": "bonferroni",
    "fdr_tsbh": "fdr_tsbh",
}
BY_LOGITS = sorted(
    name
    for name, rule in METHODS.items()
    if not (rule.measured or rule.runs_experts or rule.recorded or rule.joint)
)
TESTS = [name for name, rule in METHODS.items() if rule.tests and not rule.joint]
ALPHAS = st.one_of(
    st.sampled_from([1e-9, 0.05, 0.3, 0.4, 0.5, 0.6, 0.999999]), st.floats(1e-6, 1 - 1e-6)
)
# Values around those that matter: exact zeros and ones, ties, and anything between.
P_VALUES = hnp.arrays(
    np.float64,
    st.integers(1, 128),
    elements=st.one_of(
        st.sampled_from([0.0, 1.0, 1e-300, 0.001, 0.01, 0.05, 0.4]),
        st.floats(0, 1),
        st.floats(0, 0.02),
    ),
)


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect():
    """Hide live objects from the collector, which statsmodels runs after every Holm decision."""
    gc.freeze()
    yield
    gc.unfreeze()


def random_null(seed: int = 0, layers: int = 1) -> NullModel:
    """Return a null model that does not state its number of experts."""
    rng = np.random.default_rng(seed)
    null = NullModel.fit({layer: rng.normal(size=(500, 16)) for layer in range(layers)})
    return dataclasses.replace(null, header=dataclasses.replace(null.header, num_experts=None))


def storey(p, alpha):
    """Storey's procedure word by word: BH at alpha / share of nulls, among p-values up to 1/2."""
    n, ordered = len(p), np.sort(p)
    null_share = (1 + sum(value > 0.5 for value in p)) / (n * (1 - 0.5))
    meets = [k for k in range(1, n + 1) if ordered[k - 1] <= min(k / n * (alpha / null_share), 0.5)]
    return p <= ordered[meets[-1] - 1] if meets else np.zeros(n, dtype=bool)


def by_others(p, alpha, rule):
    """Return the decisions of third-party code, or of the textbook's formula if there is none."""
    if rule == "storey":
        return storey(p, alpha)
    if rule == "p_value":
        return p <= alpha
    return multipletests(p, alpha=alpha, method=STATSMODELS[rule])[0]


@pytest.mark.parametrize("rule", TESTS)
@given(p=P_VALUES, alpha=ALPHAS)
def test_every_rule_decides_like_statsmodels(rule, p, alpha):
    expected = by_others(p, alpha, rule)
    assert reject(torch.from_numpy(p)[None], alpha, rule)[0].tolist() == expected.tolist()


def test_the_null_share_is_storeys():
    uniform = np.random.default_rng(0).uniform(size=(200, 5000))
    estimates = null_share(torch.from_numpy((uniform > 0.5).sum(1)), 5000)
    assert estimates.mean() == pytest.approx(1, abs=0.005)
    half = np.concatenate([uniform[:, :2500], np.zeros((200, 2500))], axis=1)
    share = null_share(torch.from_numpy((half > 0.5).sum(1)), 5000)
    assert share.mean() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize(("rule", "method"), [("bh", "bh"), ("by", "by")])
@given(p=P_VALUES, alpha=ALPHAS)
def test_bh_and_by_decide_like_scipy(rule, method, p, alpha):
    adjusted = false_discovery_control(p, method=method)
    # scipy divides where the procedure multiplies: at equality to the last bit the two may differ.
    assume(not np.any(np.isclose(adjusted, alpha, rtol=1e-12, atol=0)))
    assert (
        reject(torch.from_numpy(p)[None], alpha, rule)[0].tolist() == (adjusted <= alpha).tolist()
    )


@pytest.mark.parametrize("rule", TESTS)
@given(p=P_VALUES, alpha=ALPHAS, seed=st.integers(0, 2**31))
def test_decisions_do_not_depend_on_the_order(rule, p, alpha, seed):
    order = np.random.default_rng(seed).permutation(len(p))
    decided = reject(torch.from_numpy(p)[None], alpha, rule)[0]
    assert (
        reject(torch.from_numpy(p[order])[None], alpha, rule)[0].tolist() == decided[order].tolist()
    )


@given(p=P_VALUES, alphas=st.tuples(ALPHAS, ALPHAS))
def test_rules_are_nested_as_the_theory_says(p, alphas):
    low, high = (
        {
            name: set(
                reject(torch.from_numpy(p)[None], alpha, name)[0].nonzero().flatten().tolist()
            )
            for name in TESTS
        }
        for alpha in sorted(alphas)
    )
    assert low["bonferroni"] <= low["holm"] <= low["hochberg"] <= low["bh"]
    assert low["by"] <= low["bh"] <= low["fdr_tsbh"]
    assert all(low[name] <= high[name] for name in TESTS)


@pytest.mark.parametrize("rule", TESTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_thresholds_decide_like_p_values_on_the_real_tables(olmoe_null, rule, dtype):
    """The hot path compares logits; no decision may differ from comparing p-values."""
    generator = torch.Generator().manual_seed(0)
    differing = 0
    looks_twice = rule in ("fdr_tsbh", "storey")  # 65 times the thresholds: some layers will do
    for layer in range(0, olmoe_null.num_layers, 5 if looks_twice else 1):
        x, cdf = olmoe_null.cdf(layer)
        uniform = torch.rand(400, 64, generator=generator, dtype=torch.float64).numpy()
        logits = np.interp(uniform, cdf, x)
        logits[200:] += np.abs(np.random.default_rng(layer).normal(size=logits[200:].shape))
        logits = torch.from_numpy(logits).to(dtype)
        p = 1 - np.interp(logits.double().numpy(), x, cdf)
        for alpha in (0.05, 0.3, 0.4, 0.6):
            counts = select_experts(
                logits, olmoe_null, layer=layer, alpha=alpha, rule=rule, min_k=1, max_k=64
            ).counts
            expected = [max(1, int(by_others(row, alpha, rule).sum())) for row in p[::25]]
            differing += sum(a != b for a, b in zip(counts[::25].tolist(), expected, strict=True))
            direct = reject(olmoe_null.p_values(layer, logits), alpha, rule).sum(-1).clamp(min=1)
            differing += int((direct != counts).sum())
    assert differing == 0


def test_bfloat16_p_values_would_decide_differently(olmoe_null):
    """Why comparisons are made in float32: bfloat16 cannot tell p = 0.0061 from p = 0.0078."""
    x, cdf = olmoe_null.cdf(0)
    logits = torch.full((1, 64), float(x[0]))
    logits[0, 5] = float(np.interp(0.9939, cdf, x))
    p = olmoe_null.p_values(0, logits)
    assert float(p[0, 5]) <= 0.4 / 64
    assert int(reject(p, 0.4).sum()) == 1
    in_bfloat16 = 1 - (1 - p).to(torch.bfloat16)
    assert int(reject(in_bfloat16, 0.4).sum()) == 0


@given(
    logits=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 40)),
        elements=st.floats(-8, 8, width=32),
    ),
    alpha=ALPHAS,
    rule=st.sampled_from(BY_LOGITS),
    data=st.data(),
)
def test_a_selection_is_what_it_says(logits, alpha, rule, data):
    logits = torch.from_numpy(logits)
    tokens, experts = logits.shape
    max_k = data.draw(st.integers(1, experts))
    min_k = data.draw(st.integers(1, max_k))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 2.0]))
    null = random_null()
    indices, weights, counts = select_experts(
        logits, null, alpha=alpha, rule=rule, min_k=min_k, max_k=max_k, temperature=temperature
    )
    assert indices.shape == weights.shape == (tokens, max_k)
    assert indices.dtype == counts.dtype == torch.int64
    if METHODS[rule].tests:
        rejected = reject(null.p_values(0, logits), alpha, rule).sum(-1)
        assert counts.tolist() == rejected.clamp(min_k, max_k).tolist()
    elif not METHODS[rule].fixed_count:
        assert counts.min() >= min_k
        assert counts.max() <= max_k
    else:
        assert counts.tolist() == [max_k] * tokens
    probabilities = torch.softmax(logits / temperature, -1)
    for token in range(tokens):
        used = int(counts[token])
        chosen = indices[token, :used]
        assert (indices[token, used:] == experts).all()
        assert (weights[token, used:] == 0).all()
        assert len(set(chosen.tolist())) == used
        values = logits[token, chosen]
        assert (values[:-1] >= values[1:] - 1e-6).all()
        rest = torch.ones(experts, dtype=torch.bool)
        rest[chosen] = False
        if not METHODS[rule].random:
            assert not rest.any() or logits[token, rest].max() <= values.min() + 1e-6
        torch.testing.assert_close(weights[token, :used], probabilities[token, chosen])


@pytest.mark.parametrize(
    ("rule", "warper"), [("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)]
)
@given(
    logits=hnp.arrays(np.float32, (4, 24), elements=st.floats(-6, 6, width=32)),
    alpha=st.floats(0.01, 0.99),
)
def test_controls_take_as_many_as_the_samplers_of_transformers(rule, warper, logits, alpha):
    logits = torch.from_numpy(logits)
    shares = torch.softmax(logits.double(), -1).sort(descending=True).values
    edges = shares.cumsum(-1) if rule == "top_p" else shares / shares[:, :1]
    assume(not torch.isclose(edges, torch.tensor(alpha, dtype=torch.float64), atol=1e-5).any())
    kept = warper(alpha)(None, logits.clone()).isfinite().sum(-1)
    counts = select_experts(logits, None, alpha=alpha, rule=rule, max_k=24).counts
    assert counts.tolist() == kept.tolist()


class TestRandomK:
    LOGITS = torch.randn(4000, 16, generator=torch.Generator().manual_seed(4))

    def draw(self, logits=LOGITS, **options):
        return select_experts(logits, None, **{"rule": "random_k", "max_k": 4} | options).indices

    def test_a_token_draws_the_same_in_every_batch(self):
        whole = self.draw()
        order = torch.randperm(4000, generator=torch.Generator().manual_seed(5))
        assert torch.equal(self.draw(self.LOGITS[order]), whole[order])
        assert torch.equal(torch.cat([self.draw(row) for row in self.LOGITS.split(7)]), whole)

    def test_rounding_of_the_logits_changes_no_draw(self):
        noisy = self.LOGITS * (1 + 1e-7 * torch.randn(4000, 16))
        assert (self.draw(noisy) == self.draw()).all(-1).float().mean() > 0.998

    @pytest.mark.parametrize("other", [{"seed": 1}, {"layer": 1}])
    def test_another_seed_or_layer_draws_others(self, other):
        assert (self.draw(**other).sort().values == self.draw().sort().values).all(
            -1
        ).float().mean() < 0.01

    def test_every_expert_is_as_likely_and_pairs_are_independent(self):
        drawn = torch.nn.functional.one_hot(self.draw(), 16).sum(1).numpy()
        assert chisquare(drawn.sum(0)).pvalue > 1e-3
        pairs = (drawn.T @ drawn)[np.triu_indices(16, 1)]
        assert chisquare(pairs).pvalue > 1e-3
        best = self.LOGITS.argmax(-1).numpy()
        assert drawn[np.arange(4000), best].mean() == pytest.approx(4 / 16, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 4, 8, 64])
def test_equal_bounds_give_the_top_k_of_olmoe_bit_for_bit(dtype, k):
    """Rounded logits tie often; ties must be broken as in the model's own router."""
    logits = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[:50] = logits[:50].round()
    top, expected = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float), k, dim=-1)
    selection = select_experts(logits, random_null(), min_k=k, max_k=k)
    assert torch.equal(selection.indices, expected)
    assert torch.equal(selection.weights, top)


def test_weights_are_differentiable_and_unused_slots_get_no_gradient():
    logits = torch.randn(
        6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True
    )
    null = random_null()

    def weights(z):
        return select_experts(z, null, alpha=0.6, max_k=4).weights

    assert torch.autograd.gradcheck(weights, (logits,))


def test_renormalised_weights_sum_to_one():
    logits = torch.randn(20, 16, generator=torch.Generator().manual_seed(3))
    weights = select_experts(logits, random_null(), renormalize=True).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(20))


def test_temperature_changes_weights_and_never_the_selection():
    logits = 2 * torch.randn(20, 16, generator=torch.Generator().manual_seed(3))
    cold, hot = (select_experts(logits, random_null(), temperature=t) for t in (0.5, 2.0))
    assert torch.equal(cold.indices, hot.indices)
    assert torch.equal(cold.counts, hot.counts)
    assert not torch.allclose(cold.weights, hot.weights)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"alpha": 0.0},
            "strictly between 0 and 1: found 0.0",
        ),
        ({"alpha": 1.0}, "found 1.0"),
        ({"alpha": float("nan")}, "found nan"),
        ({"alpha": "0.4"}, "found '0.4'"),
        pytest.param({"alpha": 10**5000}, "found a number of thousands of digits", id="huge"),
        ({"max_k": 2, "min_k": 3}, "max_k=2 is less than min_k=3"),
        ({"max_k": 65}, "more than the model's 16 experts"),
        ({"max_k": 2.5}, "max_k must be an integer"),
        ({"max_k": True}, "found True"),
        ({"min_k": 0}, "1 or more: found 0"),
        ({"rule": "bhh"}, "did you mean 'bh'"),
        ({"temperature": 0}, "temperature must be a positive number, at least 1e-30: found 0"),
        ({"renormalize": "yes"}, "renormalize must be auto, True or False: found 'yes'"),
        ({"layer": 1}, "layer"),
        ({"seed": -1, "rule": "random_k"}, "found -1"),
        ({"seed": 1}, "seed=1 has no meaning with rule=bh"),
    ],
)
def test_bad_parameters_are_one_clear_sentence(arguments, sentence):
    with pytest.raises(ParameterError) as caught:
        select_experts(torch.randn(3, 16), random_null(), **arguments)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_name_the_layer(value):
    logits = torch.zeros(2, 16)
    logits[1, 3] = value
    with pytest.raises(RoutingError, match="layer 0"):
        select_experts(logits, random_null())


def test_a_test_needs_a_null_model_and_top_k_does_not():
    with pytest.raises(ParameterError, match="needs a null model"):
        select_experts(torch.randn(2, 16), None)
    assert select_experts(torch.randn(2, 16), None, rule="topk").counts.tolist() == [8, 8]


def test_logits_of_a_wrong_shape_are_refused():
    with pytest.raises(ParameterError, match=r"\[tokens, experts\]"):
        select_experts(torch.randn(2, 3, 16), random_null())


@pytest.mark.parametrize("rule", ["bh", "top_p"])
@pytest.mark.parametrize("norms", [None, np.ones((1, 8))], ids=["logit", "contribution"])
def test_a_null_model_of_other_routers_is_refused(rule, norms):
    null = NullModel.fit({0: torch.randn(50, 8)}, norms=norms)
    with pytest.raises(ParameterError, match="has 8 experts per layer, but the router logits have"):
        select_experts(torch.randn(3, 16), null, rule=rule)
    with pytest.raises(ParameterError, match="layers 0 to 0: found 1"):
        select_experts(torch.randn(3, 8), null, layer=1, rule=rule)
