"""An experts forward that skips unused slots and padding.

It is registered with transformers as an experts implementation, so models dispatch to it like to
their own. A slot with index ``num_experts`` is unused. On the CPU such slots are dropped *before*
any row is gathered: they cost no memory and no arithmetic, and no uninitialised value can leak from
them. A token whose slots are all unused, such as padding, costs nothing either.

The algorithm is chosen by measurements at OLMoE's size (``scripts/bench_routing.py``):

- CPU: expert by expert over each one's rows. The matrix product is transposed, ``W @ rows.T``, in
  bfloat16 and, for 4 to 48 rows, in float32, where it takes 0.6 to 0.8 and 0.5 to 0.9 of the time
  of ``rows @ W.T``. With fewer rows, float32 takes 1.7 times as long that way, with more up to 1.15
  times (unless they are a multiple of 16), and float16 does not gain.
- CPU, one token: the same, without sorting and with one activation for all its experts. Reading
  their weights once takes all the time; copying them first (``batched_mm``) takes 5 to 9 times it.
- CPU, many experts with few rows each (a batch of decoding steps; small experts): transformers'
  ``grouped_mm`` over the used rows only. It is a loop inside torch, never transposed, and avoids
  our Python: 0.4 to 0.9 of the time at 32 tokens, but up to 2.0 times the time at 1,024, and no
  gain with large experts in bfloat16.
- CPU, bfloat16 and float16: oneDNN compiles a kernel for every new number of rows (1 to 2 ms), and
  its kernels work on blocks of 16 rows anyway. Beyond 16 rows, a matrix product therefore takes the
  next multiple of 16, filled with rows that are in memory already; their results are discarded.
- Elsewhere: transformers' ``grouped_mm`` with the unused slots masked. Its kernel skips them and
  the host never waits, whereas the loop would wait once per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    grouped_mm_experts_forward,
)

from lm_eval_bh.routing.releases import after_expert

RAGGED = "bh_ragged"
FEW, MANY = 3, 48  # between these rows float32 is faster transposed
LITTLE = 2**20  # up to this (rows x down-projection weights), call overhead dominates
BLOCK = 16  # rows of one block of a kernel that oneDNN compiles for half precision


class RowsComputed:
    """Counts the computed expert rows; one row is one expert applied to one token.

    Rows that fill up a block count too. The host never waits for a device.
    """

    def __init__(self) -> None:
        self._host = 0
        self._device: dict[torch.device, Tensor] = {}

    def add(self, rows: int | Tensor) -> None:
        """Add a number, or an int64 scalar that stays on its device."""
        if isinstance(rows, int):
            self._host += rows
        elif rows.device in self._device:
            self._device[rows.device].add_(rows)
        else:
            self._device[rows.device] = rows.clone()

    @property
    def total(self) -> int:
        """The number of rows; reading it waits for the devices."""
        return self._host + sum(int(rows) for rows in self._device.values())


def ragged_experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Apply only the experts of used slots to each token.

    Parameters
    ----------
    module : nn.Module
        An experts module of transformers: stacked ``gate_up_proj`` (or ``up_proj``) and
        ``down_proj``.
    hidden_states : Tensor
        float ``[tokens, hidden]``.
    top_k_index : Tensor
        int64 ``[tokens, slots]``; ``num_experts`` marks an unused slot.
    top_k_weights : Tensor
        float ``[tokens, slots]``.

    Returns
    -------
    Tensor
        float ``[tokens, hidden]``, in the dtype of ``hidden_states``; summed over a token's experts
        in float32 or better.
    """
    if hidden_states.device.type == "cpu":
        # A compiled model calls the loop uncompiled, between two graphs.
        return _uncompiled(module, hidden_states, top_k_index, top_k_weights)
    _count(module, (top_k_index.detach() < module.num_experts).sum())
    return _grouped(module, hidden_states, top_k_index, top_k_weights)


