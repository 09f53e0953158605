"""Whether a null model serves: some routers, and what is asked of it."""

from __future__ import annotations

from lm_eval_bh.errors import NullModelError
from lm_eval_bh.routing.tables.null_header import NullHeader
from lm_eval_bh.routing.tables.null_kind import NullKind


def mismatch(own: NullHeader, wanted: NullKind) -> str | None:
    """Say in half a sentence why a null model of a header cannot serve, or None if it can."""
    if own.statistic != wanted.statistic:
        return f"is of statistic={own.statistic}, not statistic={wanted.statistic}"
    if own.of != wanted.of:
        return f"is of of={own.of}, not of={wanted.of}"
    if wanted.null_scope not in (None, own.null_scope):
        return f"is of null_scope={own.null_scope}, not null_scope={wanted.null_scope}"
    if wanted.trim not in (None, own.trim or 0):
        return f"was fitted with trim={own.trim or 0}, not trim={wanted.trim}"
    if wanted.null_from not in (None, own.null_from):
        return f"is of null_from={own.null_from}, not null_from={wanted.null_from}"
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
    """Raise a :class:`NullModelError` that names both models if the routers are others.

    What is None on either side (imported tables know little) is not compared. The hint ends the
    sentence.
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
