"""Turns a router's result into the input of methods, in every host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Method
from .router import RouterOutput, softmax_output

# How router logits become the scores that, plus a bias, choose the experts.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "logit": lambda logits: logits,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


@dataclass(frozen=True)
class Reading:
    """How one router's output is read.

    Attributes
    ----------
    slots : int
        Number of experts to rank; a softmax router that ranks fewer is computed here.
    native_k, softmax, rescales, scores
        As in :class:`~lm_eval_bh.routing.methods.router.RouterOutput`.
    sorted_by : str or None
        The key of :data:`SCORES` to sort slots by; None where they are in order.
    """

    slots: int
    native_k: int
    softmax: bool
    rescales: bool
    scores: str
    sorted_by: str | None = None

    def __call__(
        self,
        output: tuple[Tensor, Tensor, Tensor],
        hidden_states: Tensor,
        bias: Tensor | None = None,
    ) -> RouterOutput:
        """Return a router's output for ``[tokens]``.

        Parameters
        ----------
        output : tuple of Tensor
            Its logits, weights and indices.
        hidden_states : Tensor
            float ``[..., hidden]``, the router's input.
        bias : Tensor or None
            float ``[experts]``, added to the scores for ranking.
        """
        logits, weights, indices = output
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        if indices.shape[-1] < self.slots and self.softmax:
            return softmax_output(
                logits,
                self.slots,
                self.native_k,
                rescales=self.rescales,
                dtype=weights.dtype,
                hidden_states=hidden_states,
            )
        if self.sorted_by is not None:
            order = choice_scores(self.sorted_by, logits, bias).gather(-1, indices)
            order = order.argsort(dim=-1, descending=True, stable=True)
            weights, indices = weights.gather(-1, order), indices.gather(-1, order)
        return RouterOutput(
            logits=logits,
            weights=weights,
            indices=indices,
            native_k=self.native_k,
            softmax=self.softmax,
            rescales=self.rescales,
            scores=self.scores,
            hidden_states=hidden_states,
        )


def plain(method: Method, asked: int) -> bool:
    """Return whether a router's own triple serves, in any order, with this many slots."""
    return method.fixed and method.follows_router and method.max_k == asked


def choice_scores(score: str, router_logits: Tensor, bias: Tensor | None) -> Tensor:
    """Return the scores that rank a router's experts, float32 or better ``[tokens, experts]``."""
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    scores = SCORES[score](logits)
    return scores if bias is None else scores + bias.flatten().to(scores)
