"""The null model that a configuration needs, found once per model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lm_eval_bh.errors import NullModelError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.patching.unpatch import refuse_patched
from lm_eval_bh.routing.routers import Router
from lm_eval_bh.routing.tables.find import is_auto, resolve_null
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint
from lm_eval_bh.routing.tables.null_match import mismatch
from lm_eval_bh.routing.tables.null_model import NullModel


class NullInForce:
    """Finds null models, and keeps the last one while a method needs none.

    Parameters
    ----------
    given : "auto", path or NullModel
        The user's choice.
    model, routers, tokenizer
        As :func:`~lm_eval_bh.routing.tables.find.resolve_null` takes them.
    """

    def __init__(
        self,
        given: str | Path | NullModel,
        model: nn.Module,
        routers: Sequence[Router],
        tokenizer: Any,
    ) -> None:
        self._given, self._model, self._routers = given, model, routers
        self._tokenizer = tokenizer
        self._known: NullModel | None = None

    def of(self, config: RoutingConfig) -> NullModel | None:
        """Return the null model of a configuration, None if it needs none."""
        if not config.needs_null:
            return None
        wanted = config.null_kind
        if is_auto(self._given):
            wanted = replace(wanted, trim=wanted.trim or 0)
        if self._known is None or mismatch(self._known.header, wanted):
            if is_auto(self._given):
                refuse_patched(self._model)  # it may be calibrated, on the unpatched model
            self._known = resolve_null(
                self._given, self._model, self._routers, self._tokenizer, wanted
            )
        return self._known


def refuse_stale(null_model: NullModel | None, routers: Sequence[Router]) -> None:
    """Raise a :class:`NullModelError` if routers have changed since their null model was found."""
    known = None if null_model is None else null_model.header.fingerprint
    if known is not None and known != router_fingerprint(r.weight for r in routers):
        raise NullModelError(
            "The routers have changed since the null model was fitted (was the model trained?): "
            "make a new BHRoutingIntegration, whose null model is calibrated on the current "
            "routers."
        )
