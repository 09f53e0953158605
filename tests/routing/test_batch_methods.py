"""Methods of a step against a slow plain reference: sets and sums, one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lm_eval_bh import NullModel, ParameterError, RoutingConfig, RoutingError, select_experts
from lm_eval_bh.routing.fitted import fitted_method
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.pick import pick
from lm_eval_bh.routing.methods.router import softmax_output
from lm_eval_bh.routing.tables.null_kind import NullKind

EXPERTS, NATIVE = 16, 4
CONFIGS = [
    *({"rule": "oea", "k0": k0, "max_k": k} for k0, k in ((1, 4), (2, 6), (4, 4))),
    *({"rule": "xshare", "step_budget": m, "k0": k0} for m, k0 in ((6, 0), (3, 1), (16, 0))),
    *(
        {"rule": "batch_mass", "step_budget": m, "fallback": fallback, "statistic": statistic}
        for m, fallback, statistic in (
            (5, "own", "weight"),
            (5, "loaded", "benefit"),
            (2, "loaded", "weight"),
        )
    ),
    *(
        {"rule": "batch_min_w", "alpha": alpha, "power": power, "fallback": fallback, "min_k": k}
        for alpha, power, fallback, k in (
            (0.2, 2, "own", 1),
            (0.2, 2, "loaded", 1),
            (0.9, 1, "loaded", 2),
            (90.0, 1, "loaded", 1),
        )
    ),
    {"rule": "batch_min_w", "alpha": 0.3, "statistic": "benefit", "max_k": 6, "mass": 0.2},
    *({"rule": "batch_bh", "alpha": a, "combine": c} for c, a in (("simes", 0.3), ("fisher", 0.2))),
    *(
        {"rule": "sere", "k0": k0, "alpha": alpha, "max_k": max_k, "min_k": min_k}
        for k0, alpha, max_k, min_k in ((1, 0.0, 4, 1), (1, 0.6, 4, 1), (2, 0.6, 6, 3))
    ),
]
SERE = [parameters for parameters in CONFIGS if parameters["rule"] == "sere"]
FACTORS = np.linspace(0.5, 1.5, EXPERTS)
POINTS = np.random.default_rng(1).random((EXPERTS, 3))
SIMILAR = 1 - np.linalg.norm(POINTS[:, None] - POINTS, axis=-1) / 3**0.5


def logits_of(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, EXPERTS, generator=generator).double() * 1.5


# The tokens of each step; 48 rows are more than there are experts.
STEPS = {
    "steps of several sizes": [0, 0, 0, 1, 2, 2, 1, 0, 5, 5, 5, 5],
    "one row": [0],
    "more rows than experts": [0] * 48,
    "prompts beside them": [0, -1, 0, 0, -1, 3, 3, -1],
    "only prompts": [-1, -1],
}


def null_of(config):
    if not config.needs_null:
        return None
    logits = logits_of(400, 7)
    if config.rule == "sere":
        kind = NullKind("weight", tables=config.tables).made()
        return NullModel.from_scores([logits], kind, None, {"similarities": SIMILAR[None]})
    if config.scored_by == "logit":
        return NullModel.fit({0: logits})
    scores = torch.log_softmax(logits, -1) + torch.from_numpy(np.log(FACTORS))
    return NullModel.from_scores([scores], NullKind(config.scored_by).made(), FACTORS[None])


def picked(parameters, logits, step, rescales=False):
    config = RoutingConfig(**{"max_k": NATIVE} | parameters)
    null = null_of(config)
    method = fitted_method(config, null, 0, EXPERTS)
    steps = None if step is None else torch.tensor(step)
    said = softmax_output(logits, method.asks(NATIVE), NATIVE, step=steps, rescales=rescales)
    return pick(method, said), config, null


def reference(config, null, logits, step):
    """Return each token's experts, the best first."""
    z = logits.numpy()
    weights = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    scores = weights * FACTORS if config.statistic == "benefit" else weights
    order = [sorted(range(EXPERTS), key=lambda e: (-row[e], e)) for row in weights]
    found = [[] for _ in z]
    for number in set(step):
        members = [token for token, own in enumerate(step) if own == number]
        if number < 0:
            for token in members:
                found[token] = order[token][:NATIVE]
            continue
        if config.rule == "sere":
            for token, targets in rerouted(config, order, members).items():
                found[token] = sorted(set(targets.values()), key=order[token].index)
            continue
        loaded = _loaded(config, null, z, scores, order, members)
        for token in members:
            within = [e for e in order[token] if e in loaded]
            own = [e for e in order[token][: config.max_k] if e in loaded]
            if METHODS[config.rule].beyond:
                own = within
            elif len(own) < config.min_k and config.fallback == "loaded":
                own = within[: config.min_k]
            rest = [e for e in order[token] if e not in own]
            own = own + rest[: max(config.min_k - len(own), 0)]
            found[token] = own[: config.max_k]
    return found


