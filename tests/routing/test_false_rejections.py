"""Under the global null, where every rejection is false, at most alpha of the tokens have one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lm_eval_bh import NullModel
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.selection import reject

TOKENS, EXPERTS = 20_000, 64
# The rule p_value corrects nothing: each expert has its own test.
TESTS = [
    name for name, rule in METHODS.items() if rule.tests and not rule.joint and name != "p_value"
]
ALPHAS = (0.05, 0.4, 0.6)


def normals(rho: float, seed: int = 0) -> np.ndarray:
    """Return standard normal statistics [tokens, experts], with pairwise correlation rho."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((TOKENS, 1))
    return np.sqrt(rho) * shared + np.sqrt(1 - rho) * rng.standard_normal((TOKENS, EXPERTS))


def share(p_values: torch.Tensor, alpha: float, rule: str = "bh") -> float:
    return float(reject(p_values, alpha, rule).any(-1).double().mean())


def error(alpha: float) -> float:
    """Return four standard errors of a share of alpha."""
    return 4 * float(np.sqrt(alpha * (1 - alpha) / TOKENS))


@pytest.fixture(scope="module")
def independent() -> torch.Tensor:
    return torch.from_numpy(norm.sf(normals(0)))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("rule", TESTS)
def test_independent_statistics_keep_every_level(independent, rule, alpha):
    assert share(independent, alpha, rule) <= alpha + error(alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_bh_uses_its_whole_level(independent, alpha):
    assert share(independent, alpha) == pytest.approx(alpha, abs=error(alpha))


@pytest.mark.parametrize("rho", [0.3, 0.8])
@pytest.mark.parametrize("rule", sorted(set(TESTS) - {"storey"}))
def test_positive_correlation_keeps_the_level_of_all_but_storey(rule, rho):
    p_values = torch.from_numpy(norm.sf(normals(rho)))
    for alpha in ALPHAS:
        assert share(p_values, alpha, rule) <= alpha + error(alpha)


def test_positive_correlation_takes_storeys_level_away():
    assert share(torch.from_numpy(norm.sf(normals(0.8))), 0.05, "storey") > 0.15


def test_a_fitted_null_keeps_the_level_and_trim_takes_it_away():
    """The statistics that trim leaves out are null too."""
    fresh = torch.from_numpy(normals(0, seed=1))
    shares = [
        share(NullModel.fit({0: normals(0)}, trim=trim).p_values(0, fresh), 0.05)
        for trim in (0, 1, 4)
    ]
    assert shares[0] <= 0.05 + error(0.05)
    assert shares[1] > 0.2
    assert shares[2] > 0.7
