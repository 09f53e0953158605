"""Distances of a routed model's next-token distributions from the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lm_eval_bh.policies.document_losses import Documents, Floats

MOST_BYTES = 2**30  # of the model's own distributions kept between measurements
WORST = 0.1  # share of documents

Batch = list[tuple[int, list[int]]]
Group = list[tuple[Batch, list[Tensor]]]


@dataclass(frozen=True)
class Outcome:
    """Measurements of each document, float64 ``[documents]``.

    Attributes
    ----------
    losses : ndarray
        Summed loss in nats.
    divergences : ndarray
        Sum over its tokens of KL(own distribution || routed distribution), in nats.
    changed : ndarray
        Number of tokens whose most probable next token differs from the unchanged model's.
    """

    losses: Floats
    divergences: Floats
    changed: Floats


@dataclass(frozen=True)
class Fidelity:
    """The distance of a policy from the unchanged model.

    Attributes
    ----------
    kl : float
        Mean divergence per token, in nats.
    changed : float
        Share of tokens whose most probable next token differs.
    worst : float
        Mean divergence per token in the tenth of documents where it is largest.
    """

    kl: float
    changed: float
    worst: float

    @classmethod
    def of(cls, divergences: Floats, changed: Floats, tokens: Floats) -> Fidelity:
        """Compute it from sums and token counts, float64 ``[documents]`` each."""
        worst = np.argsort(-divergences / tokens, kind="stable")
        worst = worst[: max(1, round(WORST * len(tokens)))]
        total = tokens.sum()
        return cls(
            float(divergences.sum() / total),
            float(changed.sum() / total),
            float(divergences[worst].sum() / tokens[worst].sum()),
        )


class OwnOutputs:
    """The unchanged model's next-token distributions, kept if they fit into memory.

    Parameters
    ----------
    model : PreTrainedModel
        The model, not patched whenever :meth:`groups` continues.
    documents : Documents
        The documents.
    most_bytes : int
        Limit of memory; if everything fits, it is computed once.
    """

    def __init__(self, model: nn.Module, documents: Documents, most_bytes: int = MOST_BYTES):
        self.model, self.documents, self._most = model, documents, most_bytes
        self._all: Group | None = None

    def groups(self) -> Iterator[Group]:
        """Yield batches with the model's own log-probabilities of their windows."""
        if self._all is not None:
            yield self._all
            return
        group: Group = []
        size, whole = 0, True
        for batch in self.documents.batches:
            with torch.inference_mode():
                own = [rows.cpu() for rows in _log_probabilities(self.model, batch)]
            group.append((batch, own))
            size += sum(rows.numel() * rows.element_size() for rows in own)
            if size >= self._most:
                yield group
                group, size, whole = [], 0, False
        if whole:
            self._all = group
        if group:
            yield group

    def outcome(self, routing: AbstractContextManager[Any]) -> Outcome:
        """Run the model with a routing, and compare its output with the unchanged model's.

        Parameters
        ----------
        routing : context manager
            The routing is applied within this context.
        """
        sums = np.zeros((3, len(self.documents.tokens)))
        for group in self.groups():
            with routing, torch.inference_mode():
                for batch, own in group:
                    found = _log_probabilities(self.model, batch)
                    for (document, ids), p, q in zip(batch, own, found, strict=True):
                        sums[:, document] += _compared(p.to(q.device), q, ids)
        return Outcome(*sums)


def _log_probabilities(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return each window's log-probabilities of next tokens, float32 [tokens, words]."""
    device = next(model.parameters()).device
    sizes = [len(ids) - 1 for _, ids in batch]
    inputs = [torch.tensor(ids[:-1]) for _, ids in batch]
    padded = nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(device)
    mask = torch.arange(padded.shape[1])[None] < torch.tensor(sizes)[:, None]
    logits = model(input_ids=padded, attention_mask=mask.long().to(device), use_cache=False).logits
    return [row[:size].float().log_softmax(-1) for row, size in zip(logits, sizes, strict=True)]


def _compared(p: Tensor, q: Tensor, ids: list[int]) -> tuple[float, float, float]:
    """Return a window's loss, divergence, and number of changed first choices."""
    targets = torch.tensor(ids[1:], device=q.device)
    loss = -q.gather(-1, targets[:, None]).double().sum()
    divergence = (p.exp() * (p - q)).sum(-1).double().clamp(min=0).sum()  # not below 0
    changed = (p.argmax(-1) != q.argmax(-1)).sum()
    return float(loss), float(divergence), float(changed)
