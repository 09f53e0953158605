"""Slow plain references of ``min_w``, ``top_p`` and ``min_p`` in any family, by token.

Nothing here knows how a router ranks or weighs experts. It is queried for 1, 2, ... experts of the
same hidden states: the expert added at k is its k-th, with the weight that it then has.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import torch
from families import EXPERTS, IDS, examine, run, stock

from lm_eval_bh import BHRoutingIntegration, NullModel
from lm_eval_bh.routing.routers import find_routers

MASS, MAX_K = 0.2, 6


class OwnPicks:
    """The behaviour of one router on some tokens.

    Attributes
    ----------
    logits : ndarray ``[tokens, experts]``
    native_k : int
        Its own top-k.
    softmax, rescales : bool
        Its observed use of logits.
    at : list of dict, by token, then by number of experts
        Expert -> weight, when queried for this number.
    """

    def __init__(self, router: Any, args: Any, numbers: list[int]) -> None:
        module, self.native_k = router.module, router.top_k
        self.softmax, self.rescales = router.softmax, router.normalizes
        before = getattr(module, "top_k", None)
        self.at: list[dict[int, dict[int, float]]] = [{} for _ in range(IDS.numel())]
        for k in numbers:
            if router.behaviour.obeys:
                module.top_k = k
            with torch.no_grad():
                logits, weights, indices = module.forward(*copy.deepcopy(args))
            if router.behaviour.obeys:
                module.top_k = before
            self.logits = logits.double().numpy()
            for token, (row, own) in enumerate(
                zip(indices.tolist(), weights.tolist(), strict=True)
            ):
                self.at[token][k] = dict(zip(row, own, strict=True))

    def first(self, token: int, k: int) -> list[int]:
        """Return its first k experts in its order; experts added together are in any order."""
        taken: list[int] = []
        for number in sorted(n for n in self.at[token] if n <= k):
            taken += [e for e in self.at[token][number] if e not in taken]
        return taken

    def weights(self, token: int, k: int) -> dict[int, float]:
        """Return the weights of its first k, in the scale that the native ones have."""
        native, more = self.at[token][self.native_k], self.at[token][max(k, self.native_k)]
        one = next(iter(native))
        return {e: native[one] * more[e] / more[one] for e in self.first(token, k)}


def min_w(
    own: OwnPicks, token: int, benefits: Any, alpha: float, bounds: tuple[int, int]
) -> dict[int, float]:
    """Return experts and weights: those that add at least alpha, of the router's first."""
    min_k, max_k = bounds
    weights, added = own.weights(token, max_k), added_by(own, token, benefits, max_k)
    best = sorted(added, key=lambda e: -added[e])
    kept = best[: max(min_k, sum(added[e] >= alpha for e in best))]
    native = sum(own.at[token][own.native_k].values())
    factor = (native / sum(weights[e] for e in kept)) ** MASS
    return {e: weights[e] * factor for e in kept}


def added_by(own: OwnPicks, token: int, benefits: Any, max_k: int) -> dict[int, float]:
    """Return what the router's first experts add: its own weight, or its softmax, by benefit."""
    weights = own.weights(token, max_k)
    base = softmax(own.logits[token]) if own.softmax else weights
    return {e: base[e] * benefits[e] for e in weights}


def by_share(
    own: OwnPicks, token: int, rule: str, alpha: float, bounds: tuple[int, int]
) -> dict[int, float]:
    """Return experts and weights of ``top_p`` or ``min_p``."""
    (min_k, max_k), shares = bounds, shares_of(own, token)
    best = sorted(shares, key=lambda e: -shares[e])
    if rule == "top_p":
        count = 1 + int(sum(np.cumsum([shares[e] for e in best]) < alpha))
    else:
        count = sum(shares[e] >= alpha * shares[best[0]] for e in best)
    kept, weights = best[: min(max(count, min_k), max_k)], own.weights(token, EXPERTS)
    native = sum(own.at[token][own.native_k].values())
    factor = native / sum(weights[e] for e in kept) if own.rescales else 1
    return {e: weights[e] * factor for e in kept}


