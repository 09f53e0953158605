"""Checks that a null model fits some routers and requirements."""

from __future__ import annotations

from lm_eval_bh.errors import NullModelError
from lm_eval_bh.routing.tables.null_header import NullHeader
from lm_eval_bh.routing.tables.null_kind import NullKind


def mismatch(own: NullHeader, wanted: NullKind) -> str | None:
    """Return in half a sentence why a null model is unsuitable, or None if it is suitable."""
    for name in ("statistic", "of", "null_scope", "trim", "null_from"):
        mine, theirs = getattr(own.kind, name), getattr(wanted, name)
        if theirs not in (None, mine):
            return f"has {name}={mine}, not {name}={theirs}"
    missing = [name for name in wanted.tables if name not in own.tables]
    return f"has no {', '.join(missing)}" if missing else None


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
