"""Credits each row of a forward pass to the requests that own it, and counts what was selected.

lm-eval sorts requests by length across tasks, pads them, lets requests that share a context share a
row, repeats the last request to even out processes, and probes batch sizes with rows nobody asked
for. So the recorder is told which instances are being served, keeps a table from the tokens of a
row to its owners, and looks every row up. What is not found belongs to nobody and is not counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lm_eval_bh.routing.counters import RoutingCounters
from lm_eval_bh.routing.selection import Selection

TokenIds = tuple[int, ...]


class TaskCounters(RoutingCounters):
    """What routing selected for the requests of one task.

    Attributes
    ----------
    cross : list of Tensor
        One int64 scalar a layer: the sum over tokens of this layer's count times the previous
        one's.
    seconds : float
        Time of the forward passes, shared among tasks by their tokens.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self.cross = [torch.zeros((), dtype=torch.int64) for _ in range(num_layers)]
        self.seconds = 0.0

    def add_cross(self, layer: int, counts: Tensor, previous: Tensor, weight: Tensor) -> None:
        """Add the products of the counts of two adjacent layers, all int64 ``[tokens]``."""
        self.cross[layer] = (
            self.cross[layer].to(counts.device)
            + (counts * previous.to(counts.device) * weight).sum()
        )

    def state(self) -> dict[str, Any]:
        """Return the counters as plain values, for other processes."""
        return {
            "histogram": torch.stack([h.cpu() for h in self.histogram]).tolist(),
            "usage": torch.stack([u.cpu() for u in self.usage]).tolist(),
            "cross": [int(c) for c in self.cross],
            "seconds": self.seconds,
        }


class Generation:
    """The decoding steps of one call of ``generate``, kept until it is known which rows they serve.

    Attributes
    ----------
    decoded : list
        (layer, selection) of every layer of every step after the prompt.
    fed : list of int
        For each row, how many generated tokens it was fed before it was finished.
    """

    def __init__(self, num_layers: int) -> None:
        self.decoded: list[tuple[int, Selection]] = []
        self.fed: list[int] = []
        self._num_layers = num_layers
        self._prompt_layers = 0

    @property
    def steps(self) -> int:
        """Number of decoding steps."""
        return len(self.decoded) // self._num_layers

    def wants(self, layer: int, selection: Selection) -> bool:
        """Keep the selection if it belongs to a decoding step; say whether it did."""
        if self._prompt_layers < self._num_layers:
            self._prompt_layers += 1
            return False
        self.decoded.append((layer, selection))
        return True