def _expert_by_expert(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Drop the unused slots, and give every expert in use its rows."""
    if len(hidden_states) == 1:
        return _one_token(module, hidden_states, top_k_index, top_k_weights)
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    rows_of = torch.bincount(experts, minlength=module.num_experts)[: module.num_experts].tolist()
    used = sum(rows_of)
    order = order[:used]
    tokens = order // top_k_index.shape[-1]
    weights = top_k_weights.reshape(-1)[order].unsqueeze(-1)
    accumulated = torch.promote_types(hidden_states.dtype, torch.float32)
    out = torch.zeros_like(hidden_states, dtype=accumulated)
    if _grouping_pays(module, rows_of, hidden_states.dtype):
        values = _grouped(module, hidden_states[tokens], experts[:used].unsqueeze(-1), weights)
        out.index_add_(0, tokens, values.to(accumulated))
        _count(module, used)
        return out.to(hidden_states.dtype)
    parameters = _Parameters(module)
    start = computed = 0
    for expert, count in enumerate(rows_of):
        if count:
            size = count
            if count > BLOCK and hidden_states.dtype in (torch.bfloat16, torch.float16):
                size = min(-(-count // BLOCK) * BLOCK, used)
            first = min(start, used - size)
            value = _expert(parameters, expert, hidden_states[tokens[first : first + size]])
            value = value[start - first : start - first + count]
            own = slice(start, start + count)
            out.index_add_(0, tokens[own], (value * weights[own]).to(accumulated))
            start += count
            computed += size
    _count(module, computed)
    return out.to(hidden_states.dtype)


def each_expert(
    module: Any, hidden_states: Tensor, top_k_index: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (expert, its tokens, its outputs for them) for every expert in use.

    Parameters
    ----------
    module, hidden_states, top_k_index
        As in :func:`ragged_experts_forward`.

    Yields
    ------
    (int, Tensor int64 ``[rows]``, Tensor float ``[rows, hidden]``)
        The output is not weighted.
    """
    parameters = _Parameters(module)
    for expert in range(module.num_experts):
        tokens = (top_k_index == expert).any(-1).nonzero().flatten()
        if len(tokens):
            yield expert, tokens, _expert(parameters, expert, hidden_states[tokens])


def slot_outputs(experts: Any, hidden_states: Tensor, indices: Tensor) -> Tensor:
    """Return the unweighted output of each slot's expert: ``[tokens, slots, hidden]``."""
    found = torch.zeros(
        *indices.shape, hidden_states.shape[-1], dtype=torch.float64, device=indices.device
    )
    for expert, tokens, output in each_expert(experts, hidden_states, indices):
        slots = (indices[tokens] == expert).long().argmax(-1)
        found[tokens, slots] = output.double()
    return found


def _grouping_pays(module: Any, rows_of: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether many experts have few rows each, so that torch's loop is faster."""
    in_use = sum(1 for rows in rows_of if rows)
    weights = module.down_proj[0]
    if in_use <= 8 or dtype == torch.float64:  # its kernels lack float64
        return False
    if any(side * dtype.itemsize % 16 for side in weights.shape):  # and other strides
        return False
    rows = sum(rows_of) / in_use
    return bool(rows * weights.numel() <= LITTLE or (dtype == torch.float32 and rows < 8))


def _one_token(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Decode one token: no sorting, gathering or scattering."""
    slots = [
        (slot, expert)
        for slot, expert in enumerate(top_k_index[0].tolist())
        if expert < module.num_experts
    ]
    _count(module, len(slots))
    if not slots:
        return torch.zeros_like(hidden_states)
    parameters = _Parameters(module)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    rows = torch.cat([_linear(parameters, up, expert, hidden_states) for _, expert in slots])
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    values = torch.cat(
        [
            _linear(parameters, "down_proj", expert, row)
            for (_, expert), row in zip(slots, rows.split(1), strict=True)
        ]
    )
    values = after_expert(module, values)
    weights = top_k_weights[0, [slot for slot, _ in slots]].unsqueeze(-1)
    accumulated = torch.promote_types(hidden_states.dtype, torch.float32)
    out = (values * weights).sum(0, keepdim=True, dtype=accumulated)
    return out.to(hidden_states.dtype)


ExpertsForward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
_uncompiled: ExpertsForward = torch.compiler.disable(_expert_by_expert)
_grouped: ExpertsForward = grouped_mm_experts_forward


class _Parameters:
    """The parameters of an experts module, expert by expert.

    If gradients are needed, the stack is unbound once: the gradient of ``stack[expert]`` would be a
    tensor as large as the whole stack, for every expert.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self._stacks: dict[str, Sequence[Tensor] | Tensor] = {}

    def __call__(self, name: str, expert: int) -> Tensor:
        stack = self._stacks.get(name)
        if stack is None:
            stack = getattr(self.module, name)
            if torch.is_grad_enabled() and stack.requires_grad:
                stack = stack.unbind()
            self._stacks[name] = stack
        return stack[expert]


def _expert(parameters: _Parameters, expert: int, rows: Tensor) -> Tensor:
    """Run one expert on its rows ``[rows, hidden]``."""
    module = parameters.module
    projected = _linear(parameters, "gate_up_proj" if module.has_gate else "up_proj", expert, rows)
    hidden = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
    out = _linear(parameters, "down_proj", expert, hidden)
    return after_expert(module, out)


def _linear(parameters: _Parameters, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = parameters(name, expert)
    bias = parameters(f"{name}_bias", expert) if parameters.module.has_bias else None
    if parameters.module.is_transposed:
        weight = weight.T
    if rows.dtype == torch.bfloat16 or (rows.dtype != torch.float16 and FEW < len(rows) <= MANY):
        out = torch.mm(weight, rows.T).T
        return out if bias is None else out + bias
    return F.linear(rows, weight, bias)


def _count(module: Any, rows: int | Tensor) -> None:
    counter = getattr(module, "_rows_computed", None)
    if counter is not None:
        counter.add(rows)


ALL_EXPERTS_FUNCTIONS.register(RAGGED, ragged_experts_forward)
