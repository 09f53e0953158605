"""Layer budgets are optimal among all; sensitivities agree with stock transformers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.policies.document_losses import Documents
from lm_eval_bh.policies.layer_budgets import allocate, config_of, layer_sensitivities


@given(
    arrays(np.float64, (3, 4), elements=st.floats(-1, 5)),
    st.integers(3, 12),
)
def test_no_allocation_is_better(sensitivities, budget):
    found = allocate(sensitivities, budget)

    def loss(ks):
        return sum(row[k - 1] for row, k in zip(sensitivities, ks, strict=True))

    every = [ks for ks in itertools.product(range(1, 5), repeat=3) if sum(ks) == budget]
    assert sum(found) == budget
    assert loss(found) == pytest.approx(min(map(loss, every)))


@pytest.mark.parametrize("budget", [2, 13])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ParameterError, match="cannot share"):
        allocate(np.zeros((3, 4)), budget)


def test_sensitivities_are_those_of_a_model_with_fewer_experts_there(
    tiny, tokenizer, paragraphs, monkeypatch
):
    documents = Documents.of(tokenizer, paragraphs[:3])

    def loss():
        return float(documents.losses(tiny).sum() / documents.tokens.sum())

    found = layer_sensitivities(tiny, 4, 8, loss, progress=False)
    assert found.shape == (4, 8)
    assert np.array_equal(found[:, -1], np.zeros(4))
    before = loss()
    monkeypatch.setattr(tiny.model.layers[2].mlp.gate, "top_k", 3)
    assert found[2, 2] == pytest.approx(loss() - before, abs=1e-6)


def test_the_configuration_takes_them_in_the_order_of_the_layers():
    assert config_of([5, 3, 3, 5]).counts_per_layer == [5, 3, 3, 5]
