"""How tables that methods need are measured, one small class per table.

:meth:`~lm_eval_bh.routing.methods.base.Method.needs` names a table by its class's ``name``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_eval_bh.errors import ModelError
from lm_eval_bh.routing.methods.router import RouterOutput

Array = NDArray[np.float64]
TABLES: dict[str, type[Measurement]] = {}


class Measurement:
    """One table of a model, measured on text.

    A table overrides :meth:`hear` or :meth:`hear_experts`, which take part in one shared forward
    pass, or :meth:`run`, which makes its own passes; and :meth:`result`.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, not patched.
    routers : sequence of nn.Module
        Its routers in the order of the layers.

    Attributes
    ----------
    name : str
        Name in methods and files.
    listens : "", "routers" or "experts"
        The outputs it needs from the shared pass, if any.

    Raises
    ------
    ModelError
        If the experts beside a router cannot be run one by one.
    """

    name: ClassVar[str]
    listens: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            TABLES[cls.name] = cls

    def __init__(self, model: nn.Module, routers: Sequence[nn.Module]) -> None:
        self.model, self.routers = model, list(routers)

    def run(self, batches: Sequence[Tensor], progress: bool) -> None:
        """Make separate passes over int64 ``[batch, length]`` token ids without padding."""

    def hear(self, layer: int, said: RouterOutput) -> None:
        """Record the output of a layer's router for a batch."""

    def hear_experts(
        self, layer: int, module: Any, hidden_states: Tensor, indices: Tensor, weights: Tensor
    ) -> None:
        """Record the input of a layer's experts: ``[tokens, hidden]`` and ``[tokens, slots]``."""

    def result(self) -> Array:
        """Return the table, float64 ``[layers, ...]``."""
        raise NotImplementedError(f"{type(self).__name__} has to define result.")


def experts_beside(model: nn.Module, router: nn.Module) -> Any:
    """Return the experts module that shares its parent with the router."""
    for module in model.modules():
        if any(child is router for child in module.children()):
            experts = getattr(module, "experts", None)
            if hasattr(experts, "has_gate") and hasattr(experts, "down_proj"):
                return experts
    raise ModelError(
        f"The experts beside {type(router).__name__} cannot be run one by one, so their output "
        "norms cannot be measured: use statistic=logit."
    )


@contextmanager
def hearing_experts(
    model: nn.Module, routers: Sequence[nn.Module], ears: Sequence[Measurement]
) -> Iterator[None]:
    """Pass on the input of every layer's experts during forward passes."""
    handles = []
    try:
        for layer, router in enumerate(routers if ears else ()):
            listener = _listener(ears, layer)
            handles.append(experts_beside(model, router).register_forward_pre_hook(listener))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listener(ears: Sequence[Measurement], layer: int) -> Any:
    def listen(module: nn.Module, args: tuple[Any, ...]) -> None:
        for ear in ears:
            ear.hear_experts(layer, module, *args[:3])

    return listen
