"""Reads a router's result as the input of methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import ModelError
from lm_eval_bh.routing.methods.reading import Reading
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.routers import Router


class RouterReader:
    """Makes a :class:`RouterOutput` from a router's result.

    Parameters
    ----------
    router : Router
        The router.
    slots : int
        How many experts it has to rank. A router that returned fewer is run once more, if its
        number of experts is adjustable; a softmax is computed here.
    in_order : bool
        Whether the first slots have to be the router's first experts.
    """

    def __init__(self, router: Router, slots: int, *, in_order: bool = True) -> None:
        self._name, self._obeys = router.name, router.behaviour.obeys
        self._reading = reading_of(router, slots, in_order=in_order)
        self._order = router.order if self._reading.sorted_by else None
        beside = router.order is not None and router.order.beside
        self._parent = router.parent if beside else None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> RouterOutput:
        """Return the router's output for ``[tokens]``.

        Parameters
        ----------
        module, args, output
            The arguments of a forward hook of the router.

        Raises
        ------
        ModelError
            If the router does not return (logits, weights, indices).
        """
        if not (isinstance(output, tuple) and len(output) == 3):
            raise ModelError(
                f"The router {self._name} ({type(module).__name__}) does not return "
                "(logits, weights, indices): routers of this family are not supported."
            )
        few = output[2].shape[-1] < self._reading.slots
        if few and self._obeys and not self._reading.softmax:
            output = (output[0], *self._asked_again(module, args)[1:])
        return self._reading(output, args[0], self._bias(module))

    def _asked_again(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Run the router again, without its hooks, for the number of experts needed."""
        before = module.top_k
        module.top_k = self._reading.slots  # type: ignore[assignment]
        try:
            with torch.no_grad():
                return type(module).forward(module, *args)
        finally:
            module.top_k = before

    def _bias(self, module: nn.Module) -> Tensor | None:
        if self._order is None or self._order.bias is None:
            return None
        bias: Any = module if self._parent is None else self._parent
        for name in self._order.bias.split("."):
            bias = getattr(bias, name)
        return bias  # type: ignore[no-any-return]


def reading_of(router: Router, slots: int, *, in_order: bool = True) -> Reading:
    """Return the reading of a router, see :class:`RouterReader`."""
    order = router.order
    in_slots = order is None or order.in_slots or not in_order
    return Reading(
        slots=slots,
        native_k=router.top_k,
        softmax=router.softmax,
        rescales=router.normalizes,
        scores=router.behaviour.scores,
        sorted_by=None if order is None or in_slots else order.score,
    )
