"""How well one expert can replace another: a scalar and its error per ordered pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_bh.routing.patching.experts import slot_outputs
from lm_eval_bh.routing.tables.measurement import Array, Measurement, experts_beside

TOKENS = 8192  # tokens of text for comparing expert outputs in pairs
CHUNK = 512  # tokens at a time
NEVER = 2.0  # error of a pair without tokens, larger than any other


class Folds(Measurement):
    """Scalars and errors, ``[layers, 2, experts, experts]``, to replace row by column.

    The scalar c minimises ``sum w_s^2 |E_s - c E_t|^2`` over the tokens that have both; the error
    is the minimum divided by the sum at c = 0.
    """

    name, listens = "folds", "experts"

    def __init__(self, model: nn.Module, routers: Sequence[nn.Module]) -> None:
        super().__init__(model, routers)
        sizes = [experts_beside(model, router).num_experts for router in routers]
        self._sums = [torch.zeros(3, n, n, dtype=torch.float64) for n in sizes]
        self._seen = [0] * len(routers)

    @torch.no_grad()
    def hear_experts(
        self, layer: int, module: Any, hidden_states: Tensor, indices: Tensor, weights: Tensor
    ) -> None:
        """Add up the products of the outputs of each token's experts."""
        left = max(0, TOKENS - self._seen[layer])
        self._seen[layer] += len(hidden_states[:left])
        for at in range(0, len(hidden_states[:left]), CHUNK):
            rows = slice(at, min(at + CHUNK, left))
            outputs = slot_outputs(module, hidden_states[rows], indices[rows])
            gram = (outputs @ outputs.transpose(1, 2)).cpu()  # [tokens, slots, slots]
            own = gram.diagonal(dim1=1, dim2=2)
            squares = weights[rows].double().cpu().square().unsqueeze(-1)
            pairs = indices[rows].unsqueeze(-1).cpu(), indices[rows].unsqueeze(1).cpu()
            parts = gram, own.unsqueeze(1).expand_as(gram), own.unsqueeze(-1).expand_as(gram)
            for total, part in zip(self._sums[layer], parts, strict=True):
                total.index_put_(pairs, squares * part, accumulate=True)

    def result(self) -> Array:
        """Return scalars and errors; 0 and :data:`NEVER` for pairs without tokens."""
        found = []
        for both, of_target, of_source in self._sums:
            seen = (of_target > 0) & (of_source > 0)
            scalar = torch.where(seen, both / of_target.clamp(min=1e-300), 0.0)
            error = 1 - scalar * both / of_source.clamp(min=1e-300)
            found.append(torch.stack([scalar, torch.where(seen, error.clamp(0, 1), NEVER)]))
        return torch.stack(found).numpy()
