"""Measures how the model's output depends on one layer's experts, by changing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lm_eval_bh.errors import DataError
from lm_eval_bh.routing.router_reader import RouterReader
from lm_eval_bh.routing.routers import Router, find_routers
from lm_eval_bh.routing.tables.measurement import Array, Measurement

TOKENS = 4096  # tokens of text: each layer needs its own passes


class ChangedLayers(Measurement):
    """Runs a model with several numbers of experts in one layer."""

    def run(self, batches: Sequence[Tensor], progress: bool) -> None:
        """Sum each change's effect on the log-probabilities of the next token."""
        routers = find_routers(self.model)
        counts = self.counts(routers[0].top_k)
        self._sums = np.zeros((len(routers), len(counts)))
        self._tokens = 0
        device = next(self.model.parameters()).device
        bar = tqdm(batches, self.name, unit="batch", disable=None if progress else True)
        with torch.inference_mode():
            for ids in bar:
                if self._tokens >= TOKENS or ids.shape[1] < 2:
                    continue
                ids = ids[: max(1, -(-(TOKENS - self._tokens) // ids.shape[1]))].to(device)
                native = self._log_probabilities(ids)
                for layer, router in enumerate(routers):
                    for at, k in enumerate(counts):
                        with _at_most(router, k):
                            changed = self._log_probabilities(ids)
                        self._sums[layer, at] += float(self.difference(native, changed, ids))
                self._tokens += ids[:, 1:].numel()
        bar.close()

    def counts(self, native_k: int) -> Sequence[int]:
        """Return the numbers of experts to try."""
        raise NotImplementedError(f"{type(self).__name__} has to define counts.")

    def difference(self, native: Tensor, changed: Tensor, ids: Tensor) -> Tensor:
        """Return the difference of log-probabilities ``[..., words]``, summed over tokens."""
        raise NotImplementedError(f"{type(self).__name__} has to define difference.")

    def result(self) -> Array:
        """Return the means over tokens, float64 ``[layers, counts]``."""
        if not self._tokens:
            raise DataError(
                "There is no text to try layers on: pass windows of two or more tokens."
            )
        return self._sums / self._tokens

    def _log_probabilities(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.log_softmax(logits.float(), dim=-1)


class IsolatedLosses(ChangedLayers):
    """Loss increase in nats per token if only one layer has top-k: ``[layers, k]``."""

    name = "isolated"

    def counts(self, native_k: int) -> Sequence[int]:
        """Return 1 to the native k, which changes nothing."""
        return range(1, native_k + 1)

    def difference(self, native: Tensor, changed: Tensor, ids: Tensor) -> Tensor:
        """Return the decrease of log-probabilities, summed over tokens."""
        return (native - changed).gather(-1, ids[:, 1:, None]).double().sum()


class LayerDivergences(ChangedLayers):
    """KL divergence in nats per token of the model without a layer's experts: ``[layers]``."""

    name = "layer_kl"

    def counts(self, native_k: int) -> Sequence[int]:
        """Return 0 only: no experts in the layer."""
        return (0,)

    def difference(self, native: Tensor, changed: Tensor, ids: Tensor) -> Tensor:
        """Return the sum over tokens of KL(native || changed)."""
        return F.kl_div(changed, native, reduction="none", log_target=True).double().sum()

    def result(self) -> Array:
        """Return the means, at least the smallest positive number."""
        return np.maximum(super().result()[:, 0], np.finfo(np.float64).tiny)


@contextmanager
def _at_most(router: Router, k: int) -> Iterator[None]:
    """Give weight 0 to all but a router's first k experts, and rescale as the router does."""
    read = RouterReader(router, 1)

    def keep_first(module: nn.Module, args: Any, output: Any) -> Any:
        said = read(module, args, output)
        weights = said.weights.clone()
        weights[:, k:] = 0
        if router.normalizes and k:
            sums = said.weights.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
            weights = weights * sums
        return said.logits, weights, said.indices

    handle = router.module.register_forward_hook(keep_first)
    try:
        yield
    finally:
        handle.remove()
