"""The oracle: the experts whose removal changes the layer's output least, found by trying them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Method
from .declare import Parameter, number
from .router import RouterOutput

CHANGE = "norm of what a layer's output for a token may change by"
CHUNK = 512  # tokens whose expert outputs are in memory at once


class Oracle(Method):
    """Remove experts one by one, always the one that changes the layer's output least.

    Starts from the native top-k and stops before the change's Euclidean norm exceeds ``alpha``: an
    absolute norm, so tokens and layers share one scale. With ``min_k = max_k``, that many experts
    remain. It runs all experts before it decides and so saves nothing: it shows how close other
    methods come to the layer's own output. It is greedy and ignores later layers.
    """

    name, label, alpha = "oracle", "oracle", CHANGE
    source = "this project: backward elimination by the layer's output"
    runs_experts = True
    declared = {  # noqa: RUF012
        "alpha": Parameter(1.0, CHANGE, *number("a positive number", lambda value: value > 0))
    }

    @classmethod
    def scored_by(cls, settings: Mapping[str, Any]) -> str:
        """Return the weight, by which outputs are multiplied."""
        return "weight"

    @property
    def follows_router(self) -> bool:
        """False: it looks at the experts' outputs."""
        return False

    @property
    def needs_native(self) -> bool:
        """True: experts are removed from the native top-k."""
        return True

    def asks(self, native_k: int) -> int:
        """Return the native k, or more experts if ``max_k`` is larger."""
        return max(self.max_k, native_k)

    @torch.no_grad()
    def score(self, router: RouterOutput) -> Tensor:
        """Return the smallest change of a removal with the expert, -inf beyond the native k.

        Float64 ``[tokens, experts]``.
        """
        if self.run_experts is None or router.hidden_states is None:
            raise ValueError("rule=oracle runs experts, so it needs a model: use hf-bh.")
        native = router.indices[:, : router.native_k]
        weights = router.native_weights[:, : router.native_k].double()
        found = []
        for at in range(0, len(native), CHUNK):
            rows = slice(at, at + CHUNK)
            outputs = self.run_experts(router.hidden_states[rows], native[rows])
            found.append(_eliminated(weights[rows].unsqueeze(-1) * outputs))
        scores = torch.full(router.logits.shape, -torch.inf, dtype=torch.float64)
        return scores.to(native.device).scatter(-1, native, torch.cat(found))

    def level(self, alpha: float) -> Tensor:
        """Return alpha, float64 ``[1]``."""
        return torch.tensor([alpha], dtype=torch.float64)

    def count(self, ranked: Tensor, level: Tensor | None) -> Tensor:
        """Return how many experts cannot be removed, int64 ``[tokens]``."""
        assert level is not None
        return (ranked > level).sum(-1)


def _eliminated(parts: Tensor) -> Tensor:
    """Return the change at which each weighted output ``[tokens, k, hidden]`` is removed."""
    gram = parts @ parts.transpose(1, 2)
    removed, orders, changes = torch.zeros_like(gram[..., 0]), [], []
    for _ in range(parts.shape[1]):
        inner = (gram @ removed.unsqueeze(-1)).squeeze(-1)
        now = (inner * removed).sum(-1, keepdim=True)
        after = now + 2 * inner + gram.diagonal(dim1=1, dim2=2)
        best = after.masked_fill(removed > 0, torch.inf).min(-1, keepdim=True)
        removed = removed.scatter(-1, best.indices, 1.0)
        orders.append(best.indices)
        changes.append(best.values.clamp(min=0).sqrt())
    # A later removal may cancel an earlier one: then both are allowed at the smaller change.
    least = torch.cat(changes, -1).flip(-1).cummin(-1).values.flip(-1)
    later = 1 + 1e-9 * torch.arange(parts.shape[1], device=parts.device)  # breaks ties
    return torch.zeros_like(removed).scatter(-1, torch.cat(orders, -1), least * later)
