"""Replay: the experts that a routing log holds for each token."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .base import Method
from .declare import Parameter, or_none
from .router import RouterOutput


def _folder(value: Any) -> str:
    """Return a path as text."""
    path = os.fspath(value)
    if not isinstance(path, str) or not path:
        raise ValueError
    return path


class Replay(Method):
    """Serve recorded experts, with the router's current weights.

    References
    ----------
    Ma et al. 2025, "Stabilizing MoE reinforcement learning by aligning training and inference
    routers", arXiv:2510.11370: replay of the routing of a rollout.
    """

    name, label = "replay", "replay"
    source = "Ma et al. 2025, arXiv:2510.11370"
    recorded = True
    declared = {  # noqa: RUF012
        "routes": Parameter(
            None,
            "for `replay`, the folder of the full routing log whose experts serve again",
            *or_none((_folder, "the folder of a full routing log")),
        )
    }

    @property
    def follows_router(self) -> bool:
        """False: it follows a log."""
        return False

    def score(self, router: RouterOutput) -> Tensor:
        """Return each recorded expert's place, counted from the last; -inf for others."""
        if router.recorded is None:
            raise ValueError("rule=replay needs the experts recorded in a log.")
        tokens, k = router.recorded.shape
        places = torch.arange(k, 0, -1.0, device=router.logits.device).expand(tokens, k)
        scores = places.new_full((tokens, self.num_experts + 1), -torch.inf)  # one for unused slots
        return scores.scatter(-1, router.recorded, places)[:, :-1]

    def decide(self, ranked: Tensor) -> Tensor:
        """Return the number of recorded experts, int64 ``[tokens]``."""
        return (ranked > -torch.inf).sum(-1)
