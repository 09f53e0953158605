"""A layer's settings and tables decide what ``select`` decides, whatever the policy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lm_eval_bh.errors import PolicyError
from lm_eval_bh.export.layer_tables import layer_tables
from lm_eval_bh.export.portable.adaptive_selection import AdaptiveSelection
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.nulls.null_kind import NullKind
from lm_eval_bh.routing.nulls.null_model import NullModel
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.routing.rules.registry import RULES
from lm_eval_bh.routing.scores.statistic import STATISTICS, scores
from lm_eval_bh.routing.selection import select
from lm_eval_bh.routing.selector import Selector

TOKENS, EXPERTS, HIDDEN, LAYERS, NATIVE = 400, 16, 6, 2, 4
LEVELS = {"top_p": 0.6, "min_p": 0.3, "min_w": 0.08}
STEPWISE = [name for name, rule in RULES.items() if rule.tests]
OTHERS = ["topk", "top_p", "min_p", "min_w"]

CONFIGS = [
    *({"rule": rule} for rule in (*STEPWISE, *OTHERS)),
    *(
        {"rule": rule, "statistic": statistic}
        for rule in ("bh", "holm", "p_value", "top_p", "topk", "min_w")
        for statistic in ("weight", "contribution", "benefit", "predicted")
    ),
    *(
        {"rule": rule, "null_scope": scope, "statistic": statistic}
        for rule, scope, statistic in itertools.product(
            ("bh", "holm", "fdr_tsbh", "storey", "p_value"),
            ("expert", "model"),
            ("logit", "contribution"),
        )
    ),
    {"rule": "bh", "min_k": 6, "max_k": 6, "null_scope": "expert"},
    {"rule": "min_w", "min_k": 6, "max_k": 6, "statistic": "benefit"},
    {"rule": "topk", "k_per_layer": "5-3"},
    {"rule": "bh", "layers": "last1"},
    {"rule": "bh", "min_k": 2, "max_k": 3},
    {"rule": "bh", "temperature": 0.5},
    {"rule": "min_w", "alpha": 0.03, "max_k": 5, "mass": 0.5, "temperature": 1.5},
    {"rule": "bh", "temperature": 2.0, "statistic": "contribution"},
    {"rule": "bh", "renormalize": True},
    {"rule": "bh", "renormalize": False},
    {"rule": "min_w", "mass": 0.5},
    {"rule": "bh", "mass": 1.0, "max_k": 2, "statistic": "benefit"},
]


def rows(size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def policy_of(parameters):
    """Return a policy with a null model fitted on random numbers, where its rule needs one."""
    config = RoutingConfig.of({"alpha": LEVELS.get(parameters["rule"], 0.3)} | parameters)
    null = None
    if config.needs_null:
        row = STATISTICS[config.scored_by]
        factors = None
        if row.factors:
            shape = (LAYERS, HIDDEN + 2, EXPERTS) if row.predicts else (LAYERS, EXPERTS)
            factors = np.abs(rows(shape, 3).double().numpy()) + 0.5
        found = []
        for layer in range(LAYERS):
            logs = None if factors is None else torch.from_numpy(np.log(factors[layer]))
            logs = logs[-1] if row.predicts else logs
            found.append(scores(rows((2000, EXPERTS), layer), row.name, logs))
        kind = NullKind(row.name, config.null_scope).made()
        null = NullModel.from_scores(found, kind, factors)
    return Policy(config, "f" * 64, LAYERS, EXPERTS, NATIVE, null_model=null)


def router(logits, k, normalizes):
    """Return what a router of OLMoE or Mixtral gives."""
    weights, indices = torch.softmax(logits, -1, dtype=torch.float).topk(k)
    return weights / weights.sum(-1, keepdim=True) if normalizes else weights, indices


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("parameters", CONFIGS, ids=str)
def test_it_decides_the_same(parameters, normalizes):
    policy = policy_of(parameters)
    config = policy.config
    hidden = rows((TOKENS, HIDDEN), 8)
    for layer, own in enumerate(layer_tables(policy, normalizes=normalizes)):
        logits = rows((TOKENS, EXPERTS), 9 + layer) * 1.5
        selection = AdaptiveSelection(own.settings)
        selection.load_state_dict(own.tables)
        weights, indices = selection(logits, hidden)
        assert bool((indices < EXPERTS).all())
        if layer not in config.select_layers(LAYERS):
            expected = router(logits, NATIVE, normalizes)
            assert torch.equal(indices, expected[1])
            torch.testing.assert_close(weights, expected[0])
            continue
        mine = config.for_layer(layer, LAYERS)
        asked = max(mine.max_k, NATIVE) if mine.mass is not None else mine.max_k
        found = select(
            logits,
            Selector(mine, policy.null_model, layer, EXPERTS),
            router(logits, asked, normalizes),
            normalizes=normalizes,
            hidden_states=hidden,
            native_k=NATIVE,
        )
        assert torch.equal((weights > 0).sum(-1), found.counts)
        used = found.indices < EXPERTS
        assert torch.equal(indices[used], found.indices[used])
        torch.testing.assert_close(weights, found.weights, rtol=2e-6, atol=1e-7)
        if not mine.fixed_count:
            assert len(set(found.counts.tolist())) > 1, "the case would prove nothing"


def test_unused_slots_repeat_or_skip():
    [own, _] = layer_tables(policy_of({"rule": "min_p"}), normalizes=False)
    logits = rows((50, EXPERTS), 1)
    for unused, wanted in (("repeat", None), ("skip", EXPERTS)):
        selection = AdaptiveSelection(own.settings, unused)
        selection.load_state_dict(own.tables)
        weights, indices = selection(logits, rows((50, HIDDEN), 2))
        empty = weights == 0
        assert bool(empty.any())
        expected = indices[:, :1].expand_as(indices) if wanted is None else wanted
        assert bool((indices == expected)[empty].all())
    with pytest.raises(ValueError, match="'repeat' or 'skip'"):
        AdaptiveSelection(own.settings, "drop")


def test_a_cast_of_the_model_rounds_no_threshold():
    policy = policy_of({"rule": "bh"})
    [own, _] = layer_tables(policy, normalizes=False)
    selection = AdaptiveSelection(own.settings)
    selection.load_state_dict(own.tables)
    before = selection(rows((TOKENS, EXPERTS), 1), rows((TOKENS, HIDDEN), 2))
    after = selection.to(torch.bfloat16)(rows((TOKENS, EXPERTS), 1), rows((TOKENS, HIDDEN), 2))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"rule": "random_k"}, "the nearest that can be exported is rule=topk"),
        ({"rule": "topk", "mode": "analyze"}, "only counts"),
    ],
)
def test_what_no_engine_can_do_is_refused(parameters, sentence):
    with pytest.raises(PolicyError, match=sentence):
        layer_tables(policy_of(parameters), normalizes=False)
