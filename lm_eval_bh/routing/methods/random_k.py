"""Random experts: the control for the choice of experts.

With a generator's state, a token's experts would depend on the tokens before it, and so on the
batch size; the draw is therefore a hash of the seed, the layer, and the order of the token's
largest logits. Not of the logits' bits: their last digits differ between batch shapes, whereas the
order changes only between near ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Method
from .declare import Parameter, integer
from .router import RouterOutput

HASHED = 8  # a token is identified by the experts of its 8 largest logits


class RandomK(Method):
    """Draw ``max_k`` distinct experts per token, with all sets equally likely over seeds."""

    name, label = "random_k", "random-k"
    source = "random baseline: max_k experts drawn at random"
    fixed_count = random = True
    declared = {  # noqa: RUF012
        "seed": Parameter(
            0,
            "seed of `random_k`",
            *integer(f"an integer from 0 to {2**32 - 1}", 0, 2**32 - 1),
        )
    }

    @property
    def follows_router(self) -> bool:
        """False: experts are drawn."""
        return False

    def score(self, router: RouterOutput) -> Tensor:
        """Return the logits of the experts drawn, and -inf for all others."""
        logits = router.logits.to(torch.promote_types(router.logits.dtype, torch.float32))
        tokens, experts = logits.shape
        start = self.settings["seed"] * 65537 + self.settings["layer"]
        state = _mixed(torch.full((tokens,), start, dtype=torch.int64, device=logits.device))
        for index in logits.topk(min(HASHED, experts), dim=-1).indices.unbind(-1):
            state = _mixed(state + index)
        lots = _mixed(state.unsqueeze(-1) + torch.arange(experts, device=logits.device))
        drawn = lots.argsort(dim=-1)[:, : self.max_k]
        return torch.full_like(logits, -torch.inf).scatter(-1, drawn, logits.gather(-1, drawn))


def _mixed(state: Tensor) -> Tensor:
    """Return a hash of int64 numbers: a step of SplitMix64 (Steele et al. 2014, OOPSLA)."""
    state = state - 7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number; wraps around
    state = (state ^ _shifted(state, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    state = (state ^ _shifted(state, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