class Recorder:
    """Counts the routing of an evaluation, task by task and layer by layer.

    Parameters
    ----------
    layers : sequence of int
        The layers that are routed.
    num_layers, num_experts : int
        Of the model.
    """

    def __init__(self, layers: Sequence[int], num_layers: int, num_experts: int) -> None:
        self.layers = list(layers)
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.tasks: dict[str, TaskCounters] = {}
        self.computed_tokens = 0
        self.padding_tokens = 0
        self._instances: list[Any] = []
        self._owners: Mapping[TokenIds, list[str]] = {}
        self._weights: dict[str, Tensor] = {}
        self._previous: Tensor | None = None
        self._generation: Generation | None = None

    @contextmanager
    def serving(self, instances: Sequence[Any]) -> Iterator[None]:
        """Credit what runs inside to these instances, at most ``repeats`` times each."""
        seen: Counter[int] = Counter()
        self._instances = []
        for instance in instances:
            seen[id(instance)] += 1
            self._instances.append(instance if seen[id(instance)] <= instance.repeats else None)
        try:
            yield
        finally:
            self._instances = []

    def task_of(self, position: int) -> str | None:
        """Return the task of the instance at a position in :meth:`serving`; None for a copy."""
        instance = self._instances[position] if position < len(self._instances) else None
        return None if instance is None else str(instance.task_name)

    @contextmanager
    def expecting(self, owners: Mapping[TokenIds, list[str]]) -> Iterator[None]:
        """Credit the rows of the forward passes inside to these tasks, by the tokens of the row."""
        self._owners = owners
        try:
            yield
        finally:
            self._owners = {}

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """Count nothing inside, whatever the rows look like."""
        owners, self._owners = self._owners, {}
        try:
            yield
        finally:
            self._owners = owners

    @contextmanager
    def forward(self, input_ids: Tensor) -> Iterator[None]:
        """Count one forward pass over int64 ``[rows, length]``, padded on the right."""
        rows = [self._find(row) for row in input_ids.tolist()] if self._owners else []
        mask = torch.zeros(input_ids.shape, dtype=torch.int64)
        for row, (length, _) in enumerate(rows):
            mask[row, :length] = 1
        with self._counting([tasks for _, tasks in rows], mask, input_ids.device):
            yield

    @contextmanager
    def generation(self, rows: list[list[str]], attention_mask: Tensor) -> Iterator[Generation]:
        """Count one call of ``generate`` for rows owned by these tasks.

        Parameters
        ----------
        rows : list of list of str
            The owners of each row.
        attention_mask : Tensor
            int64 ``[rows, length]`` of the prompts.

        Yields
        ------
        Generation
            Whose ``fed`` the caller sets to the number of generated tokens that each row was fed
            before it was finished. What a finished row goes on to produce is not counted.
        """
        generation = Generation(len(self.layers))
        with self._counting(rows, attention_mask.cpu().to(torch.int64), attention_mask.device):
            self._generation = generation
            try:
                yield generation
            finally:
                self._generation = None
        multiplicity = {
            task: torch.tensor([owners.count(task) for owners in rows])
            for task in set(chain.from_iterable(rows))
        }
        self.computed_tokens += sum(generation.fed)
        self.padding_tokens += generation.steps * len(rows) - sum(generation.fed)
        previous: Tensor | None = None
        for number, (layer, selection) in enumerate(generation.decoded):
            if number % len(self.layers) == 0:
                previous = None
            alive = torch.tensor(generation.fed) > number // len(self.layers)
            for task, times in multiplicity.items():
                self._add(
                    task, layer, selection, (times * alive).to(selection.counts.device), previous
                )
            previous = selection.counts

    @contextmanager
    def _counting(
        self, rows: list[list[str]], mask: Tensor, device: torch.device
    ) -> Iterator[None]:
        shares: Counter[str] = Counter()
        weights: dict[str, Tensor] = {}
        lengths = mask.sum(-1).tolist()
        for row, tasks in enumerate(rows):
            for task, times in Counter(tasks).items():
                weights.setdefault(task, torch.zeros_like(mask))[row] = times * mask[row]
                shares[task] += lengths[row] * times / len(tasks)
        for task in weights:
            if task not in self.tasks:
                self.tasks[task] = TaskCounters(self.num_layers, self.num_experts)
        self._weights = {task: weight.reshape(-1).to(device) for task, weight in weights.items()}
        self._previous = None
        start = _now(device)
        try:
            yield
        finally:
            self._weights = {}
            self._previous = None
        elapsed = _now(device) - start
        if rows:
            self.computed_tokens += sum(lengths)
            self.padding_tokens += mask.numel() - sum(lengths)
        for task, share in shares.items():
            self.tasks[task].seconds += elapsed * share / sum(shares.values())

    def observe(self, layer: int, router_logits: Tensor, selection: Selection) -> None:
        """Count one layer's selection; called by the router hooks, in the order of the layers."""
        if self._generation is not None and self._generation.wants(layer, selection):
            return
        for task, weight in self._weights.items():
            self._add(task, layer, selection, weight.to(selection.counts.device), self._previous)
        self._previous = selection.counts

    def _add(
        self, task: str, layer: int, selection: Selection, weight: Tensor, previous: Tensor | None
    ) -> None:
        counters = self.tasks[task]
        counters.add(layer, selection, weight)
        if previous is not None:
            counters.add_cross(layer, selection.counts, previous, weight)

    def _find(self, row: list[int]) -> tuple[int, list[str]]:
        """Return (length, tasks) of a row padded on the right with zeros; (0, []) if nobody's."""
        shortest = len(row)
        while shortest and row[shortest - 1] == 0:
            shortest -= 1
        for length in range(shortest, len(row) + 1):
            tasks = self._owners.get(tuple(row[:length]))
            if tasks is not None:
                return length, tasks
        return 0, []

    def state(self) -> dict[str, Any]:
        """Return all counters as plain values, for other processes."""
        return {
            "tasks": {task: counters.state() for task, counters in self.tasks.items()},
            "computed_tokens": self.computed_tokens,
            "padding_tokens": self.padding_tokens,
        }


def _now(device: torch.device) -> float:
    """Return the time in seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
