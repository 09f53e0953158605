"""Switches a model's experts implementation while it is patched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.routing.patching.experts import RAGGED, RowsComputed
from lm_eval_bh.routing.routers import transformers_model

# Values of `experts=`, and the names of the implementations within transformers.
EXPERTS: dict[str, str | None] = {
    "auto": None,
    "ragged": RAGGED,
    "eager": "eager",
    "grouped_mm": "grouped_mm",
    "batched_mm": "batched_mm",
}


def check_implementation(name: str) -> None:
    """Raise a :class:`ParameterError` unless ``name`` is a key of :data:`EXPERTS`."""
    if name not in EXPERTS:
        raise ParameterError(
            f"experts_implementation must be one of {', '.join(EXPERTS)}: found {name!r}"
            f"{did_you_mean(str(name), EXPERTS)}."
        )


class ExpertsSwitch:
    """Switches a model's experts implementation, and restores it.

    It holds no module, so that it can be copied and saved with the hooks of a patched model.

    Parameters
    ----------
    model : nn.Module
        A transformers model, possibly wrapped.
    experts : str
        A key of :data:`EXPERTS`.
    unused_slots : bool
        Whether slots can stay unused. If not, "auto" changes nothing. If so, the stock
        implementations must be told (they know unused slots only from expert parallelism, and read
        uninitialised memory otherwise).

    Attributes
    ----------
    skips_unused : bool
        Whether the model now skips unused slots, so that padding can have only those.

    Raises
    ------
    ParameterError
        If slots can stay unused but the model's own code cannot skip them.
    """

    def __init__(self, model: nn.Module, experts: str, *, unused_slots: bool) -> None:
        whole = transformers_model(model)
        self._before: dict[str, str | None] | None = None
        self._rows: RowsComputed | None = None
        wanted = EXPERTS[experts] or (RAGGED if unused_slots else None)
        settable = whole._can_set_experts_implementation()
        if unused_slots and (wanted == "eager" or not settable):
            _refuse_unused(whole)
        if wanted is not None and settable:
            self._before = whole.get_experts_implementation()
            whole.set_experts_implementation(wanted)
            if wanted == RAGGED:
                self._rows = RowsComputed()
        self.skips_unused = unused_slots or self._rows is not None
        if self.skips_unused:
            for module in experts_of(whole):
                if module._is_expert_parallel is False:
                    module._is_expert_parallel = True
                    module._rows_computed = self._rows

    @property
    def rows_computed(self) -> int | None:
        """Expert rows computed so far, over all layers; None if transformers' own code ran.

        With "ragged" on a CPU in float32, it is the sum of counts over real tokens and patched
        layers, plus top-k per token in the others. Waits for the devices.
        """
        return None if self._rows is None else self._rows.total

    def restore(self, model: nn.Module) -> None:
        """Restore the model's own implementation."""
        whole = transformers_model(model)
        for module in experts_of(whole):
            if hasattr(module, "_rows_computed"):
                module._is_expert_parallel = False
                del module._rows_computed
        if self._before is not None:
            whole.set_experts_implementation(self._before)
            self._before = None


def experts_of(model: nn.Module) -> list[Any]:
    """Return the modules that hold all experts of a layer, as in transformers."""
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]


def _refuse_unused(model: nn.Module) -> None:
    """Raise if the family's own experts code crashes on an unused slot."""
    known: dict[type, str | None] = {}
    for module in experts_of(model):
        if type(module) not in known:
            known[type(module)] = _fault_of_unused(module)
        if (fault := known[type(module)]) is not None:
            raise ParameterError(
                f"experts_implementation=eager cannot leave slots unused in "
                f"{type(module).__name__}, whose own "
                f"code then fails ({fault}): use experts_implementation=ragged."
            )


def _fault_of_unused(module: Any) -> str | None:
    """Run the family's own code on an unused slot, with empty weights."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(torch.zeros(1).expand(p.shape), False)
        for name, p in module._parameters.items()
    }
    up = twin.gate_up_proj if module.has_gate else twin.up_proj
    hidden = torch.zeros(2, up.shape[1 if module.is_transposed else 2])
    indices = torch.tensor([[0, module.num_experts], [module.num_experts] * 2])
    try:
        with torch.no_grad():
            type(module).forward.__wrapped__(twin, hidden, indices, torch.ones(2, 2))
    except (RuntimeError, IndexError) as error:
        return str(error).splitlines()[0].rstrip(".")
    return None
