"""Predicts the norm of each expert's output for a token, from the token's hidden state.

One product of the router's size, where computing the experts themselves is what shall be saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 0.05  # share of an expert's mean norm that a prediction does not fall below


def log_predicted_norms(predictor: Tensor, hidden_states: Tensor) -> Tensor:
    """Return the logs of the predicted norms, float ``[tokens, experts]``.

    Parameters
    ----------
    predictor : Tensor
        float ``[hidden + 2, experts]``, a layer of
        :meth:`~lm_eval_bh.routing.scores.norm_regression.NormRegression.result`.
    hidden_states : Tensor
        float ``[tokens, hidden]``, what the router is given; computed in the predictor's dtype.
    """
    x = hidden_states.to(predictor.dtype)
    norms = torch.addmm(predictor[-2], x, predictor[:-2])
    return torch.maximum(norms, LEAST * predictor[-1]).log()
