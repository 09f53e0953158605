"""An experts forward that does no work for unused slots.

Registered with transformers as an experts implementation, so that a model dispatches to it like to
its own. Slots whose index is ``num_experts`` are dropped *before* any row is gathered: they cost no
memory, no arithmetic, and nothing uninitialised can leak from them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lm_eval_bh.routing.routers import transformers_model

RAGGED = "bh_ragged"


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
        float ``[tokens, hidden]``, of the dtype of ``hidden_states``.
    """
    slots = top_k_index.shape[-1]
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    rows_of = torch.bincount(experts, minlength=module.num_experts + 1)[
        : module.num_experts
    ].tolist()
    order = order[: sum(rows_of)]
    tokens = order // slots
    rows = hidden_states[tokens]
    weights = top_k_weights.reshape(-1)[order].unsqueeze(-1)
    out = torch.zeros_like(
        hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32)
    )
    start = 0
    for expert, count in enumerate(rows_of):
        if count:
            span = slice(start, start + count)
            value = _expert(module, expert, rows[span]) * weights[span]
            out.index_add_(0, tokens[span], value.to(out.dtype))
            start += count
    return out.to(hidden_states.dtype)


def _expert(module: Any, expert: int, rows: Tensor) -> Tensor:
    """Run one expert on its rows ``[rows, hidden]``."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    projected = _linear(module, up_name, expert, rows)
    hidden = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
    out = _linear(module, "down_proj", expert, hidden)
    return module.post_expert_norm(out) if module.has_post_expert_norm else out


def _linear(module: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return F.linear(rows, weight.T if module.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register(RAGGED, ragged_experts_forward)


# What `experts=` takes, and the name of the implementation within transformers.
EXPERTS: dict[str, str | None] = {
    "auto": None,
    "ragged": RAGGED,
    "eager": "eager",
    "grouped_mm": "grouped_mm",
    "batched_mm": "batched_mm",
}


class ExpertsSwitch:
    """Gives a model another experts implementation, and its own back.

    Parameters
    ----------
    model : nn.Module
        A transformers model, possibly wrapped.
    experts : str
        A key of :data:`EXPERTS`.
    unused_slots : bool
        Whether slots can stay unused. If none can, "auto" changes nothing. If some can, the stock
        implementations must be told (they know such slots from expert parallelism only, and read
        uninitialised memory otherwise).
    """

    def __init__(self, model: nn.Module, experts: str, *, unused_slots: bool) -> None:
        self._model = transformers_model(model)
        self._before: dict[str, str | None] | None = None
        self._flagged: list[Any] = []
        wanted = EXPERTS[experts] or (RAGGED if unused_slots else None)
        if wanted is not None and self._model._can_set_experts_implementation():
            self._before = self._model.get_experts_implementation()
            self._model.set_experts_implementation(wanted)
        if unused_slots:
            for module in self._model.modules():
                if getattr(module, "_is_expert_parallel", None) is False:
                    module._is_expert_parallel = True  # type: ignore[assignment]
                    self._flagged.append(module)

    def restore(self) -> None:
        """Undo what the constructor did."""
        for module in self._flagged:
            module._is_expert_parallel = False
        self._flagged.clear()
        if self._before is not None:
            self._model.set_experts_implementation(self._before)
            self._before = None
