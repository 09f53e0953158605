"""The oracle removes the experts with the smallest effect on the layer's output."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lm_eval_bh import BHRoutingIntegration, ParameterError, select_experts

LAYER = 1


def weighted_outputs(block, x):
    """Return the native experts ``[tokens, 8]`` and what each adds, ``[tokens, 8, hidden]``."""
    with torch.no_grad():
        _, weights, chosen = block.gate(x)
        gate, up = block.experts.gate_up_proj[chosen].chunk(2, dim=2)
        inner = F.silu(torch.einsum("tkih,th->tki", gate, x)) * torch.einsum("tkih,th->tki", up, x)
        outputs = torch.einsum("tkhi,tki->tkh", block.experts.down_proj[chosen], inner)
    return chosen, (weights.unsqueeze(-1) * outputs).double().numpy()


def picked(tiny, ids, **options):
    """Return the layer's hidden states, and what the oracle picks for them."""
    seen, found = [], []
    handle = tiny.model.layers[LAYER].mlp.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, -2))
    )
    routing = BHRoutingIntegration(tiny, rule="oracle", layers=str(LAYER), **options)
    routing.observers.append(lambda layer, logits, selection: found.append(selection))
    with routing, torch.no_grad():
        tiny(ids)
    handle.remove()
    return seen[0], found[0]


def removed_norm(parts, chosen, kept):
    return np.linalg.norm(parts[[e not in kept for e in chosen]].sum(0))


def test_it_keeps_what_trying_every_expert_one_by_one_keeps(tiny, ids):
    x, found = picked(tiny, ids[:, :24], alpha=0.5)
    chosen, outputs = weighted_outputs(tiny.model.layers[LAYER].mlp, x)
    assert len(found.counts.unique()) > 2
    for token, (experts, parts) in enumerate(zip(chosen.tolist(), outputs, strict=True)):
        left, best = list(range(8)), list(range(8))
        while len(left) > 1:
            without = [
                np.linalg.norm(parts[[i for i in range(8) if i not in left or i == out]].sum(0))
                for out in left
            ]
            left = [i for i in left if i != left[int(np.argmin(without))]]
            if min(without) <= 0.5:
                best = left
        kept = found.indices[token, : found.counts[token]].tolist()
        assert set(kept) == {experts[i] for i in best}


def test_of_four_experts_it_leaves_out_hardly_more_than_the_best_four_would(tiny, ids):
    x, found = picked(tiny, ids[:, :24], min_k=4, max_k=4)
    chosen, outputs = weighted_outputs(tiny.model.layers[LAYER].mlp, x)
    sums = {"oracle": 0.0, "best": 0.0, "top-4": 0.0}
    for token, (experts, parts) in enumerate(zip(chosen.tolist(), outputs, strict=True)):
        every = itertools.combinations(experts, 4)
        sums["best"] += min(removed_norm(parts, experts, kept) for kept in every)
        sums["oracle"] += removed_norm(parts, experts, found.indices[token].tolist())
        sums["top-4"] += removed_norm(parts, experts, experts[:4])
    assert sums["best"] <= sums["oracle"] <= 1.05 * sums["best"]
    assert sums["oracle"] < 0.9 * sums["top-4"]


def test_without_experts_the_sentence_says_where_it_can_be_used():
    with pytest.raises(ParameterError, match="use it with hf-bh"):
        select_experts(torch.randn(2, 16), rule="oracle", alpha=1.0)
