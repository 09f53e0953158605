"""An experts forward that does no work for unused slots, nor for padding.

Registered with transformers as an experts implementation, so that a model dispatches to it like to
its own. A slot whose index is ``num_experts`` is unused. On the CPU such slots are dropped *before*
any row is gathered: they cost no memory, no arithmetic, and nothing uninitialised can leak from
them. A token all of whose slots are unused, as padding is, costs nothing either.

Which algorithm runs, by measurement at OLMoE's size (``scripts/bench_routing.py``):

- CPU: expert by expert over the rows of each. The matrix product is transposed, ``W @ rows.T``, in
  bfloat16 and, for 4 to 48 rows, in float32: there that way round takes 0.6 to 0.8, and 0.5 to 0.9,
  of the time of ``rows @ W.T``. For fewer rows in float32 it takes 1.7 times as long, for more up
  to 1.15 times (unless they are a multiple of 16), and in float16 it is no better.
- CPU, one token: the same, with no sorting and one activation for all its experts. Reading their
  weights once is all the time there is; copying them first (``batched_mm``) takes 5 to 9 times it.
- CPU, many experts with little to do each (a batch of decoding steps; small experts):
  transformers' ``grouped_mm`` over the used rows only. It is a loop inside torch, always the plain
  way round, and saves the Python of ours: 0.4 to 0.9 of the time at 32 tokens, but up to 2.0 of it
  at 1,024, and no gain with large experts in bfloat16.
- CPU, bfloat16 and float16: oneDNN compiles a kernel for every new number of rows (1 to 2 ms), and
  its kernels work on blocks of 16 rows anyway. So beyond 16 rows a matrix product takes the next
  multiple of 16, made up of rows that lie there already; what they give is thrown away.
- Elsewhere: transformers' ``grouped_mm`` with the unused slots masked. Its kernel skips them and
  the host waits for nothing, where the loop would wait once a layer.
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
FEW, MANY = 3, 48  # rows between which float32 is faster the transposed way round
LITTLE = 2**20  # rows x weights of the down projection, up to which calls take the time
BLOCK = 16  # rows of one block of a kernel that oneDNN compiles for half precision


class RowsComputed:
    """Counts the expert rows that were really computed: one is one expert applied to one token.

    Rows that only fill up a block are computed, so they count. The host never waits for a device.
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
        """The number of rows; asking for it waits for the devices."""
        return self._host + sum(int(rows) for rows in self._device.values())


def ragged_experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Apply to each token the experts of its used slots, and nothing else.

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
        float ``[tokens, hidden]``, of the dtype of ``hidden_states``; summed over a token's experts
        in float32 at the least.
    """
    if hidden_states.device.type == "cpu":
        # A compiled model calls the loop as it is, between two graphs.
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
    """Yield (expert, its tokens, what it gives out for them) for every expert in use.

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
    """Return what each slot's expert gives its token, not weighted: ``[tokens, slots, hidden]``."""
    found = torch.zeros(
        *indices.shape, hidden_states.shape[-1], dtype=torch.float64, device=indices.device
    )
    for expert, tokens, output in each_expert(experts, hidden_states, indices):
        slots = (indices[tokens] == expert).long().argmax(-1)
        found[tokens, slots] = output.double()
    return found


def _grouping_pays(module: Any, rows_of: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether many experts have little to do each, and torch's own loop is the faster one."""
    in_use = sum(1 for rows in rows_of if rows)
    weights = module.down_proj[0]
    if in_use <= 8 or dtype == torch.float64:  # its kernels know no float64
        return False
    if any(side * dtype.itemsize % 16 for side in weights.shape):  # nor other strides
        return False
    rows = sum(rows_of) / in_use
    return bool(rows * weights.numel() <= LITTLE or (dtype == torch.float32 and rows < 8))


def _one_token(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Decode: every expert in use has the one row, so nothing is sorted, gathered or scattered."""
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

    Where gradients are wanted the stack is taken apart once: the gradient of ``stack[expert]`` is a
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
