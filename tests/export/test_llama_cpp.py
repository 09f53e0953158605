"""llama.cpp gets the options that it supports; everything else is refused with a reason."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from lm_eval_bh import Policy, PolicyError, RoutingConfig
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.llama_cpp import llama_cpp_options
from lm_eval_bh.resources import tiny_olmoe
from lm_eval_bh.routing.solution import Solution

OLMOE = Checkpoint.find(str(tiny_olmoe()))
COUNT = "--override-kv olmoe.expert_used_count=int:{}"


def options(solution=None, checkpoint=OLMOE, **parameters):
    policy = Policy(RoutingConfig.named(parameters), "f" * 64, 4, 64, 8, solution=solution)
    return llama_cpp_options(policy, checkpoint)


@pytest.mark.parametrize(
    ("parameters", "k"),
    [
        ({"rule": "topk", "max_k": 5}, 5),
        ({"rule": "topk", "k_per_layer": "3-3-3-3"}, 3),
        ({"rule": "min_p", "alpha": 0.2, "min_k": 4, "max_k": 4}, 4),
    ],
)
def test_one_number_of_experts(parameters, k):
    assert options(**parameters) == [COUNT.format(k)]


def test_a_number_for_each_layer_is_metadata():
    line, caution = options(rule="topk", k_per_layer="5-3-3-5")
    assert line == "olmoe.expert_used_count = [5, 3, 3, 5]"
    assert "--override-kv cannot write" in caution


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("xllamacpp") and find_spec("gguf")),
    reason="needs the packages gguf and xllamacpp: see scripts/verify_llama_cpp.py",
)
def test_it_scores_as_hf_bh(monkeypatch, capfd):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import verify_llama_cpp

    assert verify_llama_cpp.main() == 0, capfd.readouterr().out


def test_min_p():
    line, equal, caution = options(rule="min_p", alpha=0.35, min_k=2, max_k=6)
    assert line == COUNT.format(6) + " -ser 2,0.35"
    assert "a token's first 2 experts serve, and further ones, up to 6," in equal
    assert "read -ser but ignore it" in caution
    alphas = {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}
    solution = Solution(4.0, "model", alphas, 4.1, {}, 100, "a text")
    line, *_ = options(solution, rule="min_p", target_experts=4, max_k=8)
    assert line == COUNT.format(8) + " -ser 1,0.25"


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"rule": "topk", "max_k": 4, "layers": "last2"}, "hold for all layers"),
        ({"rule": "topk", "max_k": 4, "mode": "analyze"}, "hold for all layers"),
        ({"rule": "topk", "max_k": 4, "renormalize": True}, "neither weight rescaling"),
        ({"rule": "min_p", "mass": 0.5}, "neither weight rescaling"),
        ({"rule": "topk", "temperature": 2.0}, "neither weight rescaling"),
        ({"rule": "min_w", "alpha": 0.1}, "nothing like rule=min_w"),
        ({"rule": "top_p"}, "nothing like rule=top_p"),
        ({"rule": "random_k"}, "nothing like rule=random_k"),
    ],
)
def test_what_it_cannot_do(parameters, reason):
    with pytest.raises(PolicyError, match=reason):
        options(**parameters)


def test_one_threshold_for_all_layers():
    alphas = {0: 0.2, 1: 0.25, 2: 0.25, 3: 0.25}
    solution = Solution(4.0, "layer", alphas, 4.1, {}, 100, "a text")
    with pytest.raises(PolicyError, match=r"one threshold.*rule=topk,max_k=4"):
        options(solution, rule="min_p", target_experts=4, budget="layer")


def test_other_models(tmp_path):
    mixtral = dataclasses.replace(OLMOE, config=OLMOE.config | {"model_type": "mixtral"})
    for file in OLMOE.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    rescaling = json.dumps(OLMOE.config | {"norm_topk_prob": True})
    (tmp_path / "config.json").write_text(rescaling, encoding="utf-8")
    for checkpoint in (mixtral, Checkpoint.find(str(tmp_path))):
        with pytest.raises(PolicyError, match="are not known to route there"):
            options(checkpoint=checkpoint, rule="topk", max_k=4)
