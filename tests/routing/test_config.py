"""The pattern of layers; the other parameters are tested where they are used."""

from __future__ import annotations

import pytest

from lm_eval_bh import ParameterError, RoutingConfig


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("last4", [2, 3, 4, 5]),
        ("first2", [0, 1]),
        ("0-3", [0, 1, 2, 3]),
        ("3", [3]),
        ("5+0-1+last1", [0, 1, 5]),
    ],
)
def test_patterns_name_layers(pattern, expected):
    assert RoutingConfig(layers=pattern).select_layers(6) == expected


@pytest.mark.parametrize("pattern", ["", "none", "last", "last0", "3-", "0,1", "all+x"])
def test_a_pattern_that_names_no_layers_is_refused_at_once(pattern):
    with pytest.raises(ParameterError, match="layers must be"):
        RoutingConfig(layers=pattern)


@pytest.mark.parametrize("pattern", ["6", "4-6", "last7", "first7"])
def test_a_pattern_beyond_the_model_is_refused(pattern):
    with pytest.raises(ParameterError, match="beyond the model's 6 MoE layers"):
        RoutingConfig(layers=pattern).select_layers(6)
