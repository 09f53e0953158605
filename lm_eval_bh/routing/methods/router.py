"""The input of a method: one layer's router output for the tokens of a pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RouterOutput(NamedTuple):
    """A router's output for some tokens.

    Attributes
    ----------
    logits : Tensor
        float ``[tokens, experts]``.
    weights, indices : Tensor
        float and int64 ``[tokens, slots]``: the experts in the router's order, the first one first,
        and the weights that multiply their outputs.
    native_k : int
        How many of these the model itself uses.
    softmax : bool
        Whether weights are the softmax over all experts of the logits, rescaled or not.
    rescales : bool
        Whether the router rescales the weights of a token's slots to a fixed sum.
    scores : str
        How logits become scores, before any bias: "softmax", "sigmoid" or "sqrtsoftplus".
    hidden_states : Tensor or None
        float ``[tokens, hidden]``, the router's input.
    step : Tensor or None
        int64 ``[tokens]``: tokens with the same number, from 0 and below the number of tokens, are
        decided together; -1 takes the model's own top-k. None if all are decided together.
    recorded : Tensor or None
        int64 ``[tokens, k]``, the experts that a log holds for these tokens, the best first, and
        the number of experts in unused slots; None if no log is replayed.
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor
    native_k: int
    softmax: bool = True
    rescales: bool = False
    scores: str = "softmax"
    hidden_states: Tensor | None = None
    step: Tensor | None = None
    recorded: Tensor | None = None

    @property
    def native_weights(self) -> Tensor:
        """The weights ``[tokens, slots]`` in the scale of the native top-k."""
        if not self.rescales or self.weights.shape[-1] == self.native_k:
            return self.weights
        exact = self.weights.to(torch.promote_types(self.weights.dtype, torch.float32))
        native = exact[:, : self.native_k].sum(-1, keepdim=True)
        return exact * (exact.sum(-1, keepdim=True) / native)

    def tempered(self, temperature: float) -> RouterOutput:
        """Return a copy whose weights are a softmax of the logits over a temperature."""
        kind = torch.promote_types(self.logits.dtype, torch.float32)
        weights = torch.softmax(self.logits.to(kind) / temperature, dim=-1)
        weights = weights.gather(-1, self.indices)
        if self.rescales:
            weights = weights / weights.sum(-1, keepdim=True)
        return self._replace(weights=weights.to(self.weights.dtype))


def softmax_output(
    logits: Tensor,
    slots: int,
    native_k: int,
    *,
    rescales: bool = False,
    dtype: torch.dtype | None = None,
    hidden_states: Tensor | None = None,
    step: Tensor | None = None,
) -> RouterOutput:
    """Return the output of a router whose weights are a softmax over all its logits.

    Parameters
    ----------
    logits : Tensor
        float ``[tokens, experts]``.
    slots, native_k : int
        How many experts to rank, and how many the model itself takes.
    rescales : bool
        Whether the weights of a token's experts are rescaled to sum to one.
    dtype : torch.dtype or None
        Dtype of the weights; by default float32, or float64 where the logits are.
    hidden_states : Tensor or None
        float ``[tokens, hidden]``.
    step : Tensor or None
        int64 ``[tokens]``, see :class:`RouterOutput`.
    """
    kind = torch.promote_types(logits.dtype, torch.float32)
    # Exactly the calls of OLMoE's router, so that ties are broken alike.
    weights, indices = torch.topk(torch.softmax(logits, dim=-1, dtype=kind), slots, dim=-1)
    if rescales:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights if dtype is None else weights.to(dtype)
    return RouterOutput(
        logits,
        weights,
        indices,
        native_k,
        rescales=rescales,
        hidden_states=hidden_states,
        step=step,
    )
