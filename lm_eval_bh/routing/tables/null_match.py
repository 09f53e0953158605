"""Checks that a null model fits some routers and requirements."""

from __future__ import annotations

from lm_eval_bh.errors import NullModelError
from lm_eval_bh.routing.tables.null_header import NullHeader
from lm_eval_bh.routing.tables.null_kind import NullKind


def mismatch(own: NullHeader, wanted: NullKind) -> str | None:
    """Return in half a sentence why a null model is unsuitable, or None if it is suitable."""
    if own.statistic != wanted.statistic:
        return f"has statistic={own.statistic}, not statistic={wanted.statistic}"
    if own.of != wanted.of:
        return f"has of={own.of}, not of={wanted.of}"
    if wanted.null_scope not in (None, own.null_scope):
        return f"has null_scope={own.null_scope}, not null_scope={wanted.null_scope}"
    if wanted.trim not in (None, own.trim or 0):
        return f"was fitted with trim={own.trim or 0}, not trim={wanted.trim}"
    if wanted.null_from not in (None, own.null_from):
        return f"has null_from={own.null_from}, not null_from={wanted.null_from}"
    if missing := [name for name in wanted.tables if name not in own.tables]:
        return f"has no {', '.join(missing)}"
    return None


def check_routers(
    own: NullHeader,
    fingerprint: str | None,
    num_layers: int,
    num_experts: int | None,
    model_name: str,
    hint: str = "",
) -> None:
    """Raise a :class:`NullModelError` that names both models if the routers differ.

    Fields that are None on either side (imported tables know little) are not compared. The hint
    ends the message.
    """
    differences = [
        f"{what} {mine} there and {theirs} here"
        for what, mine, theirs in (
            ("layers:", own.num_layers, num_layers),
            ("experts:", own.num_experts, num_experts),
            (
                "router fingerprint:",
                (own.fingerprint or "")[:12] or None,
                (fingerprint or "")[:12] or None,
            ),
        )
        if mine is not None and theirs is not None and mine != theirs
    ]
    if differences:
        raise NullModelError(
            f"The null model was fitted on {own.model or 'an unnamed model'}, "
            f"which is not {model_name} ({'; '.join(differences)}); "
            f"calibrate one for {model_name}{hint}."
        )
