"""Measures how much each expert adds: the norm of its output, for the tokens routed to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_eval_bh.errors import DataError, ModelError
from lm_eval_bh.routing.patching.experts import each_expert

HearExperts = Callable[[int, Any, Tensor, Tensor], None]


class OutputNorms:
    """Mean Euclidean norm of what every expert of every layer gives out, before its weight."""

    def __init__(self, experts: Sequence[Any]) -> None:
        sizes = [module.num_experts for module in experts]
        self._sums = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        self._tokens = [torch.zeros(size, dtype=torch.float64) for size in sizes]

    @torch.no_grad()
    def add(self, layer: int, module: Any, hidden_states: Tensor, indices: Tensor) -> None:
        """Apply to each token its experts, once more, and note the norms of what they give."""
        for expert, _, output in each_expert(module, hidden_states, indices):
            self._sums[layer][expert] += float(output.double().norm(dim=-1).sum())
            self._tokens[layer][expert] += len(output)

    def result(self) -> NDArray[np.float64]:
        """Return the mean norms, float64 ``[layers, experts]``, in units of the hidden state.

        An expert that no token was routed to takes the mean of its layer's others.

        Raises
        ------
        DataError
            If no token was seen.
        """
        if any(float(tokens.sum()) == 0 for tokens in self._tokens):
            raise DataError("There is no text to measure output norms on; pass at least one batch.")
        rows = []
        for sums, tokens in zip(self._sums, self._tokens, strict=True):
            means = sums / tokens
            rows.append(torch.where(tokens > 0, means, means[tokens > 0].mean()).numpy())
        return np.stack(rows)


@contextmanager
def measuring_norms(model: nn.Module, routers: Sequence[nn.Module]) -> Iterator[OutputNorms]:
    """Measure the experts' output norms in the forward passes inside.

    Raises
    ------
    ModelError
        If the experts beside a router are of a family that cannot be run one by one.
    """
    experts = [experts_beside(model, router) for router in routers]
    norms = OutputNorms(experts)
    with hearing_experts(experts, norms.add):
        yield norms


@contextmanager
def hearing_experts(experts: Sequence[nn.Module], hear: HearExperts) -> Iterator[None]:
    """Hand on what the experts of every layer are given in the forward passes inside.

    Parameters
    ----------
    experts : sequence of nn.Module
        In the order of the layers.
    hear : callable
        Takes a layer, its experts, the hidden states ``[tokens, hidden]`` and the index of the
        experts ``[tokens, k]``.
    """
    handles = []
    try:
        for layer, module in enumerate(experts):
            handles.append(module.register_forward_pre_hook(_listener(hear, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listener(hear: HearExperts, layer: int) -> Any:
    def listen(module: nn.Module, args: tuple[Any, ...]) -> None:
        hear(layer, module, args[0], args[1])

    return listen


def experts_beside(model: nn.Module, router: nn.Module) -> Any:
    """Return the experts module that shares its parent with the router."""
    for module in model.modules():
        if any(child is router for child in module.children()):
            experts = getattr(module, "experts", None)
            if hasattr(experts, "has_gate") and hasattr(experts, "down_proj"):
                return experts
    raise ModelError(
        f"The experts beside {type(router).__name__} cannot be run one by one, so their output "
        "norms are not known: use statistic=logit."
    )
