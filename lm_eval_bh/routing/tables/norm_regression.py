"""Learns to predict the norm of each expert's output from the hidden state, by ridge regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import DataError
from lm_eval_bh.routing.patching.experts import each_expert
from lm_eval_bh.routing.tables.measurement import Array, Measurement, experts_beside

PENALTY = 1e-3  # relative to the mean variance of a hidden state's entries
TOKENS = 8192  # tokens to measure all experts on: far more than hidden dimensions


class NormRegression(Measurement):
    """Sums for the regression of all experts' output norms on hidden states, in float64."""

    name, listens = "predictor", "experts"

    def __init__(self, model: nn.Module, routers: Sequence[nn.Module]) -> None:
        super().__init__(model, routers)
        for router in routers:
            experts_beside(model, router)  # refuses experts that cannot be run one by one
        self._gram: list[Any] = [None] * len(routers)
        self._cross: list[Any] = [None] * len(routers)
        self._seen = [0] * len(routers)

    @torch.no_grad()
    def hear_experts(
        self, layer: int, module: Any, hidden_states: Tensor, indices: Tensor, weights: Tensor
    ) -> None:
        """Apply every expert to the tokens ``[tokens, hidden]``, and add up the norms."""
        hidden_states = hidden_states[: TOKENS - self._seen[layer]]
        if not len(hidden_states):
            return
        everything = torch.arange(module.num_experts, device=hidden_states.device)
        indices = everything.expand(len(hidden_states), -1)
        norms = torch.stack(
            [
                output.double().norm(dim=-1)
                for _, _, output in each_expert(module, hidden_states, indices)
            ],
            dim=-1,
        ).cpu()
        x = _with_one(hidden_states.double().cpu())
        gram, cross = x.T @ x, x.T @ norms
        first = self._seen[layer] == 0
        self._gram[layer] = gram if first else self._gram[layer] + gram
        self._cross[layer] = cross if first else self._cross[layer] + cross
        self._seen[layer] += len(hidden_states)

    def result(self) -> Array:
        """Return the predictors, float64 ``[layers, hidden + 2, experts]``.

        The rows are the coefficients of the hidden state, the intercept, and the mean norm.

        Raises
        ------
        DataError
            If there were no tokens.
        """
        if not all(self._seen):
            raise DataError("There is no text to measure output norms on; pass at least one batch.")
        found = []
        for gram, cross, seen in zip(self._gram, self._cross, self._seen, strict=True):
            penalty = PENALTY * gram.diagonal()[:-1].mean() * torch.eye(len(gram), dtype=gram.dtype)
            penalty[-1, -1] = 0  # the intercept is not penalised
            coefficients = torch.linalg.solve(gram + penalty, cross)
            found.append(torch.cat([coefficients, cross[-1:] / seen]))
        return torch.stack(found).numpy()


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
