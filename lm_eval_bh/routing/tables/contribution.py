"""Measures each expert's output norm over the tokens routed to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lm_eval_bh.errors import DataError
from lm_eval_bh.routing.patching.experts import each_expert
from lm_eval_bh.routing.tables.measurement import Array, Measurement, experts_beside


class OutputNorms(Measurement):
    """Mean Euclidean norm of every expert's output, before its weight."""

    name, listens = "norms", "experts"

    def __init__(self, model: nn.Module, routers: Sequence[nn.Module]) -> None:
        super().__init__(model, routers)
        sizes = [experts_beside(model, router).num_experts for router in routers]
        self._sums = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        self._tokens = [torch.zeros(size, dtype=torch.float64) for size in sizes]

    @torch.no_grad()
    def hear_experts(
        self, layer: int, module: Any, hidden_states: Tensor, indices: Tensor, weights: Tensor
    ) -> None:
        """Apply each token's experts again, and add up their output norms."""
        for expert, _, output in each_expert(module, hidden_states, indices):
            self._sums[layer][expert] += float(output.double().norm(dim=-1).sum())
            self._tokens[layer][expert] += len(output)

    def result(self) -> Array:
        """Return the mean norms, float64 ``[layers, experts]``, in units of the hidden state.

        An expert without tokens takes the mean of its layer's other experts.

        Raises
        ------
        DataError
            If there were no tokens.
        """
        if any(float(tokens.sum()) == 0 for tokens in self._tokens):
            raise DataError("There is no text to measure output norms on; pass at least one batch.")
        rows = []
        for sums, tokens in zip(self._sums, self._tokens, strict=True):
            means = sums / tokens
            rows.append(torch.where(tokens > 0, means, means[tokens > 0].mean()).numpy())
        return np.stack(rows)
