"""Divergences and first choices equal a plain recomputation, document by document."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lm_eval_bh import BHRoutingIntegration, RoutingConfig
from lm_eval_bh.policies.document_losses import Documents
from lm_eval_bh.policies.fidelity import Fidelity, OwnOutputs


@pytest.fixture
def documents(tokenizer, splits):
    return Documents.of(tokenizer, splits.confirmation[:3], length=24, batch=5, most_tokens=120)


def plainly(model, documents, routing):
    """Recompute, one window at a time, in float64, with no batch and no padding."""
    sums = np.zeros((3, len(documents.tokens)))
    for batch in documents.batches:
        for document, ids in batch:
            inputs, targets = torch.tensor([ids[:-1]]), torch.tensor(ids[1:])
            with torch.inference_mode():
                own = torch.softmax(model(input_ids=inputs).logits[0].double(), -1)
                with routing:
                    routed = torch.softmax(model(input_ids=inputs).logits[0].double(), -1)
            for p, q, target in zip(own, routed, targets, strict=True):
                sums[0, document] -= float(q[target].log())
                sums[1, document] += float((p * (p.log() - q.log())).sum())
                sums[2, document] += int(p.argmax()) != int(q.argmax())
    return sums


def test_they_equal_a_plain_recomputation(tiny, documents):
    routing = BHRoutingIntegration(tiny, RoutingConfig(rule="topk", max_k=2))
    found = OwnOutputs(tiny, documents).outcome(routing)
    losses, divergences, changed = plainly(tiny, documents, routing)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(found.divergences, divergences, rtol=1e-4)
    np.testing.assert_array_equal(found.changed, changed)
    assert found.changed.sum() > 5
    with routing:
        np.testing.assert_allclose(found.losses, documents.losses(tiny), rtol=1e-6)


def test_memory_changes_nothing(tiny, documents):
    routing = BHRoutingIntegration(tiny, RoutingConfig(rule="topk", max_k=2))
    whole, parts = OwnOutputs(tiny, documents), OwnOutputs(tiny, documents, most_bytes=1)
    assert len(list(parts.groups())) == len(documents.batches) > 1
    for own in (whole, parts, whole):
        found = own.outcome(routing)
        np.testing.assert_array_equal(found.divergences, whole.outcome(routing).divergences)
    assert len(list(whole.groups())) == 1


def test_the_model_as_it_is_is_itself(tiny, documents):
    found = OwnOutputs(tiny, documents).outcome(
        BHRoutingIntegration(tiny, RoutingConfig(rule="topk", max_k=8))
    )
    assert not found.divergences.any()
    assert not found.changed.any()


def test_the_worst_tenth_is_of_documents():
    tokens = np.full(20, 10.0)
    divergences = np.array([100.0, 50.0, *[1.0] * 18])
    found = Fidelity.of(divergences, np.arange(20.0), tokens)
    assert found.kl == pytest.approx(168 / 200)
    assert found.worst == pytest.approx(150 / 20)
    assert found.changed == pytest.approx(190 / 200)
