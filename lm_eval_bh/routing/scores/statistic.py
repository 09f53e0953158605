"""What is tested, shared out and ranked: the scores of a token's experts.

A statistic is one row of :data:`STATISTICS`. Apart from the router logit all are the log of what an
expert adds to a token: its softmax weight over all experts, times a factor that is measured once.
Absolute weights make tokens and layers comparable: what an expert adds where weights are not
rescaled is its own, whatever the token's largest weight is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistic:
    """One way to score experts.

    Attributes
    ----------
    name : str
        What ``statistic=`` takes.
    meaning : str
        What it is, in a phrase.
    factors : str
        What the null model's file calls the measured factors of its experts; empty where there are
        none.
    predicts : bool
        Whether the factor depends on the token, by its hidden state.
    weighs : bool
        Whether it is made of the softmax weight, or is the logit itself.
    """

    name: str
    meaning: str
    factors: str = ""
    predicts: bool = False
    weighs: bool = True


STATISTICS: dict[str, Statistic] = {
    row.name: row
    for row in (
        Statistic("logit", "the router logit", weighs=False),
        Statistic("weight", "log of the softmax weight over all experts"),
        Statistic("contribution", "log of the weight times the expert's mean output norm", "norms"),
        Statistic(
            "benefit",
            "log of the weight times the root mean square of loss gradient . expert's output",
            "benefits",
        ),
        Statistic(
            "predicted",
            "log of the weight times the output norm that the hidden state predicts",
            "predictor",
            predicts=True,
        ),
    )
}


def scores(router_logits: Tensor, statistic: str, log_factors: Tensor | None = None) -> Tensor:
    """Return the scores of all experts.

    Parameters
    ----------
    router_logits : Tensor
        ``[..., experts]``, any float dtype.
    statistic : str
        A name of :data:`STATISTICS`.
    log_factors : Tensor or None
        ``[experts]`` or ``[..., experts]``, what is added to each expert's log weight.

    Returns
    -------
    Tensor
        Same shape and device; the logits themselves, or else float32, or float64 where they are.
    """
    if not STATISTICS[statistic].weighs:
        return router_logits
    dtype = torch.promote_types(router_logits.dtype, torch.float32)
    log_weights = torch.log_softmax(router_logits, dim=-1, dtype=dtype)
    if log_factors is None:
        return log_weights
    return log_weights + log_factors.to(router_logits.device, dtype)
