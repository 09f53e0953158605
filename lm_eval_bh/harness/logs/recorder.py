"""Finds out which requests own the rows of a forward pass, and tells the logs about them.

lm-eval sorts requests by length across tasks, pads them, lets requests that share a context share a
row, repeats the last request to even out processes, and probes batch sizes with rows nobody asked
for. So the recorder is told which instances are being served, keeps a table from the tokens of a
row to its owners, and looks every row up. What is not found belongs to nobody and is not logged.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lm_eval_bh.harness.logs.ownership import Batch, Owner, Sink
from lm_eval_bh.harness.logs.summary_log import SummaryLog
from lm_eval_bh.routing.selection import Selection

TokenIds = tuple[int, ...]
# Which rows to expect, and for each how many times and for whom: one group of owners a time.
Expected = dict[TokenIds, list[list[Owner]]]

logger = logging.getLogger(__name__)


class Generation:
    """The decoding steps of one call of ``generate``, kept until it is known which rows they serve.

    Attributes
    ----------
    fed : list of int
        Set by the caller: for each row, how many generated tokens it was fed before it finished.
    token_ids : Tensor
        Set by the caller: int64 ``[rows, generated]``, what was generated.
    """

    def __init__(self, num_layers: int) -> None:
        self.fed: list[int] = []
        self.token_ids = torch.empty(0, 0, dtype=torch.int64)
        self.stopped: float | None = None
        self._num_layers = num_layers
        self._seen = 0
        self._decoded: list[tuple[int, Tensor, Selection]] = []

    def stop_clock(self, device: torch.device) -> None:
        """Say that the model has finished: what the caller does next is not its time."""
        self.stopped = _now(device)

    def keep(self, layer: int, router_logits: Tensor, selection: Selection) -> bool:
        """Keep a layer of a decoding step; return False for the prompt's, which comes first."""
        self._seen += 1
        if self._seen <= self._num_layers:
            return False
        self._decoded.append((layer, router_logits, selection))
        return True

    def steps(self) -> Iterator[list[tuple[int, Tensor, Selection]]]:
        """Yield the decoding steps, each as the list of its layers."""
        for start in range(0, len(self._decoded), self._num_layers):
            yield self._decoded[start : start + self._num_layers]


