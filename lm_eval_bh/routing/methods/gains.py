"""What the weights of the experts kept are multiplied by, whatever method has kept them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .declare import Parameter, choice, number, or_none, tried
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
        "what kept weights are multiplied by: (sum of the native top-k's weights / their sum) to "
        "this power, 0 to 1",
        *tried(or_none(number("a number from 0 to 1", lambda value: 0 <= value <= 1)), 0.2, 0.5),
    ),
}


def renormalized(kept: Tensor, router: RouterOutput) -> Tensor:
    """Rescale weights to the sum that the router gives them, or to one where it does not rescale.

    Parameters
    ----------
    kept : Tensor
        float ``[tokens, max_k]``, 0 in unused slots.
    router : RouterOutput
        Where they come from.
    """
    exact = kept.to(torch.promote_types(kept.dtype, torch.float32))
    wanted: Tensor | float = 1.0
    if router.rescales:
        wanted = router.weights.to(exact.dtype).sum(-1, keepdim=True)
    return (exact * (wanted / exact.sum(-1, keepdim=True))).to(kept.dtype)


def compensated(kept: Tensor, router: RouterOutput, mass: float) -> Tensor:
    """Multiply weights by (sum of the native top-k's weights / their sum) to the power ``mass``.

    At 0 kept weights stay as they are beside the native top-k; at 1 they sum to what these do.
    """
    exact = kept.to(torch.promote_types(kept.dtype, torch.float32))
    own = router.weights.to(exact.dtype)
    native = own[:, : router.native_k].sum(-1, keepdim=True)
    factor = (native / exact.sum(-1, keepdim=True)) ** mass
    if router.rescales and own.shape[-1] != router.native_k:  # in the scale of the native top-k
        factor = factor * (own.sum(-1, keepdim=True) / native)
    return (exact * factor).to(kept.dtype)


def gained(kept: Tensor, router: RouterOutput, settings: dict[str, Any]) -> Tensor:
    """Apply the gain that the settings name to weights ``[tokens, max_k]``."""
    if settings["mass"] is not None:
        return compensated(kept, router, settings["mass"])
    if settings["renormalize"] is True or (settings["renormalize"] == "auto" and router.rescales):
        return renormalized(kept, router)
    return kept
