"""Learns to predict the norm of each expert's output from the hidden state, by ridge regression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_eval_bh.errors import DataError
from lm_eval_bh.routing.patching.experts import each_expert
from lm_eval_bh.routing.tables.contribution import experts_beside, hearing_experts

PENALTY = 1e-3  # of the mean variance of a hidden state's entries
TOKENS = 8192  # whose norms are measured, for all experts: far more than a hidden state's entries


class NormRegression:
    """Sums for the regression of all experts' output norms on hidden states, in float64."""

    def __init__(self, experts: Sequence[Any]) -> None:
        self._modules = list(experts)
        self._gram: list[Any] = [None] * len(experts)
        self._cross: list[Any] = [None] * len(experts)
        self._seen = [0] * len(experts)

    @torch.no_grad()
    def add(self, layer: int, module: Any, hidden_states: Tensor) -> None:
        """Apply every expert to the tokens ``[tokens, hidden]``, and note the norms."""
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

    def result(self) -> NDArray[np.float64]:
        """Return the predictors, float64 ``[layers, hidden + 2, experts]``.

        The rows are the coefficients of the hidden state, the intercept, and the mean norm.

        Raises
        ------
        DataError
            If no token was seen.
        """
        if not all(self._seen):
            raise DataError("There is no text to measure output norms on; pass at least one batch.")
        found = []
        for gram, cross, seen in zip(self._gram, self._cross, self._seen, strict=True):
            penalty = PENALTY * gram.diagonal()[:-1].mean() * torch.eye(len(gram), dtype=gram.dtype)
            penalty[-1, -1] = 0  # the intercept is free
            coefficients = torch.linalg.solve(gram + penalty, cross)
            found.append(torch.cat([coefficients, cross[-1:] / seen]))
        return torch.stack(found).numpy()


@contextmanager
def measuring_predictors(
    model: nn.Module, routers: Sequence[nn.Module]
) -> Iterator[NormRegression]:
    """Measure all experts' output norms in the forward passes inside.

    Raises
    ------
    ModelError
        If the experts beside a router are of a family that cannot be run one by one.
    """
    experts = [experts_beside(model, router) for router in routers]
    regression = NormRegression(experts)
    with hearing_experts(
        experts, lambda layer, module, hidden, index: regression.add(layer, module, hidden)
    ):
        yield regression


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
