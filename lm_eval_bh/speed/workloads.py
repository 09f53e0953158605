"""The workloads: reading whole texts (prefill), and writing token by token (decode)."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lm_eval_bh.routing.releases import returned_cache
from lm_eval_bh.routing.routers import transformers_model
from lm_eval_bh.speed.floor import wait_for

NOTHING = "bh_nothing"  # the experts implementation of dense_flops


class Workload(ABC):
    """The same tokens for every configuration.

    Attributes
    ----------
    name, task : str
        Its name, and the task of its text.
    batch_size, passes, tokens : int
        Rows per batch; forward passes of a measurement, and their total tokens.
    """

    def __init__(self, name: str, task: str, batch_size: int, passes: int, tokens: int) -> None:
        self.name, self.task = name, task
        self.batch_size, self.passes, self.tokens = batch_size, passes, tokens

    @abstractmethod
    def prepare(self, model: Any) -> Any:
        """Prepare before the clock starts, and return the input of :meth:`run`."""

    @abstractmethod
    def run(self, model: Any, prepared: Any) -> None:
        """Run the measured work."""

    def seconds(
        self,
        model: Any,
        now: Callable[[], float] = time.perf_counter,
        about_to_run: Callable[[], None] = lambda: None,
    ) -> float:
        """Return the seconds of :meth:`run`; ``about_to_run`` is called right before it."""
        prepared = self.prepare(model)
        wait_for(model.device)
        about_to_run()
        start = now()
        self.run(model, prepared)
        wait_for(model.device)
        return now() - start


class Prefill(Workload):
    """One pass over each batch, int64 ``[rows, length]``, without a cache."""

    def __init__(self, task: str, batches: Sequence[Tensor]) -> None:
        tokens = sum(batch.numel() for batch in batches)
        super().__init__("prefill", task, len(batches[0]), len(batches), tokens)
        self._batches = batches

    def prepare(self, model: Any) -> list[Tensor]:
        """Move the tokens to the device."""
        return [batch.to(model.device) for batch in self._batches]

    def run(self, model: Any, prepared: list[Tensor]) -> None:
        """Read every batch."""
        for batch in prepared:
            model(batch, use_cache=False)


class Decode(Workload):
    """One token per row and pass, after a prompt that is already in the cache.

    The input is the text's own continuation: configurations would write different texts, and so do
    different work.

    Parameters
    ----------
    rows : int64 [batch size, prompt + 1 + steps]
        Token ids; the first step after the prompt is not timed.
    """

    def __init__(self, task: str, rows: Tensor, prompt: int) -> None:
        size, steps = len(rows), rows.shape[1] - prompt - 1
        super().__init__(f"decode {size}", task, size, steps, size * steps)
        self._rows, self._prompt = rows, prompt

    def prepare(self, model: Any) -> tuple[dict[str, Any], list[Tensor]]:
        """Read the prompt, and write one token."""
        rows = self._rows.to(model.device)
        read = model(rows[:, : self._prompt], use_cache=True)
        first, *steps = rows[:, self._prompt :].split(1, dim=1)
        read = model(first, **returned_cache(read), use_cache=True)
        return returned_cache(read), steps

    def run(self, model: Any, prepared: tuple[dict[str, Any], list[Tensor]]) -> None:
        """Write the other tokens."""
        cache, steps = prepared
        for step in steps:
            cache = returned_cache(model(step, **cache, use_cache=True))


@torch.no_grad()
def dense_flops(workload: Workload, model: Any) -> int:
    """Count the FLOPs of a workload without its experts, which do not run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    whole = transformers_model(model)
    before = whole.get_experts_implementation()
    whole.set_experts_implementation(NOTHING)
    try:
        prepared = workload.prepare(model)
        # FLOPs of fused attention are not counted on every device.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            workload.run(model, prepared)
    finally:
        whole.set_experts_implementation(before)
    return int(counter.get_total_flops())


def _nothing(module: Any, hidden_states: Tensor, *_: Tensor) -> Tensor:
    return torch.zeros_like(hidden_states)


ALL_EXPERTS_FUNCTIONS.register(NOTHING, _nothing)
