"""The summary log: exact counters a task and layer, on the device, no work per token in Python."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lm_eval_bh.harness.logs.ownership import Batch
from lm_eval_bh.harness.logs.stopwatch import Span
from lm_eval_bh.routing.patching.counters import RoutingCounters
from lm_eval_bh.routing.selection import Selection

BEHIND = 8  # passes whose time is not asked for yet: a device may be that far behind


class TaskCounters(RoutingCounters):
    """What routing selected for the requests of one task.

    Attributes
    ----------
    cross : list of Tensor
        One int64 scalar a layer: the sum over tokens of this layer's count times the count of the
        routed layer before it; 0 in the first.
    seconds : float
        Time of the forward passes, shared among tasks by their tokens.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self.cross = [torch.zeros((), dtype=torch.int64) for _ in range(num_layers)]
        self.seconds = 0.0

    def add_cross(self, layer: int, counts: Tensor, previous: Tensor, weight: Tensor) -> None:
        """Add the products of the counts of two adjacent layers, all int64 ``[tokens]``."""
        total = (counts * previous.to(counts.device) * weight).sum()
        self.cross[layer] = self.cross[layer].to(counts.device) + total

    def state(self) -> dict[str, Any]:
        """Return the counters as plain values, for other processes."""
        return {
            "histogram": torch.stack([h.cpu() for h in self.histogram]).tolist(),
            "usage": torch.stack([u.cpu() for u in self.usage]).tolist(),
            "cross": [int(c) for c in self.cross],
            "seconds": self.seconds,
        }


class SummaryLog:
    """Counts what routing selected, task by task.

    Parameters
    ----------
    num_layers, num_experts : int
        Of the model.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._shape = num_layers, num_experts
        self.tasks: dict[str, TaskCounters] = {}
        self.computed_tokens = 0
        self.padding_tokens = 0
        self._weights: dict[str, Tensor] = {}
        self._spans: deque[tuple[Span, dict[str, float]]] = deque()
        self._previous: Tensor | None = None

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Weigh every token by how many requests of each task own its row."""
        times: dict[str, Tensor] = {}
        for row, owners in enumerate(batch.owners):
            for task, number in Counter(owner.task for owner in owners).items():
                times.setdefault(task, torch.zeros(len(batch.owners), dtype=torch.int64))[row] = (
                    number
                )
        self._weights = {
            task: (batch.mask * number.unsqueeze(-1)).flatten().to(device)
            for task, number in times.items()
        }
        for task in times:
            if task not in self.tasks:
                self.tasks[task] = TaskCounters(*self._shape)
        self._previous = None
        self._computed = int(batch.mask.sum())
        self._padding = batch.mask.numel() - self._computed

    def layer(self, layer: int, router_logits: Tensor, selection: Selection) -> None:
        """Count one layer's selection."""
        for task, weight in self._weights.items():
            counters = self.tasks[task]
            weight = weight.to(selection.counts.device)
            counters.add(layer, selection, weight)
            if self._previous is not None:
                counters.add_cross(layer, selection.counts, self._previous, weight)
        self._previous = selection.counts

    def scored(self, losses: Callable[[], Tensor]) -> None:
        """Do nothing: losses are lm-eval's to count."""

    def end(self) -> None:
        """Count the tokens that were computed."""
        self.computed_tokens += self._computed
        self.padding_tokens += self._padding

    def took(self, batch: Batch, span: Span) -> None:
        """Share the time of a pass among the tasks whose tokens it computed.

        How long it was is asked for some passes later, when the device has done with it.
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
        """Add the oldest pass whose time is not known yet."""
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
