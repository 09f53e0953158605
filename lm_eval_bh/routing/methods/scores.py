"""The scores of a token's experts, which are tested, compared and ranked.

Apart from the router logit, every score is the log of an expert's contribution to a token: its
router weight times a factor that is measured once. Absolute weights make tokens and layers
comparable, regardless of the token's largest weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .router import RouterOutput

OF = ("auto", "own", "score")  # which weight a statistic starts from
LEAST = 0.05  # lower bound of a predicted norm, as a share of the expert's mean norm


@dataclass(frozen=True)
class Statistic:
    """One way to score experts.

    Attributes
    ----------
    name : str
        Value of ``statistic=``.
    meaning : str
        Description, as a phrase.
    table : str
        The calibrated table; empty if there is none.
    predicts : bool
        Whether the factor is predicted from the token's hidden state.
    weighs : bool
        Whether it uses the expert's weight; False for the router logit.
    """

    name: str
    meaning: str
    table: str = ""
    predicts: bool = False
    weighs: bool = True


STATISTICS: dict[str, Statistic] = {
    row.name: row
    for row in (
        Statistic("logit", "the router logit", weighs=False),
        Statistic("weight", "log of the expert's weight"),
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

# From logits to the log of the score that determines weights.
RAW: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.log_softmax(logits, dim=-1),
    "sigmoid": F.logsigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).log() / 2,
}


def log_weights(router: RouterOutput, of: str = "auto") -> Tensor:
    """Return the log of each expert's weight, float32 or better ``[tokens, experts]``.

    Parameters
    ----------
    router : RouterOutput
        Router output.
    of : "own", "score" or "auto"
        ``own`` is the weight that the router itself returns, in the scale of its native top-k;
        -inf where it returns none. ``score`` is the weight before any bias and rescaling: the
        softmax over all experts, or the sigmoid. ``auto`` takes the score of a softmax router and
        the own weight of any other.
    """
    logits = router.logits.to(torch.promote_types(router.logits.dtype, torch.float32))
    if of == "score" or (of == "auto" and router.softmax):
        return RAW[router.scores](logits)
    if router.softmax:
        weights = torch.log_softmax(logits, dim=-1)
        if router.rescales:
            native = weights.gather(-1, router.indices[:, : router.native_k])
            weights = weights - native.logsumexp(-1, keepdim=True)
        return weights
    own = router.native_weights.to(logits.dtype).log()
    return torch.full_like(logits, -torch.inf).scatter(-1, router.indices, own)


def log_predicted_norms(predictor: Tensor, hidden_states: Tensor) -> Tensor:
    """Return the logs of output norms predicted from hidden states, float ``[tokens, experts]``.

    Parameters
    ----------
    predictor : Tensor
        float ``[hidden + 2, experts]``: the coefficients of the hidden state, the intercept, and
        the mean norm of each expert.
    hidden_states : Tensor
        float ``[tokens, hidden]``, the router's input; computed in the predictor's dtype.
    """
    norms = torch.addmm(predictor[-2], hidden_states.to(predictor.dtype), predictor[:-2])
    return torch.maximum(norms, LEAST * predictor[-1]).log()