def shares_of(own: OwnPicks, token: int) -> dict[int, float]:
    """Return every expert's share of its token's weight."""
    if own.softmax:
        return dict(enumerate(softmax(own.logits[token])))
    weights = own.weights(token, EXPERTS)
    return {e: weight / sum(weights.values()) for e, weight in weights.items()}


def softmax(logits: Any) -> Any:
    """Return shares that sum to one."""
    exact = np.exp(logits - logits.max())
    return exact / exact.sum()


@functools.cache
def benefits_of(layers: int) -> NullModel:
    """Return a null model with random benefits."""
    draw = torch.Generator().manual_seed(4)
    scores = {layer: torch.randn(200, EXPERTS, generator=draw) for layer in range(layers)}
    benefits = torch.rand(layers, EXPERTS, generator=draw).double().numpy() + 0.2
    return NullModel.fit(scores, statistic="benefit", factors=benefits)


def own_picks(model: torch.nn.Module) -> list[OwnPicks]:
    """Return every router's behaviour on ``IDS`` in the unchanged model."""
    return ask(model, hear(model))


def hear(model: torch.nn.Module) -> list[Any]:
    """Return every router's input for ``IDS``."""
    heard: dict[int, Any] = {}
    handles = [
        router.module.register_forward_pre_hook(
            lambda _, args, at=at: heard.update({at: copy.deepcopy(args)})
        )
        for at, router in enumerate(find_routers(model))
    ]
    run(model, IDS)
    for handle in handles:
        handle.remove()
    return [heard[at] for at in range(len(heard))]


def ask(model: torch.nn.Module, given: list[Any]) -> list[OwnPicks]:
    """Return every router's behaviour on its input, for 1 to 16 experts if adjustable."""
    every = list(range(1, EXPERTS + 1))
    return [
        OwnPicks(router, args, every if router.behaviour.obeys else [router.top_k])
        for router, args in zip(find_routers(model), given, strict=True)
    ]


@functools.cache
def faults(family: str, rule: str) -> tuple[str, ...]:
    """Return the differences of a rule from the reference; empty if it is exact."""
    model, behaviour = stock(family), examine(family).behaviour
    before = own_picks(model)
    null = benefits_of(len(before))
    min_k, max_k = bounds = (2, MAX_K) if behaviour.obeys else (1, behaviour.slots)
    parameters: dict[str, Any] = {"rule": rule, "min_k": min_k, "max_k": max_k}
    if rule == "min_w":
        parameters |= {"statistic": "benefit", "mass": MASS, "null_model": null}
    alpha = parameters["alpha"] = middle(rule, before, null, max_k)
    seen: dict[int, Any] = {}
    with BHRoutingIntegration(model, **parameters) as routing:
        routing.observers.append(lambda at, logits, picked: seen.update({at: picked}))
        given = hear(model)
    found, counts = [], set()
    for layer, own in enumerate(ask(model, given)):
        picked = seen[layer]
        for token, count in enumerate(picked.counts.tolist()):
            counts.add(count)
            if rule == "min_w":
                expected = min_w(own, token, null.factors[layer], alpha, bounds)
            else:
                expected = by_share(own, token, rule, alpha, bounds)
            experts = picked.indices[token, :count].tolist()
            weights = picked.weights[token, :count].tolist()
            if experts != list(expected) or not np.allclose(
                weights, list(expected.values()), rtol=1e-4, atol=1e-7
            ):
                found.append(f"layer {layer}, token {token}: {experts} {weights}, not {expected}")
    if len(counts) < 2:
        found.append("the case would prove nothing")
    return tuple(found)


def middle(rule: str, owns: list[OwnPicks], null: NullModel, max_k: int) -> float:
    """Return a threshold that about half of the tokens reach with the expert in the middle."""
    found = []
    for own, benefits in zip(owns, null.factors, strict=True):
        for token in range(IDS.numel()):
            if rule == "min_w":
                added = sorted(added_by(own, token, benefits, max_k).values(), reverse=True)
                found.append(added[len(added) // 2])
            else:
                shares = sorted(shares_of(own, token).values(), reverse=True)
                found.append(sum(shares[:3]) if rule == "top_p" else shares[2] / shares[0])
    return float(np.median(found)) * (1 - 1e-4)  # no expert is exactly there
