"""The samples log: all routing decisions for the first documents of a task, as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_eval_bh.harness.logs.ownership import Batch, Owner
from lm_eval_bh.routing.methods.pick import Picked
from lm_eval_bh.schema import UNUSED, Sample, SampleLayer

LOGITS_SAMPLE = 3  # tokens per request whose router logits are kept completely

Key = tuple[str, int, int, int]  # task, document, request, repetition


def key_of(owner: Owner) -> Key:
    """Return the key of an owner's sample."""
    return owner.task, owner.doc_id, owner.request, owner.repeat


@dataclass
class _Piece:
    """One layer of one row: the tokens of a request in one forward pass."""

    indices: NDArray[np.int64]
    weights: NDArray[np.float32]
    counts: NDArray[np.int64]
    logits: NDArray[np.float32]


@dataclass
class _Request:
    """The data of one request; pieces by the position of their first token."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    layers: dict[int, dict[int, _Piece]] = field(default_factory=lambda: defaultdict(dict))


class SampleLog:
    """Keeps the documents whose id is below a limit.

    Parameters
    ----------
    limit : int
        Number of documents per task.
    num_experts, min_k, max_k : int
        Properties of the model and the routing.
    """

    def __init__(self, limit: int, num_experts: int, min_k: int, max_k: int) -> None:
        self._limit = limit
        self._num_experts = num_experts
        self._bounds = min_k, max_k
        self._requests: dict[Key, _Request] = defaultdict(_Request)
        self._wanted: list[tuple[Owner, int, Tensor]] = []

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Find the rows of documents to keep."""
        self._wanted = []
        for row, owners in enumerate(batch.owners):
            for owner in owners:
                if owner.doc_id < self._limit and batch.lengths[row]:
                    start = owner.offset + batch.first[row]
                    self._wanted.append((owner, start, batch.flat[row]))
                    request = self._requests[key_of(owner)]
                    request.token_ids[start] = batch.token_ids.flatten()[batch.flat[row]].tolist()

    def layer(self, layer: int, router_logits: Tensor, selection: Picked) -> None:
        """Keep one layer's selection for those rows."""
        if not self._wanted:
            return
        indices, weights, counts = (part.detach().cpu() for part in selection)
        logits = router_logits.detach().float().cpu()
        for owner, start, flat in self._wanted:
            piece = _Piece(
                indices[flat].numpy(),
                weights[flat].float().numpy(),
                counts[flat].numpy(),
                logits[flat[:LOGITS_SAMPLE]].numpy(),
            )
            self._requests[key_of(owner)].layers[layer][start] = piece

    def scored(self, losses: Callable[[], Tensor]) -> None:
        """Do nothing: a sample only has its request's loss."""

    def end(self) -> None:
        """Do nothing: rows are kept immediately."""

    def take(self, losses: dict[Key, float]) -> dict[str, list[Sample]]:
        """Return and clear the samples by task, ordered by document and request."""
        samples: dict[str, list[Sample]] = defaultdict(list)
        for key in sorted(self._requests):
            samples[key[0]].append(self._sample(key, self._requests[key], losses.get(key)))
        self._requests.clear()
        return dict(samples)

    def _sample(self, key: Key, kept: _Request, loss: float | None) -> Sample:
        token_ids = [token for start in sorted(kept.token_ids) for token in kept.token_ids[start]]
        return {
            "sample_id": key[1],
            "request": key[2],
            "repeat": key[3],
            "num_tokens": len(token_ids),
            "token_ids": token_ids,
            "loss": loss,
            "layers": [
                self._layer(layer, [pieces[start] for start in sorted(pieces)])
                for layer, pieces in sorted(kept.layers.items())
            ],
        }

    def _layer(self, layer: int, pieces: list[_Piece]) -> SampleLayer:
        indices = np.concatenate([piece.indices for piece in pieces])
        weights = np.concatenate([piece.weights for piece in pieces])
        counts = np.concatenate([piece.counts for piece in pieces])
        logits = np.concatenate([piece.logits for piece in pieces])[:LOGITS_SAMPLE]
        min_k, max_k = self._bounds
        return {
            "layer": layer,
            "router_logits_shape": [len(counts), self._num_experts],
            "selected_experts": np.where(indices == self._num_experts, UNUSED, indices).tolist(),
            "expert_weights": _rounded(weights),
            "expert_counts": counts.tolist(),
            "router_logits_sample": _rounded(logits),
            "layer_stats": {
                "avg_experts": float(counts.mean()),
                "std_experts": float(counts.std()),
                "ceiling_hits": int((counts == max_k).sum()),
                # With equal bounds every token is at the ceiling and none at the floor.
                "floor_hits": int((counts == min_k).sum()) if min_k < max_k else 0,
            },
        }


def _rounded(values: NDArray[np.float32]) -> Any:
    """Return nested lists of floats, rounded to digits that are not softmax noise."""
    return np.round(values.astype(np.float64), 6).tolist()
