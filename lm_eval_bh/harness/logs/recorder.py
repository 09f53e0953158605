"""Observes every forward pass, finds the owners of its rows, and tells the logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm_eval_bh.harness.logs.expected_rows import ExpectedRows
from lm_eval_bh.harness.logs.generation import Generation
from lm_eval_bh.harness.logs.ownership import Batch, Owner
from lm_eval_bh.harness.logs.sinks import Sink, Sinks
from lm_eval_bh.harness.logs.summary_log import SummaryLog
from lm_eval_bh.routing.methods.pick import Picked

logger = logging.getLogger(__name__)


class Recorder:
    """Passes the forward passes of one evaluation to its logs.

    Parameters
    ----------
    model : nn.Module
        The transformers model without its head, through which every pass goes.
    summary : SummaryLog or None
        The summary, which also gets the time of passes; None logs nothing.
    sinks : sequence of Sink
        Further logs.
    """

    def __init__(
        self, model: nn.Module, summary: SummaryLog | None, sinks: Sequence[Sink] = ()
    ) -> None:
        self._model = model
        self._summary = summary
        self._sinks = Sinks([] if summary is None else [summary, *sinks])
        self._expected = ExpectedRows()
        self._batch: Batch | None = None  # of the current pass
        self._device = torch.device("cpu")
        self._begun = False
        self._generation: Generation | None = None
        self._warned: set[str] = set()

    @contextmanager
    def expecting(self, rows: ExpectedRows) -> Iterator[None]:
        """Assign rows of the enclosed forward passes to their owners, by the row's tokens."""
        before, self._expected = self._expected, rows
        try:
            yield
        finally:
            self._expected = before

    @contextmanager
    def forward(self, input_ids: Tensor) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Log one forward pass over int64 ``[rows, length]``, padded on the right.

        Yields
        ------
        (Tensor or None, Tensor or None)
            bool ``[rows, length]``: which tokens are not padding, and which are not in prompts;
            None if unknown.
        """
        if not self._expected:
            yield None, None
            return
        rows = [self._expected.take(row) for row in input_ids.tolist()]
        place = torch.arange(input_ids.shape[1])
        real = place < torch.tensor([[row.real] for row in rows])
        decoded = place >= torch.tensor([[row.prompt] for row in rows])
        if self._summary is None:
            yield real, decoded
            return
        owned = place < torch.tensor([[row.owned] for row in rows])
        owners = [row.owners for row in rows]
        batch = Batch(owners, owned, input_ids.cpu(), [0] * len(rows), decoded)
        self._batch, self._device, self._begun = batch, input_ids.device, False
        span = self._sinks.stopwatch(input_ids.device)
        try:
            yield real, decoded
        finally:
            logged = self._begun and self._batch is batch
            self._batch = None
        if logged:
            self._summary.took(batch, span())
            self._sinks.end()

    @contextmanager
    def generation(
        self, owners: Sequence[Sequence[Owner]], prompt: Tensor, attention_mask: Tensor
    ) -> Iterator[Generation | None]:
        """Log one call of ``generate`` for rows of these owners.

        Parameters
        ----------
        owners : sequence of sequence of Owner
            The owners of each row.
        prompt, attention_mask : Tensor
            int64 ``[rows, length]``, padded on the left.

        Yields
        ------
        Generation or None
            Call its :meth:`~Generation.finish` with the output. None without logging.
        """
        if self._summary is None or not any(owners) or len(owners) != len(prompt):
            yield None
            return
        generation = Generation(
            self._model, self._sinks, owners, prompt, attention_mask, self._warn_once
        )
        handle = self._model.register_forward_pre_hook(generation.before_forward, with_kwargs=True)
        self._generation = generation
        try:
            yield generation
        finally:
            self._generation = None
            handle.remove()
        if generation.logged and generation.span is not None:
            self._summary.took(generation.prompt, generation.span)

    def observe(self, layer: int, router_logits: Tensor, selection: Picked) -> None:
        """Take one layer's selection; called by the router hooks, in the order of the layers."""
        if self._generation is not None:
            self._generation.observe(layer, router_logits, selection)
            return
        if self._batch is None:
            return
        if len(selection.counts) != self._batch.mask.numel():
            # For example virtual tokens of prompt tuning, whose owner is unknown.
            self._warn_once("A forward pass is not logged: its tokens are not those of its rows.")
            self._batch = None
            return
        if not self._begun:
            self._sinks.begin(self._batch, self._device)
            self._begun = True
        self._sinks.layer(layer, router_logits, selection)

    def scored(self, logits: Tensor) -> None:
        """Take the logits ``[rows, length, vocabulary]`` of the current pass."""
        batch = self._batch
        if batch is not None and self._begun and logits.shape[:2] == batch.token_ids.shape:
            self._sinks.scored(lambda: token_losses(logits, batch.token_ids))

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self._warned:
            logger.warning(sentence)
            self._warned.add(sentence)


def token_losses(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return each token's loss in nats, given those before it in its row.

    Parameters
    ----------
    logits : Tensor
        float ``[rows, length, vocabulary]``.
    token_ids : Tensor
        int64 ``[rows, length]``.

    Returns
    -------
    Tensor
        float32 ``[rows, length]`` on the CPU; NaN for the first token of a row.
    """
    losses = torch.full(token_ids.shape, float("nan"))
    for row, (of_row, ids) in enumerate(zip(logits.detach(), token_ids, strict=True)):
        # Row by row: converting the whole batch to float32 would double its memory.
        losses[row, 1:] = F.cross_entropy(
            of_row[:-1].float(), ids[1:].to(of_row.device), reduction="none"
        ).cpu()
    return losses
