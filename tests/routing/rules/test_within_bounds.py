"""Stepping within bounds takes as many experts as stepping and then clamping."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lm_eval_bh.routing.rules.registry import RULES
from lm_eval_bh.routing.rules.sorted_scores import SortedScores
from lm_eval_bh.routing.rules.within_bounds import WithinBounds

FEW = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])  # so that ties with the thresholds are common


@pytest.mark.parametrize("name", ["bh", "holm"])
@given(data=st.data())
def test_bounds_within_are_bounds_afterwards(name, data):
    experts = data.draw(st.integers(1, 9))
    shape = (3, experts)
    scores = data.draw(hnp.arrays(np.float32, shape, elements=FEW))
    thresholds = data.draw(hnp.arrays(np.float32, (1, experts), elements=FEW))
    max_k = data.draw(st.integers(1, experts))
    min_k = data.draw(st.integers(1, max_k))
    found = WithinBounds.of(RULES[name], thresholds, min_k, max_k)
    if found is None:
        assert (name, max_k) == ("holm", experts)  # nothing ends the steps down
        return
    count = RULES[name].count(SortedScores(np.sort(-scores)), 0.5, thresholds)
    assert found(scores).tolist() == count.clip(min_k, max_k).tolist()