def rerouted(config, order, members):
    """Return for each token which expert serves in place of each of its first."""
    first = max(config.k0, config.min_k)
    primary = {e for token in members for e in order[token][:first]}
    critical = {e for e in range(EXPERTS) if max(SIMILAR[e, v] for v in primary) < config.alpha}
    return {
        token: {
            e: e if e in primary | critical else min(primary, key=lambda v: (-SIMILAR[e, v], v))
            for e in order[token][: config.max_k]
        }
        for token in members
    }


def _loaded(config, null, z, scores, order, members):
    totals = dict.fromkeys(range(EXPERTS), 0.0)
    if config.rule == "oea":
        return {e for token in members for e in order[token][: config.k0]}
    if config.rule == "batch_bh":
        p = np.array([null.p_values(0, torch.tensor(z[token])).numpy() for token in members])
        if config.combine == "fisher":
            combined = [stats.combine_pvalues(p[:, e], "fisher").pvalue for e in totals]
        else:
            n = len(members)
            combined = [min(n * v / (i + 1) for i, v in enumerate(sorted(p[:, e]))) for e in totals]
        return set(np.flatnonzero(multipletests(combined, config.alpha, "fdr_bh")[0]))
    power = config.power if config.rule == "batch_min_w" else 1
    everywhere = config.rule == "xshare"
    for token in members:
        for e in order[token] if everywhere else order[token][: config.max_k]:
            totals[e] += scores[token][e] ** power
    if config.rule == "batch_min_w":
        return {e for e, total in totals.items() if total >= config.alpha}
    needed = {e for token in members for e in order[token][: config.k0 if everywhere else 0]}
    by_total = sorted(totals, key=lambda e: (e not in needed, -totals[e], e))
    return {e for e in by_total[: config.step_budget] if totals[e] > 0} | needed


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("parameters", CONFIGS, ids=str)
def test_a_step_loads_and_serves_what_the_reference_does(parameters, step):
    logits = logits_of(len(step))
    found, config, null = picked(parameters, logits, step)
    expected = reference(config, null, logits, step)
    for token, experts in enumerate(expected):
        assert found.indices[token, : found.counts[token]].tolist() == experts


