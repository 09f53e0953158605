"""How alike the experts of a layer are: by what they give out for the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lm_eval_bh.routing.patching.experts import slot_outputs
from lm_eval_bh.routing.tables.measurement import Array, Measurement, experts_beside

TOKENS = 4096  # of the text, each of which all experts are run on
CHUNK = 128  # at a time


class Similarities(Measurement):
    """Similarities ``[layers, experts, experts]``, 1 of an expert to itself; arXiv:2602.07616.

    ``1 - |A_p - A_q| / max |A_p - A_q|``, the largest over the pairs of the layer; A are the
    outputs, not weighted, of an expert for all tokens of the text, whatever the router takes, and
    the norm is Frobenius', which the paper found best. The text is one sample, as in the authors'
    script.
    """

    name, listens = "similarities", "experts"

    def __init__(self, model: nn.Module, routers: Sequence[nn.Module]) -> None:
        super().__init__(model, routers)
        sizes = [experts_beside(model, router).num_experts for router in routers]
        self._products = [torch.zeros(size, size, dtype=torch.float64) for size in sizes]
        self._left = [TOKENS] * len(routers)

    @torch.no_grad()
    def hear_experts(
        self, layer: int, module: Any, hidden_states: Tensor, indices: Tensor, weights: Tensor
    ) -> None:
        """Add up the products of the outputs of all experts."""
        rows = hidden_states[: self._left[layer]]
        self._left[layer] -= len(rows)
        everyone = torch.arange(module.num_experts, device=indices.device)
        for some in rows.split(CHUNK) if len(rows) else ():
            outputs = slot_outputs(module, some, everyone.expand(len(some), -1))
            flat = outputs.transpose(0, 1).flatten(1)
            self._products[layer] += (flat @ flat.T).cpu()

    def result(self) -> Array:
        """Return them; all 1 in a layer whose experts give out the same."""
        found = []
        for products in self._products:
            own = products.diagonal()
            distances = (own + own.unsqueeze(1) - 2 * products).clamp(min=0).sqrt()
            found.append((1 - distances / distances.max().clamp(min=1e-300)).numpy())
        return np.stack(found)
