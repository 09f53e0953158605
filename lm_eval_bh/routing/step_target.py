"""The number of distinct experts per step as a function of a method's parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lm_eval_bh.errors import DataError
from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.methods.pick import pick
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.methods.steps import Steps, distinct_experts


class Ranking(NamedTuple):
    """The input of a method that decides each token independently.

    Attributes
    ----------
    scores, experts : Tensor
        float ``[tokens, candidates]``, the best first, and int64 ``[tokens, max_k]``, in the order
        of use.
    step : Tensor
        int64 ``[tokens]``, the tokens that are decoded together.
    """

    scores: Tensor
    experts: Tensor
    step: Tensor


def rankings(parts: Sequence[Ranking]) -> Ranking:
    """Join the rankings of several passes, with steps numbered consecutively."""
    scores, experts = (torch.cat([part[place] for part in parts]) for place in (0, 1))
    return Ranking(scores, experts, _numbered_on([part.step for part in parts]))


def whole_steps(batches: Sequence[Tensor], rows: int, length: int) -> list[Tensor]:
    """Return a text in batches of exactly ``rows``: smaller steps read fewer experts.

    Rows have up to ``length`` tokens, fewer if there is less text.

    Raises
    ------
    DataError
        If there are fewer tokens than rows.
    """
    ids = torch.cat([batch.flatten() for batch in batches])
    length = min(length, len(ids) // rows)
    if not length:
        raise DataError(
            f"The text has {len(ids)} tokens, too few for {rows} rows decoded "
            "together: use more text or a smaller decode_batch."
        )
    whole = len(ids) // (rows * length)
    return list(ids[: whole * rows * length].view(whole, rows, length).unbind())


def on_cpu(said: RouterOutput, with_hidden_states: bool) -> RouterOutput:
    """Return a router's output on the CPU, with hidden states only if needed."""
    hidden = said.hidden_states if with_hidden_states else None
    return said._replace(
        logits=said.logits.cpu(),
        weights=said.weights.cpu(),
        indices=said.indices.cpu(),
        hidden_states=None if hidden is None else hidden.cpu(),
        step=None if said.step is None else said.step.cpu(),
    )


def joined(parts: Sequence[RouterOutput]) -> RouterOutput:
    """Join a router's outputs of several passes, with steps numbered consecutively."""
    logits, weights, indices = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("logits", "weights", "indices")
    )
    hidden = [part.hidden_states for part in parts if part.hidden_states is not None]
    return parts[0]._replace(
        logits=logits,
        weights=weights,
        indices=indices,
        hidden_states=torch.cat(hidden) if hidden else None,
        step=_numbered_on([part.step for part in parts if part.step is not None]),
    )


def _numbered_on(steps: Sequence[Tensor]) -> Tensor:
    found, before = [], 0
    for step in steps:
        found.append(step + before)
        before += int(step.max()) + 1
    return torch.cat(found)


def mean_distinct(method: Method, heard: RouterOutput | Ranking) -> Callable[[float], float]:
    """Return the mean number of distinct experts per step as a function of the parameter."""
    assert heard.step is not None
    steps = Steps(heard.step, int(heard.step.max()) + 1)

    def mean(alpha: float) -> float:
        found = served(method, heard, alpha).unsqueeze(0)
        return float(distinct_experts(found, steps, method.num_experts)) / steps.number

    return mean


@torch.no_grad()
def served(method: Method, heard: RouterOutput | Ranking, alpha: float) -> Tensor:
    """Return the tokens' experts with another parameter, int64 ``[tokens, max_k]``.

    Unused slots hold ``num_experts``.
    """
    level = method.level(alpha)
    if isinstance(heard, Ranking):
        counts = method.count(heard.scores, level).clamp(method.min_k, method.max_k)
        used = torch.arange(heard.experts.shape[-1]) < counts.unsqueeze(-1)
        return torch.where(used, heard.experts, method.num_experts)
    if level is not None:
        method.keep("thresholds", level)
    return pick(method, heard).indices
