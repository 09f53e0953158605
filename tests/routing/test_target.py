"""A target mean number of experts is met."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_eval_bh import (
    BHRoutingIntegration,
    DataError,
    NullModel,
    ParameterError,
    RoutingConfig,
    UnreachableError,
)
from lm_eval_bh.routing.heard import LENGTH, TOKENS
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.calibration import calibrate
from lm_eval_bh.routing.tables.null_kind import NullKind
from lm_eval_bh.routing.tables.texts import text_batches


@pytest.fixture
def solved(tiny, tokenizer, demo_texts, null):
    """Return a function that makes an integration, its target solved on the demo texts."""

    def make(**options) -> BHRoutingIntegration:
        options = {"kde": null, "target_experts": 5} | options
        return BHRoutingIntegration(tiny, tokenizer=tokenizer, texts=demo_texts[:4], **options)

    return make


@pytest.fixture(scope="module")
def measured(tiny_model_folder, tokenizer, demo_texts):
    """Return a null model with every table that a method reads."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    names = {name for method in METHODS.values() for name in method.measured}
    return calibrate(
        model,
        tokenizer,
        [router.module for router in find_routers(model)],
        demo_texts[:4],
        model_name="tiny-olmoe",
        revision=None,
        text_name="demo",
        tokens=512,
        length=128,
        kind=NullKind("weight", tables=tuple(sorted(names))),
        progress=False,
    )


def means(routing: BHRoutingIntegration, tokenizer, texts) -> list[float]:
    """Return the mean experts of every layer on the text it was solved on, counted again."""
    routing.reset_stats()
    batches = text_batches(tokenizer, texts[:4], tokens=TOKENS, length=LENGTH, batch=1)
    with routing, torch.no_grad():
        for batch in batches:
            routing.model(batch)
    return [routing.counters.mean(layer) for layer in routing.layers]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "analyze"},
        {"rule": "fdr_tsbh", "target_experts": 3},
        {"rule": "top_p", "target_experts": 3.5},
        {"rule": "min_p"},
        {"rule": "elbow"},
        {"rule": "adaptive_k"},
        *(
            {"rule": name, "target_experts": 3.5}
            for name, method in METHODS.items()
            if method.measured and not method.joint
        ),
        {"budget": "layer"},
        {"budget": "layer", "rule": "min_p", "layers": "1-2", "target_experts": 2.5},
    ],
    ids=str,
)
def test_the_mean_on_the_calibration_text_is_the_target(
    solved, measured, tokenizer, demo_texts, options
):
    own = {} if not METHODS[options.get("rule", "bh")].measured else {"kde": measured}
    routing = solved(**own, **options)
    target = routing.config.target_experts
    found = means(routing, tokenizer, demo_texts)
    assert sum(found) / len(found) == pytest.approx(target, rel=0.02)
    if routing.config.budget == "layer":
        assert found == pytest.approx([target] * len(found), rel=0.02)
        assert len(set(routing.alphas.values())) == len(found)
    else:
        assert len(set(routing.alphas.values())) == 1
    assert found == pytest.approx(list(routing.solution.layer_means.values()), abs=0.02)


def test_what_was_solved_is_said_in_plain_values(solved):
    routing = solved(budget="layer")
    content = json.loads(json.dumps(routing.describe()))
    assert content["target_experts"] == 5
    assert list(content["solved"]["alphas"]) == ["0", "1", "2", "3"]
    assert content["alpha"] == pytest.approx(sum(routing.alphas.values()) / 4)
    assert content["solved"]["mean_experts"] == pytest.approx(5, rel=0.02)
    assert content["solved"]["tokens"] > 1000


def test_the_model_is_left_as_it_was_and_the_statistics_start_at_zero(tiny, ids, solved):
    expected = tiny(ids).logits
    routing = solved()
    assert torch.equal(tiny(ids).logits, expected)
    assert routing.get_routing_stats()["mean_experts_per_token"] is None


@pytest.mark.parametrize(
    ("options", "where"), [({}, r"rule=bonferroni:"), ({"budget": "layer"}, "in layer 0:")]
)
def test_a_target_out_of_reach_names_what_can_be_reached(solved, options, where):
    with pytest.raises(
        UnreachableError, match=rf"{where}.* mean on the calibration text lies between 1 and \d"
    ) as caught:
        solved(rule="bonferroni", target_experts=7.9, **options)
    assert "\n" not in str(caught.value)


def test_a_target_that_only_the_rule_at_work_reaches_is_reached(solved, tokenizer, demo_texts):
    def highest(mode: str) -> float:
        routing = solved(rule="bonferroni", alpha=1 - 1e-9, mode=mode, target_experts=None)
        found = means(routing, tokenizer, demo_texts)
        return sum(found) / len(found)

    unchanged, at_work = highest("analyze"), highest("patch")
    assert at_work > 1.05 * unchanged  # experts left out below raise the logits above
    target = (unchanged + at_work) / 2
    found = means(solved(rule="bonferroni", target_experts=target), tokenizer, demo_texts)
    assert sum(found) / len(found) == pytest.approx(target, rel=0.02)
    with pytest.raises(UnreachableError):
        solved(rule="bonferroni", target_experts=target, mode="analyze")


def test_after_a_target_that_failed_the_old_configuration_is_in_force(tiny, ids, solved):
    routing = solved()
    with routing, torch.no_grad():
        expected = tiny(ids).logits
        with pytest.raises(ParameterError):
            routing.configure(RoutingConfig(rule="bonferroni", target_experts=7.9))
        assert torch.equal(tiny(ids).logits, expected)
        routing.configure(RoutingConfig(alpha=0.4))
        assert set(routing.alphas.values()) == {0.4}
        assert "solved" not in routing.describe()


def test_the_null_model_follows_the_configuration(tiny, null, tokenizer, demo_texts):
    routing = BHRoutingIntegration(tiny, kde=null)
    routing.configure(RoutingConfig(rule="top_p"))
    assert routing.null_model is None
    routing.configure(RoutingConfig())
    assert isinstance(routing.null_model, NullModel)


def test_without_text_to_solve_on_the_error_says_what_to_give(tiny, null, tokenizer, monkeypatch):
    import datasets

    def offline(*_args, **_options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="give alpha in place of target_experts") as caught:
        BHRoutingIntegration(tiny, kde=null, tokenizer=tokenizer, target_experts=5)
    assert "\n" not in str(caught.value)
