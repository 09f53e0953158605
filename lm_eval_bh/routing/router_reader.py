"""What a router says, as methods look at it: its own triple, ranked its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import ModelError
from lm_eval_bh.routing.methods.router import RouterOutput, softmax_output
from lm_eval_bh.routing.probe import choice_scores
from lm_eval_bh.routing.routers import Router


class RouterReader:
    """Makes a :class:`RouterOutput` of what a router has returned.

    Parameters
    ----------
    router : Router
        The router.
    slots : int
        How many experts it has to rank. Where it was asked for fewer it is asked once more, if it
        ranks as many as it is told; a softmax is computed here.
    in_order : bool
        Whether the first slots have to be the router's first experts; by default they do.
    """

    def __init__(self, router: Router, slots: int, *, in_order: bool = True) -> None:
        self.slots, self._name = slots, router.name
        self._native_k, self._softmax = router.top_k, router.softmax
        self._rescales, self._obeys = router.normalizes, router.behaviour.obeys
        self._scores = router.behaviour.scores
        order = router.order
        self._order = None if order is None or order.in_slots or not in_order else order
        self._parent = router.parent if order is not None and order.beside else None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> RouterOutput:
        """Return what the router says of ``[tokens]``.

        Parameters
        ----------
        module, args, output
            As a forward hook of the router has them.

        Raises
        ------
        ModelError
            If the router returns something else than (logits, weights, indices).
        """
        if not (isinstance(output, tuple) and len(output) == 3):
            raise ModelError(
                f"The router {self._name} ({type(module).__name__}) does not return "
                "(logits, weights, indices): routers of this family are not supported."
            )
        logits, weights, indices = output
        hidden_states = args[0].reshape(-1, args[0].shape[-1])
        if indices.shape[-1] < self.slots and self._softmax:
            return softmax_output(
                logits,
                self.slots,
                self._native_k,
                rescales=self._rescales,
                dtype=weights.dtype,
                hidden_states=hidden_states,
            )
        if indices.shape[-1] < self.slots and self._obeys:
            _, weights, indices = self._asked_again(module, args)
        if self._order is not None:
            order = choice_scores(self._order, logits, self._bias(module)).gather(-1, indices)
            order = order.argsort(dim=-1, descending=True, stable=True)
            weights, indices = weights.gather(-1, order), indices.gather(-1, order)
        return RouterOutput(
            logits=logits,
            weights=weights,
            indices=indices,
            native_k=self._native_k,
            softmax=self._softmax,
            rescales=self._rescales,
            scores=self._scores,
            hidden_states=hidden_states,
        )

    def _asked_again(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Run the router once more, without its hooks, for as many experts as are needed."""
        before = module.top_k
        module.top_k = self.slots  # type: ignore[assignment]
        try:
            with torch.no_grad():
                return type(module).forward(module, *args)
        finally:
            module.top_k = before

    def _bias(self, module: nn.Module) -> Tensor | None:
        assert self._order is not None
        if self._order.bias is None:
            return None
        bias: Any = module if self._parent is None else self._parent
        for name in self._order.bias.split("."):
            bias = getattr(bias, name)
        return bias  # type: ignore[no-any-return]