class Recorder:
    """Tells sinks about the forward passes of an evaluation.

    Parameters
    ----------
    layers : sequence of int
        The layers that are routed.
    counters : SummaryLog or None
        The summary, which is also told how long passes took; None logs nothing.
    sinks : sequence of Sink
        Further logs.
    """

    def __init__(
        self, layers: Sequence[int], counters: SummaryLog | None, sinks: Sequence[Sink] = ()
    ) -> None:
        self.counters = counters
        self._sinks: list[Sink] = [] if counters is None else [counters, *sinks]
        self._layers = list(layers)
        self._served: list[tuple[Any, int]] = []
        self._expected: Expected = {}
        self._lengths: list[int] = []
        self._tokens = 0
        self._active = False
        self._sinks_took = 0.0
        self._generation: Generation | None = None

    @contextmanager
    def serving(self, instances: Sequence[Any]) -> Iterator[None]:
        """Credit what runs inside to these instances, at most ``repeats`` times each."""
        seen: Counter[int] = Counter()
        self._served = []
        for instance in instances:
            self._served.append((instance, seen[id(instance)]))
            seen[id(instance)] += 1
        try:
            yield
        finally:
            self._served = []

    def owner(self, position: int, offset: int = 0) -> Owner | None:
        """Return the owner at a position in :meth:`serving`; None for a copy or past the end."""
        if position >= len(self._served):
            return None
        instance, repeat = self._served[position]
        if repeat >= instance.repeats:
            return None
        return Owner(
            str(instance.task_name), int(instance.doc_id), int(instance.idx), repeat, offset
        )

    @contextmanager
    def expecting(self, rows: Expected) -> Iterator[None]:
        """Credit rows of the forward passes inside to these owners, by the tokens of the row."""
        before = self._expected, self._lengths
        self._expected = rows
        self._lengths = sorted({len(row) for row in rows}, reverse=True)
        try:
            yield
        finally:
            self._expected, self._lengths = before

    @contextmanager
    def forward(self, input_ids: Tensor) -> Iterator[Tensor | None]:
        """Log one forward pass over int64 ``[rows, length]``, padded on the right.

        Yields
        ------
        Tensor or None
            bool ``[rows, length]``, which tokens are no padding; None where nobody knows.
        """
        if not self._expected:
            yield None
            return
        rows = [self._find(row) for row in input_ids.tolist()]
        place = torch.arange(input_ids.shape[1])
        real = place < torch.tensor([[length] for length, _, _ in rows])
        if not self._sinks:
            yield real
            return
        owned = place < torch.tensor([[length] for _, length, _ in rows])
        batch = Batch([owners for _, _, owners in rows], owned, input_ids.cpu(), [0] * len(rows))
        with self._logging(batch, input_ids.device):
            yield real

    @contextmanager
    def generation(
        self, owners: Sequence[Sequence[Owner]], prompt: Tensor, attention_mask: Tensor
    ) -> Iterator[Generation]:
        """Log one call of ``generate`` for rows of these owners.

        Parameters
        ----------
        owners : sequence of sequence of Owner
            The owners of each row.
        prompt, attention_mask : Tensor
            int64 ``[rows, length]``, padded on the left.

        Yields
        ------
        Generation
            The caller sets its ``fed`` and ``token_ids``. What a row that has finished goes on to
            produce is not logged.
        """
        mask = attention_mask.cpu().bool() & torch.tensor([[bool(row)] for row in owners])
        batch = Batch(owners, mask, prompt.cpu(), [0] * len(owners))
        generation = Generation(len(self._layers))
        if not self._sinks:
            yield generation
            return
        with self._logging(batch, prompt.device, generation):
            self._generation = generation
            try:
                yield generation
            finally:
                self._generation = None
        for number, step in enumerate(generation.steps()):
            alive = torch.tensor(generation.fed) > number
            decoded = Batch(
                owners,
                (alive & mask.any(-1)).unsqueeze(-1),
                generation.token_ids[:, number : number + 1].cpu(),
                [length + number for length in batch.lengths],
            )
            self._begin(decoded, prompt.device)
            for layer, router_logits, selection in step:
                self._tell(layer, router_logits, selection)
            self._end()

    def observe(self, layer: int, router_logits: Tensor, selection: Selection) -> None:
        """Take one layer's selection; called by the router hooks, in the order of the layers."""
        if self._generation is not None and self._generation.keep(layer, router_logits, selection):
            return
        if self._active and len(selection.counts) != self._tokens:
            # Virtual tokens of prompt tuning, say: whose they are is not known.
            logger.warning("A forward pass is not logged: its tokens are not those of its rows.")
            self._active = False
        if self._active:
            self._tell(layer, router_logits, selection)

    @contextmanager
    def _logging(
        self, batch: Batch, device: torch.device, generation: Generation | None = None
    ) -> Iterator[None]:
        self._begin(batch, device)
        self._sinks_took = 0.0
        start = _now(device)
        try:
            yield
        except BaseException:
            self._active = False
            raise
        end = generation.stopped if generation is not None and generation.stopped else _now(device)
        if self.counters is not None:
            self.counters.took(batch, end - start - self._sinks_took)
        self._end()

    def _begin(self, batch: Batch, device: torch.device) -> None:
        self._active = True
        self._tokens = batch.mask.numel()
        for sink in self._sinks:
            sink.begin(batch, device)

    def _tell(self, layer: int, router_logits: Tensor, selection: Selection) -> None:
        start = time.perf_counter()
        for sink in self._sinks:
            sink.layer(layer, router_logits, selection)
        self._sinks_took += time.perf_counter() - start

    def _end(self) -> None:
        self._active = False
        for sink in self._sinks:
            sink.end()

    def _find(self, row: list[int]) -> tuple[int, int, list[Owner]]:
        """Return (real tokens, owned tokens, owners) of a row padded on the right with zeros.

        Where one expected row is another one and zeros, the longer is taken to be real, so that no
        token of it is ever mistaken for padding; their owners are served in either order, which
        makes no difference to what is counted. A row that nobody expects is real to its end.
        """
        shortest = len(row)
        while shortest and row[shortest - 1] == 0:
            shortest -= 1
        real = 0
        for length in self._lengths:
            if shortest <= length <= len(row):
                groups = self._expected.get(tuple(row[:length]))
                if groups is not None:
                    real = real or length
                    if groups:
                        return real, length, groups.pop(0)
        return real or len(row), 0, []


def _now(device: torch.device) -> float:
    """Return the time in seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
