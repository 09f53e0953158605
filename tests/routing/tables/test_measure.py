"""Every table equals a slow plain measurement, on tiny-olmoe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lm_eval_bh import DataError
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables import similarities
from lm_eval_bh.routing.tables.measure import measure
from lm_eval_bh.routing.tables.measurement import TABLES

ON_TEXT = ("ratios", "slot_weights", "isolated", "layer_kl", "folds", "similarities")
OF_WEIGHTS = ("perturbations", "spectra", "responses")
LAYER = 1


@pytest.fixture
def tables(tiny, ids):
    """Return a function that measures tables on one batch."""

    def made(*names, batches=(ids,)):
        modules = [router.module for router in find_routers(tiny)]
        return measure(names, tiny, modules, batches, progress=False)

    return made


def log_probabilities(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits[:, :-1].double(), -1)


def expert_output(experts, expert, x):
    gate, up = F.linear(x, experts.gate_up_proj[expert]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, experts.down_proj[expert]).detach()


def test_all_that_is_asked_comes_from_one_pass(tiny, tables):
    passes = []
    handle = tiny.model.register_forward_hook(lambda *what: passes.append(1))
    found = tables("norms", "ratios", "slot_weights")
    handle.remove()
    assert len(passes) == 1
    assert found.keys() == {"norms", "ratios", "slot_weights"}
    assert found["norms"].shape == (4, 64)
    assert found["ratios"].shape == found["slot_weights"].shape == (4, 1025)


def test_quantiles_of_weights_and_of_their_ratios(tiny, ids, tables):
    seen = []
    router = tiny.model.layers[LAYER].mlp.gate
    handle = router.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    found = tables("ratios", "slot_weights")
    handle.remove()
    weights = np.sort(torch.softmax(seen[0].double(), -1).numpy())[:, ::-1][:, :8]
    shares = np.linspace(0, 1, 1025)
    np.testing.assert_allclose(
        found["slot_weights"][LAYER], np.quantile(np.log(weights), shares), rtol=1e-5
    )
    ratios = weights[:, 1:] / weights[:, :1]
    np.testing.assert_allclose(found["ratios"][LAYER], np.quantile(ratios, shares), rtol=1e-5)


def test_isolated_losses_are_those_of_the_model_with_another_top_k_in_one_layer(tiny, ids, tables):
    found = tables("isolated")["isolated"]
    assert found.shape == (4, 8)
    np.testing.assert_allclose(found[:, -1], 0, atol=1e-7)

    def loss():
        return -log_probabilities(tiny, ids).gather(-1, ids[:, 1:, None]).mean()

    native = loss()
    for k in (1, 3):
        tiny.model.layers[LAYER].mlp.gate.top_k = k
        assert found[LAYER, k - 1] == pytest.approx(float(loss() - native), abs=2e-6)


def test_layer_divergences_are_those_from_the_model_without_its_experts(tiny, ids, tables):
    found = tables("layer_kl")["layer_kl"]
    native = log_probabilities(tiny, ids)
    handle = tiny.model.layers[LAYER].mlp.register_forward_hook(
        lambda module, args, output: torch.zeros_like(output)
    )
    without = log_probabilities(tiny, ids)
    handle.remove()
    expected = (native.exp() * (native - without)).sum(-1).mean()
    assert found[LAYER] == pytest.approx(float(expected), rel=1e-5)
    assert (found > 0).all()


def test_perturbations_are_what_the_layer_gives_on_random_hidden_states(tiny, tables):
    found = tables("perturbations")["perturbations"]
    block = tiny.model.layers[LAYER].mlp
    x = torch.randn(1, 1024, 128, generator=torch.Generator().manual_seed(0))
    outputs = []
    with torch.no_grad():
        for k in range(1, 9):
            block.gate.top_k = k
            outputs.append(block(x))
    expected = [float((each - outputs[-1]).norm()) for each in outputs]
    np.testing.assert_allclose(found[LAYER], expected, rtol=1e-4, atol=1e-6)


def test_spectra_are_norms_of_projections_along_both_paths(tiny, tables):
    layer, expert = tiny.model.layers[LAYER], 5
    scale = layer.post_attention_layernorm.weight.detach().double().numpy()
    experts = layer.mlp.experts
    gate, up = np.split(experts.gate_up_proj[expert].detach().double().numpy() * scale, 2)
    norms = [np.linalg.svd(m)[1][0] for m in (gate, up, experts.down_proj[expert].detach().numpy())]
    expected = np.sqrt((norms[1] * norms[0]) * (norms[0] * norms[2]))
    assert tables("spectra")["spectra"][LAYER, expert] == pytest.approx(expected, rel=1e-5)


def test_responses_are_norms_of_outputs_at_the_routers_own_directions(tiny, tables):
    block, expert = tiny.model.layers[LAYER].mlp, 5
    weight = block.gate.weight.detach()
    direction = weight[expert] - weight.mean(0)
    direction = direction / direction.square().mean().sqrt()
    expected = expert_output(block.experts, expert, direction[None]).norm()
    found = tables("responses")["responses"]
    assert found.shape == (4, 64)
    assert found[LAYER, expert] == pytest.approx(float(expected), rel=1e-5)


def test_folds_are_the_least_squares_of_one_experts_outputs_by_anothers(tiny, ids, tables):
    block, seen = tiny.model.layers[LAYER].mlp, []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    scalars, errors = tables("folds")["folds"][LAYER]
    handle.remove()
    x = seen[0].flatten(0, -2)
    with torch.no_grad():
        _, weights, chosen = block.gate(x)
    together = (chosen.unsqueeze(-1) == chosen[:, :1].mode(0).values).any(-1).any(-1)
    first, second = chosen[together][0, :2].tolist()
    both = (chosen == first).any(-1) & (chosen == second).any(-1)
    weight = weights[both][chosen[both] == first][:, None].double()
    source, target = (weight * expert_output(block.experts, e, x[both]) for e in (first, second))
    found = np.linalg.lstsq(target.reshape(-1, 1).numpy(), source.flatten().numpy(), rcond=None)
    assert scalars[first, second] == pytest.approx(found[0][0], rel=1e-4)
    residual = found[1][0] / float(source.square().sum())
    assert errors[first, second] == pytest.approx(residual, rel=1e-4)
    apart = [e for e in range(64) if not ((chosen == first).any(-1) & (chosen == e).any(-1)).any()]
    assert (scalars[first, apart] == 0).all()
    assert (errors[first, apart] == 2).all()


def test_similarities_are_one_less_the_distances_of_all_outputs_over_the_largest(
    tiny, ids, tables, monkeypatch
):
    block, seen = tiny.model.layers[LAYER].mlp, []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    monkeypatch.setattr(similarities, "CHUNK", 7)
    monkeypatch.setattr(similarities, "TOKENS", len(ids.flatten()) + 5)  # of the second batch 5
    found = tables("similarities", batches=(ids, ids.flip(-1)))["similarities"][LAYER]
    handle.remove()
    x = torch.cat([seen[0].flatten(0, -2), seen[1].flatten(0, -2)[:5]])
    outputs = np.stack([expert_output(block.experts, e, x).double().numpy() for e in range(64)])
    distances = np.array([[np.linalg.norm(one - other) for one in outputs] for other in outputs])
    np.testing.assert_allclose(found, 1 - distances / distances.max(), atol=1e-6)
    assert found.min() == 0
    np.testing.assert_array_equal(found.diagonal(), 1)


@pytest.mark.parametrize("name", [*ON_TEXT, *OF_WEIGHTS])
def test_the_model_is_left_as_it_was(tiny, ids, tables, name):
    assert name in TABLES
    with torch.no_grad():
        expected = tiny(ids).logits
        tables(name)
        assert torch.equal(tiny(ids).logits, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())


def test_windows_of_one_token_are_no_text(tables):
    with pytest.raises(DataError, match="windows of two or more tokens"):
        tables("isolated", batches=[torch.tensor([[5]])])
