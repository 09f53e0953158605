"""A complete search: from a model to a confirmed policy and a report of how it was found."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.files import replacing
from lm_eval_bh.policies.cost import DISTINCT, EXPERTS
from lm_eval_bh.policies.tuning.candidates import winner
from lm_eval_bh.policies.tuning.search import Search, Tried
from lm_eval_bh.policies.tuning.subject import CONFIRMATION, Subject
from lm_eval_bh.routing.policy import Policy

PRESETS = ("search", "winner")
POLICY = "policy.safetensors"


def tune(
    subject: Subject,
    *,
    target_experts: float | None = None,
    target_distinct: float | None = None,
    max_loss: float | None = None,
    preset: str = "search",
    progress: bool = True,
) -> tuple[Policy, dict[str, Any]]:
    """Find a policy, confirm it on unseen text, and write it into the subject's folder.

    Parameters
    ----------
    subject : Subject
        The model, the texts and the folder.
    target_experts, target_distinct, max_loss : float
        Exactly one of them: the mean experts per token; the mean distinct experts per layer and
        step, if the subject's documents are groups; or the largest rise of perplexity, relative to
        the unchanged model, that the upper end of its interval may reach.
    preset : "search" or "winner"
        Whether to try all families, or to use the recipe that won on tiny-olmoe.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    (Policy, dict)
        The policy in ``policy.safetensors``, and the report as plain values.

    Raises
    ------
    ParameterError, UnreachableError
        If the target is out of range or unreachable.
    """
    if sum(goal is not None for goal in (target_experts, target_distinct, max_loss)) != 1:
        raise ParameterError("Give one goal, target_experts, target_distinct or max_loss.")
    if preset not in PRESETS:
        raise ParameterError(f"preset must be {' or '.join(PRESETS)}: found {preset!r}.")
    cost = EXPERTS if target_distinct is None else DISTINCT
    search = Search(subject, progress=progress, cost=cost)
    only = winner(cost) if preset == "winner" else None
    target = target_experts if target_distinct is None else target_distinct
    if target is not None:
        chosen = search.for_mean(target, only)
    else:
        assert max_loss is not None
        chosen = search.within_loss(max_loss, only)
    curve = search.static_curve()
    confirmation = search.confirm(chosen)
    account = {
        "model": subject.name,
        "native_top_k": subject.native,
        "layers": subject.layers,
        "target_experts": target_experts,
        "target_distinct": target_distinct,
        "decode_batch": subject.decode_batch,
        "cost": asdict(cost),
        "unit": subject.documents[CONFIRMATION].unit,
        "max_loss": max_loss,
        "preset": preset,
        "text": subject.splits.name,
        "notes": list(subject.splits.notes),
        "documents": {text: len(subject.documents[text].tokens) for text in subject.documents},
        "tokens": {text: int(subject.documents[text].tokens.sum()) for text in subject.documents},
        "static": curve,
        "screened": [_plain(tried) for tried in search.screened.values()],
        "tried": [_plain(tried) for tried in search.tried.values()],
        "winner": _plain(chosen),
        "confirmation": confirmation,
        "sensitivities": subject.journal.sensitivities,
    }
    found_by = {
        "found_by": f"lm-eval-bh tune, preset {preset}",
        "policies_tried": len(search.tried | search.screened),
        "measured_on": f"{CONFIRMATION} text of {subject.splits.name}",
        "measured": confirmation,
    }
    policy = subject.policy(chosen.family, chosen.config, **found_by)
    path = Path(subject.folder) / POLICY
    with replacing(path) as temporary:
        policy.save(temporary)
    return policy, account


def _plain(tried: Tried) -> dict[str, Any]:
    return {
        "name": tried.family.name,
        "adaptive": tried.family.adaptive,
        "config": tried.row.config,
        "solved": tried.row.solved,
        "mean_experts": tried.row.mean_experts,
        "distinct_experts": tried.row.distinct_experts,
        "failed": tried.row.failed,
        "difference": None if tried.difference is None else asdict(tried.difference),
    }
