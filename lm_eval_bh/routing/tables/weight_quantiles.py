"""Quantiles of the native top-k's weights on text, and of their ratios to the largest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.methods.scores import log_weights
from lm_eval_bh.routing.tables.measurement import Array, Measurement

POINTS = 1025  # quantiles at evenly spaced shares from 0 to 1


class SlotWeights(Measurement):
    """Logs of the native slots' weights, as in methods that score weights."""

    name, listens = "slot_weights", "routers"

    def __init__(self, model: nn.Module, routers: Sequence[nn.Module]) -> None:
        super().__init__(model, routers)
        self._heard: list[list[Tensor]] = [[] for _ in routers]

    def hear(self, layer: int, said: RouterOutput) -> None:
        """Keep the logs, float32."""
        logs = log_weights(said).gather(-1, said.indices[:, : said.native_k])
        self._heard[layer].append(self.values(logs).flatten().float().cpu())

    def values(self, logs: Tensor) -> Tensor:
        """Return the values to keep from ``[tokens, native k]``."""
        return logs

    def result(self) -> Array:
        """Return the quantiles, float64 ``[layers, POINTS]``."""
        shares = np.linspace(0, 1, POINTS)
        return np.stack([np.quantile(torch.cat(h).double().numpy(), shares) for h in self._heard])


class WeightRatios(SlotWeights):
    """Ratios of the later native slots' weights to the first one's."""

    name = "ratios"

    def values(self, logs: Tensor) -> Tensor:
        """Return the ratios, ``[tokens, native k - 1]``; the single ratio 1 for a native top-1."""
        return (logs[:, 1:] - logs[:, :1]).exp() if logs.shape[1] > 1 else torch.ones_like(logs)
