"""Gains: factors on the weights of the kept experts, with any method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .declare import Parameter, choice, integer, number, or_none, tried
from .router import RouterOutput

PARAMETERS = {
    "renormalize": Parameter(
        "auto",
        "whether the selected weights are rescaled to sum to one; `auto` follows the model "
        "(OLMoE: no)",
        *tried(choice(["auto", True, False])),
    ),
    "mass": Parameter(
        None,
        "factor of the kept weights: (sum of the native top-k's weights / their sum) to this "
        "power, 0 to 1",
        *tried(
            or_none(number("a number from 0 to 1", lambda value: 0 <= value <= 1)), 0.0, 0.2, 0.5
        ),
    ),
    "k2": Parameter(
        None,
        "number of the router's first experts whose sum `mass` uses in place of the native "
        "top-k's; alone, weights are divided by that sum if the model divides by the native one",
        *or_none(integer("a number of experts, 1 or more", 1)),
    ),
    "fold": Parameter(
        False,
        "whether each native expert that is left out adds its weight to the kept one that replaces "
        "it best, times a scalar calibrated for the pair",
        *choice([False, True]),
    ),
    "affine": Parameter(
        False,
        "whether each layer's routed output is scaled and shifted, channel by channel, to the mean "
        "and deviation that it has at the native top-k, fitted on calibration text",
        *choice([False, True]),
    ),
}


def renormalized(kept: Tensor, router: RouterOutput) -> Tensor:
    """Rescale weights to the router's sum, or to one if the router does not rescale.

    Parameters
    ----------
    kept : Tensor
        float ``[tokens, max_k]``, 0 in unused slots.
    router : RouterOutput
        Source of the weights.
    """
    exact = kept.to(torch.promote_types(kept.dtype, torch.float32))
    wanted: Tensor | float = 1.0
    if router.rescales:
        wanted = router.weights.to(exact.dtype).sum(-1, keepdim=True)
    return (exact * (wanted / exact.sum(-1, keepdim=True))).to(kept.dtype)


def compensated(kept: Tensor, router: RouterOutput, mass: float, k2: int | None = None) -> Tensor:
    """Multiply weights by (sum of the first k2 experts' weights / their sum) to the power ``mass``.

    ``k2`` is the native top-k by default: a mass of 0 then leaves the kept weights as they are
    beside the native top-k, and a mass of 1 makes them sum to the native top-k's. A model that
    rescales divides its weights by the sum of the native top-k; here the first k2 replace it, so
    that at a mass of 0 the expert branch is as strong as with k2 experts (Chen and Yao 2026,
    "Training-free halving of activated experts in fine-grained mixture-of-experts models",
    arXiv:2609.04575, equation 2).
    """
    k2 = k2 or router.native_k
    exact = kept.to(torch.promote_types(kept.dtype, torch.float32))
    own = router.weights.to(exact.dtype)
    reference = own[:, :k2].sum(-1, keepdim=True)
    factor = (reference / exact.sum(-1, keepdim=True)) ** mass
    if router.rescales and own.shape[-1] != k2:  # to the router's sum
        factor = factor * (own.sum(-1, keepdim=True) / reference)
    return (exact * factor).to(kept.dtype)


def folded(kept: Tensor, experts: Tensor, router: RouterOutput, folds: Tensor) -> Tensor:
    """Fold the native experts that are left out into the kept ones.

    Expert s adds ``w_s c_st`` to the weight of the kept t with the smallest calibrated error.
    Nothing is rescaled afterwards, since c includes the ratio of magnitudes. The confidence that
    the paper adds for DeepSeek-V4's router is left out (Wu et al. 2026, "ExFold: unified expert
    folding for training-free MoE prefill-decode acceleration", arXiv:2608.24938).

    Parameters
    ----------
    kept, experts : Tensor
        float and int64 ``[tokens, max_k]``, in the scale of the native top-k; unused slots hold 0
        and the number of experts.
    router : RouterOutput
        Source of the weights.
    folds : Tensor
        float ``[2, experts, experts]``: c and its error, to fold row experts into column experts.
    """
    exact = kept.to(torch.promote_types(kept.dtype, torch.float32))
    native = router.indices[:, : router.native_k]
    weights = router.native_weights[:, : router.native_k].to(exact.dtype)
    used = experts < folds.shape[-1]
    targets = experts.clamp(max=folds.shape[-1] - 1)
    scalars, errors = folds[:, native.unsqueeze(-1), targets.unsqueeze(1)].to(exact.dtype)
    best = errors.masked_fill(~used.unsqueeze(1), torch.inf).argmin(-1)
    there = ((native.unsqueeze(-1) == experts.unsqueeze(1)) & used.unsqueeze(1)).any(-1)
    added = weights * scalars.gather(-1, best.unsqueeze(-1)).squeeze(-1)
    return exact.scatter_add(-1, best, added.masked_fill(there, 0)).to(kept.dtype)


def gained(kept: Tensor, router: RouterOutput, settings: dict[str, Any]) -> Tensor:
    """Apply the gain that the settings name to weights ``[tokens, max_k]``."""
    if settings["mass"] is not None or settings.get("k2") is not None or settings.get("fold"):
        return compensated(kept, router, settings["mass"] or 0.0, settings.get("k2"))
    if settings["renormalize"] is True or (settings["renormalize"] == "auto" and router.rescales):
        return renormalized(kept, router)
    return kept
