"""The hook of one router: what the router has selected goes in, what the rule selects comes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import ModelError
from lm_eval_bh.routing.patching.forward_pass import current_pass
from lm_eval_bh.routing.patching.patch import Patch
from lm_eval_bh.routing.probe import choice_scores
from lm_eval_bh.routing.routers import Router
from lm_eval_bh.routing.scores.statistic import STATISTICS
from lm_eval_bh.routing.selection import Selection, select
from lm_eval_bh.routing.selector import Selector


class RouterHook:
    """A forward hook of one router: replaces what the router selected, or only watches it.

    It runs after the router, so whatever the router computes stays the router's own business.
    """

    def __init__(self, patch: Patch, layer: int, router: Router, selector: Selector) -> None:
        self.patch = patch
        self.layer = layer
        self.selector = selector
        self._native_k = router.top_k
        self._predicts = STATISTICS[selector.config.statistic].predicts
        self._name = router.name
        self._softmax, self._normalizes = router.softmax, router.normalizes
        order = router.order
        self._order = None if order is None or order.in_slots else order
        self._parent = router.parent if order is not None and order.beside else None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the router's output with the selection in it, or None to leave it as it is."""
        if not (isinstance(output, tuple) and len(output) == 3):
            raise ModelError(
                f"The router {self._name} ({type(module).__name__}) does not return "
                "(logits, weights, indices): routers of this family are not supported."
            )
        router_logits = output[0]
        analyze = self.patch.mode == "analyze"
        if analyze and torch.is_grad_enabled():
            # What only counts leaves no trace in the graph, nor in what checkpointing recomputes.
            with torch.no_grad():
                selection = self._select(module, args, output)
        else:
            selection = self._select(module, args, output)
        now = current_pass(self.patch)
        if not now.recomputed:
            now.note(self.layer, router_logits, selection)
            for observe in self.patch.observers:
                observe(self.layer, router_logits, selection)
            if now.alone:  # a layer that is called by itself: nothing else will end its pass
                now.end()
        if analyze:
            return None
        selected = selection.indices
        if now.real is not None and self.patch.skips_unused:
            padding = now.padding(len(selected), selected.device)
            if padding is not None:
                selected = selected.masked_fill(padding, self.selector.num_experts)
        return router_logits, selection.weights, selected

    def _select(self, module: nn.Module, args: Any, output: Any) -> Selection:
        router_logits, weights, indices = output
        return select(
            router_logits,
            self.selector,
            (weights, indices),
            softmax=self._softmax,
            normalizes=self._normalizes,
            hidden_states=args[0].flatten(0, -2) if self._predicts else None,
            native_k=self._native_k,
            rank=None if self._order is None else lambda logits: self._rank(module, logits),
        )

    def _rank(self, module: nn.Module, router_logits: Tensor) -> Tensor:
        assert self._order is not None
        bias: Any = None
        if self._order.bias is not None:
            bias = module if self._parent is None else self._parent
            for name in self._order.bias.split("."):
                bias = getattr(bias, name)
        return choice_scores(self._order, router_logits, bias)
