"""The lower bound of time: arithmetic, or reading the necessary weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lm_eval_bh.routing.patching.experts_switch import experts_of

REPEATS = 7


@dataclass(frozen=True)
class Machine:
    """The peak rates of a device.

    Attributes
    ----------
    matmul_rate : float
        FLOP per second, in a large matrix product.
    copy_rate, read_rate : float
        Bytes per second, in a copy (both ways counted) and in reading.
    """

    matmul_rate: float
    copy_rate: float
    read_rate: float

    @property
    def bandwidth(self) -> float:
        """Bytes per second: weights are only read, so copying alone would underestimate it."""
        return max(self.copy_rate, self.read_rate)

    def floor(self, flops: float, bytes_read: float) -> float:
        """Return the lower bound of seconds for this work."""
        return max(flops / self.matmul_rate, bytes_read / self.bandwidth)


def measure_machine(
    dtype: torch.dtype,
    device: torch.device,
    now: Callable[[], float] = time.perf_counter,
    elements: int = 2**27,
) -> Machine:
    """Measure a device, the best of :data:`REPEATS` each.

    Parameters
    ----------
    elements : int
        Size of the float32 array to copy and read, which must not fit into a cache.
    """
    a = torch.randn(1024, 2048, device=device).to(dtype)
    b = torch.randn(2048, 4096, device=device).to(dtype)
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(REPEATS):
            wait_for(device)
            start = now()
            work()
            wait_for(device)
            seconds.append(now() - start)
        return min(seconds)

    size = source.numel() * source.element_size()
    return Machine(
        2 * 1024 * 2048 * 4096 / best(lambda: a @ b),
        2 * size / best(lambda: target.copy_(source)),
        size / best(source.sum),
    )


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Weights:
    """The sizes of a model's weights.

    Attributes
    ----------
    dense_bytes : int
        Bytes of the parameters that every token needs: all except experts and embeddings.
    expert_bytes, expert_elements : int
        Bytes and elements of one expert; each element is a multiply-add per token.
    """

    dense_bytes: int
    expert_bytes: int
    expert_elements: int


def weights_of(model: nn.Module, num_experts: int) -> Weights | None:
    """Return the sizes; None for a family without one module of stacked experts per layer."""
    experts = experts_of(model)
    if not experts:
        return None
    of_experts = {id(p): p for module in experts for p in module.parameters()}
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    skipped = set() if embedding is None else {id(p) for p in embedding.parameters()}
    dense = [p for p in model.parameters() if id(p) not in of_experts and id(p) not in skipped]
    stacked = len(experts) * num_experts
    return Weights(
        sum(p.numel() * p.element_size() for p in dense),
        sum(p.numel() * p.element_size() for p in of_experts.values()) // stacked,
        sum(p.numel() for p in of_experts.values()) // stacked,
    )
