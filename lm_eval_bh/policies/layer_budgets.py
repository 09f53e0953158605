"""Divides a budget of experts among layers by the loss's sensitivity to each layer.

A layer's sensitivity is the increase of the loss when only that layer takes fewer experts than the
model does. Sensitivities are assumed to add up; dynamic programming then finds the best budgets.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn
from tqdm import tqdm

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.policies.document_losses import Floats
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.patching.integration import BHRoutingIntegration


def layer_sensitivities(
    model: nn.Module, layers: int, native: int, loss: Callable[[], float], progress: bool = True
) -> Floats:
    """Measure the increase of loss if one layer takes fewer experts, in nats per token.

    Parameters
    ----------
    model : PreTrainedModel
        The model, not patched.
    layers, native : int
        The number of its routers, and its own top-k.
    loss : callable
        Runs the model and returns its loss in nats per token.
    progress : bool
        Whether to show a progress bar, which is quiet when not in a terminal.

    Returns
    -------
    float64 ``[layers, native]``
        ``[layer, k - 1]`` is for ``k`` experts in that layer; the last column is 0.
    """
    found = np.zeros((layers, native))
    usual = loss()
    steps = [(layer, k) for layer in range(layers) for k in range(1, native)]
    for layer, k in tqdm(steps, "Sensitivities", unit="run", disable=None if progress else True):
        budgets = [k if other == layer else native for other in range(layers)]
        with BHRoutingIntegration(model, config_of(budgets), collect_stats=False):
            found[layer, k - 1] = loss() - usual
    return found


def allocate(sensitivities: Floats, budget: int) -> list[int]:
    """Return the layers' numbers of experts, ``budget`` in total, with the smallest loss.

    Parameters
    ----------
    sensitivities : float64 ``[layers, native]``
        From :func:`layer_sensitivities`.
    budget : int
        From one to ``native`` experts for each layer.

    Raises
    ------
    ParameterError
        If no allocation has that budget.
    """
    layers, native = sensitivities.shape
    if not layers <= budget <= layers * native:
        raise ParameterError(
            f"{layers} layers cannot share {budget} experts, from 1 to {native} each: "
            f"use a target from 1 to {native}."
        )
    least = np.full(budget + 1, np.inf)
    least[0] = 0.0
    choices: list[list[int]] = []
    for row in sensitivities:
        table = np.full((native, budget + 1), np.inf)
        for k in range(1, min(native, budget) + 1):
            table[k - 1, k:] = least[: budget + 1 - k] + row[k - 1]
        choices.append((table.argmin(0) + 1).tolist())
        least = table.min(0)
    found: list[int] = []
    for row_choices in reversed(choices):
        found.append(row_choices[budget])
        budget -= found[-1]
    return found[::-1]


def config_of(budgets: list[int]) -> RoutingConfig:
    """Return static top-k with these numbers of experts in the layers."""
    return RoutingConfig(rule="topk", k_per_layer="-".join(map(str, budgets)))
