"""The random baseline ``random_k``: experts drawn at random, the same for the same token.

A generator's state would make a token's experts depend on which tokens came before it, and so on
the batch size; so the draw is a hash of the seed, the layer, and the order of the token's largest
logits. The order, and not the logits' bits: these differ in the last digit between batch shapes,
while the order changes only where two logits all but tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

HASHED = 8  # a token is identified by the experts of its 8 largest logits


def random_experts(router_logits: Tensor, k: int, seed: int, layer: int) -> Tensor:
    """Draw ``k`` different experts for every token, each set equally likely over seeds.

    Parameters
    ----------
    router_logits : Tensor
        float ``[tokens, experts]``.
    k, seed, layer : int
        How many; and what else the draw depends on.

    Returns
    -------
    Tensor
        int64 ``[tokens, k]``, by descending logit.
    """
    tokens, experts = router_logits.shape
    device = router_logits.device
    state = _mixed(torch.full((tokens,), seed * 65537 + layer, dtype=torch.int64, device=device))
    for index in router_logits.topk(min(HASHED, experts), dim=-1).indices.unbind(-1):
        state = _mixed(state + index)
    lots = _mixed(state.unsqueeze(-1) + torch.arange(experts, device=device))
    drawn = lots.argsort(dim=-1)[:, :k]
    by_logit = router_logits.gather(-1, drawn).argsort(dim=-1, descending=True, stable=True)
    return drawn.gather(-1, by_logit)


def _mixed(state: Tensor) -> Tensor:
    """Return a hash of int64 numbers: a step of SplitMix64 (Steele et al. 2014, OOPSLA)."""
    state = state - 7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number; wraps around
    state = (state ^ _shifted(state, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    state = (state ^ _shifted(state, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
