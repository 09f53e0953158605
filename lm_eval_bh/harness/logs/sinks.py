"""What the logs have in common: they are told, pass by pass, what routing selected for whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lm_eval_bh.harness.logs.ownership import Batch
from lm_eval_bh.routing.selection import Selection


class Sink(Protocol):
    """A log of routing."""

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Start a forward pass."""

    def layer(self, layer: int, router_logits: Tensor, selection: Selection) -> None:
        """Take one layer's selection for the tokens of the batch, flattened to ``[tokens]``."""

    def scored(self, losses: Callable[[], Tensor]) -> None:
        """Take the tokens' losses: a function computes float ``[rows, length]``, NaN where none."""

    def end(self) -> None:
        """Finish the forward pass."""


class Sinks:
    """Several logs as one, which knows how long they have taken."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self._seconds = 0.0

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Start a forward pass."""
        with self._timed():
            for sink in self._sinks:
                sink.begin(batch, device)

    def layer(self, layer: int, router_logits: Tensor, selection: Selection) -> None:
        """Take one layer's selection."""
        with self._timed():
            for sink in self._sinks:
                sink.layer(layer, router_logits, selection)

    def scored(self, losses: Callable[[], Tensor]) -> None:
        """Take the tokens' losses, which are computed only where a log keeps them."""
        with self._timed():
            for sink in self._sinks:
                sink.scored(losses)

    def end(self) -> None:
        """Finish the forward pass."""
        with self._timed():
            for sink in self._sinks:
                sink.end()

    def stopwatch(self, device: torch.device) -> Callable[[], float]:
        """Return a function that says how many seconds the model has taken since now."""
        start, before = _now(device), self._seconds
        return lambda: _now(device) - start - (self._seconds - before)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start


def _now(device: torch.device) -> float:
    """Return the time in seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
