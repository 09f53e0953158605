"""Up to how many tokens an accelerator computes faster by copies of the weights: measured.

``grouped_mm`` sorts the slots by expert and reads each expert once; ``batched_mm`` copies the
weights of every slot, which is less work where tokens are few. Where the one overtakes the other
depends on card, dtype and sizes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from lm_eval_bh.routing.fastest import fastest

TOKENS = 1, 2, 4, 8
MOST_BYTES = 2**30  # of copied weights
_known: dict[tuple[Any, ...], int] = {}


def measurable(module: Any) -> bool:
    """Whether the weights of an experts module are plain numbers on a CUDA device that is there."""
    kinds = {(p.device.type, p.dtype.is_floating_point) for p in module.parameters()}
    return kinds == {("cuda", True)} and torch.cuda.is_available()


def batched_up_to(module: Any, slots: int) -> int:
    """Return up to how many tokens ``batched_mm`` takes less time than ``grouped_mm``.

    Measured once a process for each device, dtype and shape, with half of the slots unused.

    Parameters
    ----------
    module : nn.Module
        An experts module of transformers that has been told of unused slots.
    slots : int
        How many each token has.

    Returns
    -------
    int
        0 if it never does, or would copy more than a gibibyte.
    """
    weights = [p for name, p in module.named_parameters() if name.endswith("_proj")]
    device, dtype = weights[0].device, weights[0].dtype
    key = device, dtype, slots, type(module), *(p.shape for p in weights)
    if key not in _known:
        _known[key] = _measured(module, weights, slots)
    return _known[key]


@torch.no_grad()
def _measured(module: Any, weights: list[Tensor], slots: int) -> int:
    device, dtype = weights[0].device, weights[0].dtype
    generator = torch.Generator(device).manual_seed(0)
    copied = slots * sum(p[0].numel() * p.itemsize for p in weights)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    found = 0
    for tokens in TOKENS:
        if tokens * copied > MOST_BYTES:
            break
        shape = tokens, up.shape[1 if module.is_transposed else 2]
        hidden = torch.randn(shape, generator=generator, device=device).to(dtype)
        shape = tokens, module.num_experts
        ranked = torch.rand(shape, generator=generator, device=device).topk(slots)
        unused = torch.arange(slots, device=device) >= (slots + 1) // 2
        indices = ranked.indices.masked_fill(unused, module.num_experts)
        given = hidden, indices, ranked.values.masked_fill(unused, 0.0).to(dtype)
        ways = {
            "grouped": partial(grouped_mm_experts_forward, module, *given),
            "batched": partial(batched_mm_experts_forward, module, *given),
        }
        try:
            if fastest(ways, device) == "grouped":
                break
        except torch.OutOfMemoryError:  # the card is full of the model: no copies then
            break
        found = tokens
    return found
