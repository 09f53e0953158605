"""Whether one kernel of ours routes faster than calls into torch: measured when hooks go in."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

from lm_eval_bh.routing.fastest import fastest
from lm_eval_bh.routing.selection import Selection, select
from lm_eval_bh.routing.selector import Selector

logger = logging.getLogger(__name__)

TOKENS = 1, 1024  # of a decoding step, and of a prompt
_known: dict[tuple[Any, ...], bool] = {}


def fuse_if_faster(selector: Selector, weight: Tensor) -> None:
    """Let a layer's rule run as one kernel on CUDA, if it can and that takes less time there.

    Parameters
    ----------
    selector : Selector
        The rule, which is changed.
    weight : Tensor
        The router's projection: where it lies, and of which dtype.
    """
    if weight.device.type == "cuda" and torch.cuda.is_available():
        fuse_by_measuring(selector, weight.device, weight.dtype)


def fuse_by_measuring(selector: Selector, device: torch.device, dtype: torch.dtype) -> None:
    """Let a layer's rule run as one kernel, if it can and that takes less time on a device.

    Measured once a process for each device, dtype and shape. Where the kernel cannot be made
    (Triton needs a C compiler, and may not know the card) a warning says why, and the calls stay.
    """
    fused = fused_step(selector)
    if fused is None:
        return
    key = device, dtype, selector.num_experts, selector.config.max_k, selector.rule.name
    if key not in _known:
        try:
            _known[key] = takes_less(selector, fused, device, dtype)
        except Exception as error:
            _known[key] = False
            logger.warning(
                "Routing on %s runs as calls into torch, since its Triton kernel failed: %s",
                device,
                error,
            )
    if _known[key]:
        selector.fused = fused


def fused_step(selector: Selector) -> Any:
    """Return the kernel of a layer's rule; None if there is none for it, or no Triton."""
    step = selector.step()
    if step is None or importlib.util.find_spec("triton") is None:
        return None
    from lm_eval_bh.routing.fused_kernel import MOST_EXPERTS, FusedStep

    if selector.num_experts > MOST_EXPERTS:
        return None
    thresholds, down = step
    return FusedStep(thresholds, selector.config.min_k, selector.config.max_k, down=down)


@torch.no_grad()
def takes_less(selector: Selector, fused: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel takes less time than the calls, for one token and for many, both."""
    generator = torch.Generator(device).manual_seed(0)

    def way(given: Any, logits: Tensor, own: tuple[Tensor, Tensor]) -> Selection:
        selector.fused = given
        return select(logits, selector, own)

    try:
        for tokens in TOKENS:
            shape = tokens, selector.num_experts
            logits = torch.randn(shape, generator=generator, device=device).to(dtype)
            weights, indices = logits.float().softmax(-1).topk(selector.config.max_k)
            given = logits, (weights.to(dtype), indices)
            ways = {
                "calls": lambda given=given: way(None, *given),
                "kernel": lambda given=given: way(fused, *given),
            }
            if fastest(ways, device) == "calls":
                return False
    finally:
        selector.fused = None
    return True
