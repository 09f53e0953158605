"""The state shared by all hooks of one patched model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.methods.pick import Picked
from lm_eval_bh.routing.patching.counters import RoutingCounters
from lm_eval_bh.routing.patching.experts_switch import ExpertsSwitch
from lm_eval_bh.routing.patching.routes import Routes

logger = logging.getLogger(__name__)

Observer = Callable[[int, Tensor, Picked], None]


class Patch:
    """The state shared by all hooks of one patched model.

    A copy of a patched model, or a saved one, routes alike but reports to no observer.

    Attributes
    ----------
    mode : "patch" or "analyze"
        Whether selections replace the model's own.
    observers : list of callable
        Called with every layer's selection: (layer, router logits, selection).
    counters : RoutingCounters or None
        Counters of selections.
    routes : Routes or None
        The recorded experts, if a log is replayed.
    switch : ExpertsSwitch or None
        The switch of the experts implementation.
    decode_batch : int or None
        Rows decoded together; None for all of a pass, without counting distinct experts.
    decoded_only : bool
        Whether the tokens of prompts belong to no step.
    has_steps : bool
        Whether anything needs to know which tokens are decoded together.
    alive : bool
        Whether the hooks are still in the model.
    padded, looked : bool
        Whether any pass had a mask; whether one without was examined for padding.
    """

    def __init__(
        self,
        config: RoutingConfig,
        observers: list[Observer],
        counters: RoutingCounters | None,
        routes: Routes | None = None,
    ) -> None:
        self.mode: str = config.mode
        self.decode_batch: int | None = config.decode_batch
        self.decoded_only = config.phase == "decode"
        self.has_steps = config.method.joint or config.decode_batch is not None
        self.observers = observers
        self.counters = counters
        self.routes = routes
        self.switch: ExpertsSwitch | None = None
        self.alive = True
        self.padded = False
        self.looked = False
        self._told = False
        self._alone = config.rule if config.method.joint and config.decode_batch is None else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"observers": [], "counters": None}

    @property
    def skips_unused(self) -> bool:
        """Whether the model skips unused slots, so that padding can have only those."""
        return self.switch is not None and self.switch.skips_unused

    def tell_alone(self) -> None:
        """Say once that a method of a step decodes one row, unless that is meant."""
        if self._alone is not None:
            logger.warning(
                "rule=%s decides for the rows that are decoded together, and one row is decoded: "
                "it is a batch of one, which shares its experts with no other. Give several rows "
                "at once, or decode_batch=1 if one is meant.",
                self._alone,
            )
            self._alone = None

    def tell_once(self, why: str) -> None:
        """Warn once that padding cannot be told from text."""
        if not self._told:
            self._told = True
            logger.warning(
                "In a forward pass padding cannot be told from text, so it is counted and computed "
                "like text: %s. Give the model a 2-D attention_mask, or use real_tokens().",
                why,
            )
