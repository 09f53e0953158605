"""From what a router returns to what methods look at, wherever the router runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Method
from .router import RouterOutput, softmax_output

# How a router's logits become the score, to which a bias is added, that its experts are chosen by.
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
        How many experts have to be ranked; a softmax that ranks fewer is computed here.
    native_k, softmax, rescales, scores
        As in :class:`~lm_eval_bh.routing.methods.router.RouterOutput`.
    sorted_by : str or None
        The key of :data:`SCORES` that slots are sorted by; None where they are in order.
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
        """Return what a router says of ``[tokens]``.

        Parameters
        ----------
        output : tuple of Tensor
            Its logits, weights and indices.
        hidden_states : Tensor
            float ``[..., hidden]``, what it was given.
        bias : Tensor or None
            float, of each expert: what it adds to its scores when it ranks them.
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
    """Whether a router's very triple serves, in whatever order, if it is asked for so many."""
    return method.fixed and method.follows_router and method.max_k == asked


def choice_scores(score: str, router_logits: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a router ranks its experts by, float32 or better ``[tokens, experts]``."""
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    scores = SCORES[score](logits)
    return scores if bias is None else scores + bias.flatten().to(scores)
