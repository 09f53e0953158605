"""The summary log: exact counters per task and layer, on the device, without Python per token."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_eval_bh.harness.logs.ownership import Batch
from lm_eval_bh.harness.logs.stopwatch import Span
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.methods.pick import Picked
from lm_eval_bh.routing.methods.steps import Steps
from lm_eval_bh.routing.patching.counters import LayerSums, RoutingCounters, Selections

BEHIND = 8  # passes that a device may lag behind before its time is read


class TaskCounters(RoutingCounters):
    """What routing selected for the requests of one task.

    Attributes
    ----------
    seconds : float
        Time of the forward passes, shared among tasks by their tokens.
    """

    def __init__(self, num_layers: int, num_experts: int, decode_batch: int | None = None) -> None:
        super().__init__(num_layers, num_experts, decode_batch)
        # Sum over tokens of a layer's count times the previous routed layer's count; 0
        # in the first layer.
        self._cross = LayerSums(num_layers, 1)
        self.seconds = 0.0

    def add(
        self, selections: Selections, weight: Tensor | None = None, steps: Steps | None = None
    ) -> None:
        """Count the layers' selections, in order, weighted by int64 ``[tokens]``."""
        super().add(selections, weight, steps)
        assert weight is not None
        device = selections[0][1].counts.device
        counts = torch.stack([selection.counts.to(device) for _, selection in selections])
        products = (counts[1:] * counts[:-1] * weight.to(device)).sum(-1, keepdim=True)
        self._cross.of(device, tuple(layer for layer, _ in selections[1:])).add_(products)

    def state(self) -> dict[str, Any]:
        """Return the counters as plain values, for other processes."""
        steps = {} if self.decode_batch is None else self._state_of_steps()
        return steps | {
            "histogram": torch.stack(self.histogram).tolist(),
            "usage": torch.stack(self.usage).tolist(),
            "cross": self._cross.total().flatten().tolist(),
            "seconds": self.seconds,
        }

    def _state_of_steps(self) -> dict[str, Any]:
        return {
            "decode_batch": self.decode_batch,
            "distinct": self.distinct,
            "sizes": self.sizes.tolist(),
        }


class SummaryLog:
    """Counts what routing selected, task by task.

    Parameters
    ----------
    num_layers, num_experts : int
        Numbers of layers and of experts per layer.
    config : RoutingConfig
        Determines which tokens are decoded together.
    """

    def __init__(self, num_layers: int, num_experts: int, config: RoutingConfig) -> None:
        self._shape = num_layers, num_experts, config.decode_batch
        self._config = config
        self._steps: Steps | None = None
        self.tasks: dict[str, TaskCounters] = {}
        self.computed_tokens = 0
        self.padding_tokens = 0
        self._weights: dict[str, Tensor] = {}
        self._spans: deque[tuple[Span, dict[str, float]]] = deque()
        self._selections: list[tuple[int, Picked]] = []

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Weigh every token by how many requests of each task own its row."""
        mask, rows = batch.mask.numpy(), len(batch.owners)
        times: dict[str, NDArray[np.int64]] = {}
        for row, owners in enumerate(batch.owners):
            for task, number in Counter(owner.task for owner in owners).items():
                times.setdefault(task, np.zeros(rows, dtype=np.int64))[row] = number
        self._weights = {
            task: torch.from_numpy((mask * number[:, None]).ravel()).to(device)
            for task, number in times.items()
        }
        for task in times:
            if task not in self.tasks:
                self.tasks[task] = TaskCounters(*self._shape)
        self._selections = []
        self._steps = batch.steps(self._config)
        self._computed = int(mask.sum())
        self._padding = mask.size - self._computed

    def layer(self, layer: int, router_logits: Tensor, selection: Picked) -> None:
        """Keep one layer's selection until the end of the pass."""
        self._selections.append((layer, selection))

    def scored(self, losses: Callable[[], Tensor]) -> None:
        """Do nothing: lm-eval counts losses."""

    def end(self) -> None:
        """Count the selections and the computed tokens."""
        for task, weight in self._weights.items():
            if self._selections:
                self.tasks[task].add(self._selections, weight, self._steps_of(weight))
        self._selections = []
        self.computed_tokens += self._computed
        self.padding_tokens += self._padding

    def _steps_of(self, weight: Tensor) -> Steps | None:
        """Return the steps of the tokens that count for a task."""
        steps = self._steps
        if steps is None:
            return None
        return steps._replace(of=torch.where(weight > 0, steps.of.to(weight.device), -1))

    def took(self, batch: Batch, span: Span) -> None:
        """Divide the time of a pass among the tasks of its tokens.

        The time is read some passes later, when the device has finished it.
        """
        shares: defaultdict[str, float] = defaultdict(float)
        for length, owners in zip(batch.lengths, batch.owners, strict=True):
            for owner in owners:
                shares[owner.task] += length / len(owners)
        whole = sum(shares.values())
        self._spans.append((span, {task: share / whole for task, share in shares.items()}))
        while len(self._spans) > BEHIND:
            self._settle()

    def _settle(self) -> None:
        """Add the oldest pass whose time has not been read."""
        span, shares = self._spans.popleft()
        seconds = span.seconds()
        for task, share in shares.items():
            self.tasks[task].seconds += seconds * share

    def state(self) -> dict[str, Any]:
        """Return all counters as plain values, for other processes."""
        while self._spans:
            self._settle()
        return {
            "tasks": {task: counters.state() for task, counters in self.tasks.items()},
            "computed_tokens": self.computed_tokens,
            "padding_tokens": self.padding_tokens,
        }
