"""The only way from a router to experts: every host calls :func:`pick`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import Method
from .router import RouterOutput


class Picked(NamedTuple):
    """The experts of a batch of tokens.

    Attributes
    ----------
    indices : Tensor
        int64 ``[tokens, max_k]``, the best expert first; unused slots hold ``num_experts``.
    weights : Tensor
        float ``[tokens, max_k]``; unused slots hold 0.
    counts : Tensor
        int64 ``[tokens]``, how many slots are used.
    """

    indices: Tensor
    weights: Tensor
    counts: Tensor


def pick(method: Method, router: RouterOutput) -> Picked:
    """Return the experts that a method gives each token, and their weights.

    Parameters
    ----------
    method : Method
        The method, fitted to the layer.
    router : RouterOutput
        With ``method.asks(native_k)`` slots or more, unless the router weighs fewer experts.
    """
    if method.temperature != 1.0:
        router = router.tempered(method.temperature)
    k = method.max_k
    if method.fixed and method.follows_router:
        experts, weights = router.indices[:, :k], router.weights[:, :k]
        counts = torch.full(experts.shape[:1], k, dtype=torch.int64, device=experts.device)
        own = router.weights.shape[-1] == k and method.settings["renormalize"] is not True
        if own and not method.gains:  # exactly the weights of a model with this top-k
            return Picked(experts, weights, counts)
        return Picked(experts, method.weigh(weights, router, experts), counts)
    counts, experts, weights = _decided(method, router)
    unused = torch.arange(k, device=counts.device) >= counts.unsqueeze(-1)
    experts = experts.masked_fill(unused, method.num_experts)
    weights = method.weigh(weights.masked_fill(unused, 0.0), router, experts)
    return Picked(experts, weights, counts)


def repeated(picked: Picked, num_experts: int) -> Picked:
    """Fill unused slots with the first expert at weight 0, for engines that cannot skip slots."""
    first = picked.indices[:, :1]
    indices = torch.where(picked.indices == num_experts, first, picked.indices)
    return picked._replace(indices=indices)


def _decided(method: Method, router: RouterOutput) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's number of experts, the experts ``[tokens, max_k]``, and weights."""
    k, seen = method.max_k, router
    if torch.is_grad_enabled():  # decisions have no gradient, weights do
        seen = router._replace(logits=router.logits.detach(), weights=router.weights.detach())
    if method.joint:
        return _kept(method.keep_in_step(seen), router.indices, router.weights, method.min_k, k)
    scores = method.score(seen)
    experts, weights = router.indices[:, :k], router.weights[:, :k]
    if method.first_only:
        ranked = scores.gather(-1, experts)
        if not method.follows_router:
            ranked, order = method.rank(ranked)
            experts, weights = experts.gather(-1, order), weights.gather(-1, order)
    elif method.follows_router:
        ranked = scores.sort(dim=-1, descending=True).values  # the router's order is kept
    else:
        ranked, order = method.rank(scores)
        experts = order[:, :k]
        everyone = torch.zeros_like(scores, dtype=weights.dtype)
        weights = everyone.scatter(-1, router.indices, router.weights).gather(-1, experts)
    decision = method.decide(ranked) if not method.fixed else ranked.new_full(ranked.shape[:1], k)
    if decision.dtype == torch.bool:
        return _kept(decision[:, :k], experts, weights, method.min_k, k)
    return decision.clamp(method.min_k, k).long(), experts, weights


def _kept(
    kept: Tensor, experts: Tensor, weights: Tensor, min_k: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts, experts and weights of what a mask keeps; of others the first fill up."""
    front = kept.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    experts, weights = experts.gather(-1, front), weights.gather(-1, front)
    return kept.sum(-1).clamp(min_k, k), experts, weights