@pytest.mark.parametrize("gain", [{}, {"mass": 0.5, "max_k": 3}, {"renormalize": True}], ids=str)
@pytest.mark.parametrize("rescales", [False, True])
@pytest.mark.parametrize("parameters", SERE, ids=str)
def test_experts_that_serve_for_others_have_their_weights(parameters, rescales, gain):
    step = [0] * 5 + [1] * 3 + [-1]
    logits = logits_of(len(step), 3)
    found, config, _ = picked(parameters | gain, logits, step, rescales)
    weights = torch.softmax(logits, -1).numpy()
    order = [sorted(range(EXPERTS), key=lambda e: (-row[e], e)) for row in weights]
    handed_on = 0
    for members in ([*range(5)], [5, 6, 7]):
        for token, targets in rerouted(config, order, members).items():
            first = weights[token][order[token]][:NATIVE].sum()
            expected = dict.fromkeys(targets.values(), 0.0)
            for expert, target in targets.items():
                expected[target] += weights[token, expert]
            total, native = sum(expected.values()), 1 if rescales else first
            factor = 1 / total if rescales or "renormalize" in gain else 1
            if "mass" in gain:
                factor = (first / total) ** 0.5 * native / first
            count = int(found.counts[token])
            ours = zip(found.indices[token, :count].tolist(), found.weights[token], strict=False)
            assert {e: float(w) for e, w in ours} == pytest.approx(
                {e: weight * factor for e, weight in expected.items()}
            )
            handed_on += sum(target != expert for expert, target in targets.items())
    assert handed_on > 0 or config.fixed_count
    prompt = order[-1][: min(NATIVE, config.max_k)]
    assert found.indices[-1, : len(prompt)].tolist() == prompt


@pytest.mark.parametrize("parameters", CONFIGS, ids=str)
def test_rows_that_are_all_alike_share_all_experts(parameters):
    logits = logits_of(1).repeat(12, 1)
    found, config, null = picked(parameters, logits, [0] * 12)
    assert found.indices.unique(dim=0).shape[0] == 1
    assert (
        found.indices[0, : found.counts[0]].tolist() == reference(config, null, logits, [0] * 12)[0]
    )


@pytest.mark.parametrize("parameters", CONFIGS, ids=str)
def test_without_steps_all_tokens_are_one(parameters):
    logits = logits_of(9)
    together, _, _ = picked(parameters, logits, None)
    told, _, _ = picked(parameters, logits, [0] * 9)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(together, told, strict=True))


def test_equal_sums_load_the_expert_of_the_smaller_index():
    logits = torch.zeros(3, EXPERTS, dtype=torch.float64)
    found, _, _ = picked({"rule": "xshare", "step_budget": 2, "max_k": 2}, logits, [0, 0, 0])
    assert found.indices.sort(-1).values.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"decode_batch": 0}, "decode_batch must be an integer number of rows, 1 or more: found 0"),
        (
            {"rule": "batch_mass", "step_budget": 1, "min_k": 2},
            "step_budget=1 is less than min_k=2",
        ),
        ({"rule": "oea", "target_experts": 4}, "target_experts=4 has no meaning with rule=oea"),
        ({"rule": "oea", "target_distinct": 4}, "target_distinct=4 has no meaning with rule=oea"),
        ({"rule": "batch_min_w", "target_distinct": 9}, "has no meaning without decode_batch"),
        ({"batch_seed": 3}, "batch_seed=3 has no meaning without decode_batch"),
        ({"rule": "bh", "step_budget": 3}, "step_budget=3 has no meaning with rule=bh"),
        ({"phase": "prefill"}, "phase must be all or decode"),
    ],
)
def test_what_says_nothing_is_refused(parameters, sentence):
    with pytest.raises(ParameterError, match=sentence):
        RoutingConfig(**parameters)


def test_a_budget_above_the_experts_is_refused():
    with pytest.raises(ParameterError, match="step_budget=17 is more than the model's 16 experts"):
        RoutingConfig(rule="xshare", step_budget=17).check_experts(16)


def test_select_experts_decides_over_steps():
    logits = logits_of(6).float()
    told = select_experts(logits, rule="oea", max_k=4, step=[0, 0, 0, 1, 1, 1])
    halves = [select_experts(part, rule="oea", max_k=4) for part in logits.split(3)]
    assert torch.equal(told.indices, torch.cat([half.indices for half in halves]))
    with pytest.raises(ParameterError, match="step must have a number for each of the 6 tokens"):
        select_experts(logits, rule="oea", step=[0, 1])


def test_a_step_that_is_not_finite_is_refused():
    with pytest.raises(RoutingError):
        select_experts([[math.nan] * 4], rule="oea", max_k=2)
