"""Policies for testing exports."""

from __future__ import annotations

import torch

from lm_eval_bh import NullModel

PARAMETERS = {
    "bh": {"alpha": 0.4},
    "static": {"rule": "topk", "k_per_layer": "5-3-3-5"},
    "top8": {"rule": "topk"},
    "own": {"alpha": 0.6, "null_scope": "expert", "statistic": "contribution", "mass": 0.5},
    "benefit": {"rule": "min_w", "alpha": 0.1, "statistic": "benefit", "mass": 0.2},
}


def random_benefits(layers: int, experts: int) -> NullModel:
    """Return a null model of benefits with the factors for ``min_w``."""
    draw = torch.Generator().manual_seed(6)
    return NullModel.fit(
        {layer: torch.randn(200, experts, generator=draw) for layer in range(layers)},
        statistic="benefit",
        factors=torch.rand(layers, experts, generator=draw).double().numpy() + 0.5,
    )


def random_null(layers: int, experts: int) -> NullModel:
    """Return a null model of contributions, with one distribution per expert."""
    draw = torch.Generator().manual_seed(5)
    return NullModel.fit(
        {layer: torch.randn(3000, experts, generator=draw) * 2 for layer in range(layers)},
        norms=torch.rand(layers, experts, generator=draw).double().numpy() + 0.5,
        null_scope="expert",
    )
