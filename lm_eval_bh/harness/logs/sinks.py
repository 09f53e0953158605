"""The interface of logs: per pass, they get the selections and the owners of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lm_eval_bh.harness.logs.ownership import Batch
from lm_eval_bh.harness.logs.stopwatch import Moment, Span, moment
from lm_eval_bh.routing.methods.pick import Picked


class Sink(Protocol):
    """A log of routing."""

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Start a forward pass."""

    def layer(self, layer: int, router_logits: Tensor, selection: Picked) -> None:
        """Take one layer's selection for the tokens of the batch, flattened to ``[tokens]``."""

    def scored(self, losses: Callable[[], Tensor]) -> None:
        """Take the tokens' losses: a function computes float ``[rows, length]``, NaN where none."""

    def end(self) -> None:
        """Finish the forward pass."""


class Sinks:
    """Several logs as one, which measures the time that they take."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self._breaks: list[tuple[Moment, Moment]] = []
        self._device = torch.device("cpu")

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Start a forward pass."""
        with self._timed():
            for sink in self._sinks:
                sink.begin(batch, device)

    def layer(self, layer: int, router_logits: Tensor, selection: Picked) -> None:
        """Take one layer's selection."""
        with self._timed():
            for sink in self._sinks:
                sink.layer(layer, router_logits, selection)

    def scored(self, losses: Callable[[], Tensor]) -> None:
        """Take the tokens' losses, which are computed only if a log keeps them."""
        with self._timed():
            for sink in self._sinks:
                sink.scored(losses)

    def end(self) -> None:
        """Finish the forward pass."""
        with self._timed():
            for sink in self._sinks:
                sink.end()

    def stopwatch(self, device: torch.device) -> Callable[[], Span]:
        """Return a function that returns the model's time from now until its call."""
        self._device = device
        breaks = self._breaks = []
        start = moment(device)
        return lambda: Span(start, moment(device), list(breaks))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = moment(self._device)
        yield
        self._breaks.append((start, moment(self._device)))
