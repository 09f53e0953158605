"""What a step-up or step-down does with the logits of a layer, in one kernel: for accelerators.

A dozen calls into torch become one: sort the logits of a token, compare every rank with its
threshold, find the count, empty the slots beyond it. Softmax and top-k stay the router's own, which
has run when its hook does: two exponentials differ in their last bit, so weights of the kernel's
own would not be those of the model. Needs Triton; importing this without it raises ImportError.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_EXPERTS = 256
KINDS = (torch.float32, torch.bfloat16, torch.float16)  # every one is a float32 exactly
NUMBERS = 2048  # logits that one program sorts


@triton.jit  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]
    logits,
    weights,
    indices,
    least,
    kept_weights,
    kept_indices,
    counts,
    tokens,
    EXPERTS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    SLOTS: tl.constexpr,  # noqa: N803
    MIN_K: tl.constexpr,  # noqa: N803
    MAX_K: tl.constexpr,  # noqa: N803
    DOWN: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    PLACES: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, WIDTH)
    there = (row < tokens)[:, None] & (rank < EXPERTS)[None, :]
    at = row.to(tl.int64)[:, None]
    scores = tl.load(logits + at * EXPERTS + rank[None, :], there, -float("inf"))
    descending = tl.sort(scores.to(tl.float32), dim=1, descending=True)
    met = descending >= tl.load(least + rank, rank < EXPERTS, float("inf"))[None, :]
    if DOWN:
        found = tl.min(tl.where(met, WIDTH, rank[None, :]), axis=1)
    else:
        found = tl.max(tl.where(met, rank[None, :] + 1, 0), axis=1)
    count = tl.minimum(tl.maximum(found, MIN_K), MAX_K)
    tl.store(counts + row, count.to(tl.int64), row < tokens)

    slot = tl.arange(0, PLACES)
    there = (row < tokens)[:, None] & (slot < SLOTS)[None, :]
    used = slot[None, :] < count[:, None]
    index = tl.load(indices + at * SLOTS + slot[None, :], there & used, EXPERTS)
    weight = tl.load(weights + at * SLOTS + slot[None, :], there & used, 0.0)
    tl.store(kept_indices + at * SLOTS + slot[None, :], index, there)
    tl.store(kept_weights + at * SLOTS + slot[None, :], weight, there)


class FusedStep:
    """A step-up or step-down within bounds, and the selection that follows, as one kernel.

    It decides what the rule decides, to the last bit.

    Parameters
    ----------
    thresholds : Tensor
        float32 ``[experts]``, what ascending negated logits are compared with, rounded down.
    min_k, max_k : int
        The bounds.
    down : bool
        Whether it steps down.
    """

    def __init__(self, thresholds: Tensor, min_k: int, max_k: int, *, down: bool) -> None:
        self._least = -thresholds
        self._min_k, self._max_k, self._down = min_k, max_k, down
        self._on: dict[torch.device, Tensor] = {}

    def serves(self, router_logits: Tensor) -> bool:
        """Whether it can take these logits: no gradient is asked of them, and nothing traces."""
        return (
            router_logits.dtype in KINDS
            and not (router_logits.requires_grad and torch.is_grad_enabled())
            and not torch.compiler.is_compiling()
        )

    def __call__(
        self, router_logits: Tensor, indices: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return indices and weights with empty slots beyond the counts, and the counts.

        Parameters
        ----------
        router_logits : Tensor
            float ``[tokens, experts]``.
        indices, weights : Tensor
            int64 and float ``[tokens, slots]``, experts by descending logit.

        Returns
        -------
        (Tensor, Tensor, Tensor)
            int64 ``[tokens, slots]``, float ``[tokens, slots]`` and int64 ``[tokens]``.
        """
        device = router_logits.device
        if device not in self._on:
            self._on[device] = self._least.to(device)
        tokens, experts = router_logits.shape
        slots = indices.shape[-1]
        kept_indices, kept_weights = (
            indices.new_empty(tokens, slots),
            weights.new_empty(tokens, slots),
        )
        counts = indices.new_empty(tokens)
        if not tokens:
            return kept_indices, kept_weights, counts
        width = triton.next_power_of_2(experts)
        rows = min(max(NUMBERS // width, 1), triton.next_power_of_2(tokens))
        _step[(triton.cdiv(tokens, rows),)](
            router_logits.contiguous(),
            weights.contiguous(),
            indices.contiguous(),
            self._on[device],
            kept_weights,
            kept_indices,
            counts,
            tokens,
            EXPERTS=experts,
            WIDTH=width,
            SLOTS=slots,
            MIN_K=self._min_k,
            MAX_K=self._max_k,
            DOWN=self._down,
            ROWS=rows,
            PLACES=triton.next_power_of_2(slots),
        )
        return kept_indices, kept_weights, counts
