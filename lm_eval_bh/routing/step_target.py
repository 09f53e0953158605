"""How many distinct experts a step reads, as a function of the parameter of a method of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.methods.pick import Picked, pick
from lm_eval_bh.routing.methods.router import RouterOutput
from lm_eval_bh.routing.methods.steps import Steps, distinct_experts


def on_cpu(said: RouterOutput, with_hidden_states: bool) -> RouterOutput:
    """Return what a router has said, kept on the CPU; hidden states only where they are needed."""
    hidden = said.hidden_states if with_hidden_states else None
    return said._replace(
        logits=said.logits.cpu(),
        weights=said.weights.cpu(),
        indices=said.indices.cpu(),
        hidden_states=None if hidden is None else hidden.cpu(),
        step=None if said.step is None else said.step.cpu(),
    )


def joined(parts: Sequence[RouterOutput]) -> RouterOutput:
    """Return what a router has said of several passes as of one, their steps numbered on."""
    logits, weights, indices = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("logits", "weights", "indices")
    )
    hidden = [part.hidden_states for part in parts if part.hidden_states is not None]
    steps, before = [], 0
    for part in parts:
        assert part.step is not None
        steps.append(part.step + before)
        before += int(part.step.max()) + 1
    return parts[0]._replace(
        logits=logits,
        weights=weights,
        indices=indices,
        hidden_states=torch.cat(hidden) if hidden else None,
        step=torch.cat(steps),
    )


def mean_distinct(method: Method, said: RouterOutput) -> Callable[[float], float]:
    """Return the function from the parameter to the mean number of distinct experts a step."""
    assert said.step is not None
    steps = Steps(said.step, int(said.step.max()) + 1)

    def mean(alpha: float) -> float:
        found = picked(method, said, alpha).indices.unsqueeze(0)
        return float(distinct_experts(found, steps, method.num_experts)) / steps.number

    return mean


@torch.no_grad()
def picked(method: Method, said: RouterOutput, alpha: float) -> Picked:
    """Return what a method decides with another parameter."""
    level = method.level(alpha)
    assert level is not None
    method.keep("thresholds", level)
    return pick(method, said)
