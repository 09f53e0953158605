"""A policy routes bit for bit like its configuration, and only the model it was made for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lm_eval_bh import (
    BHRoutingIntegration,
    NullModel,
    ParameterError,
    Policy,
    PolicyError,
    RoutingConfig,
)
from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.routing.policy import METADATA_KEY
from lm_eval_bh.routing.routers import find_routers

CONFIGS = [
    {"alpha": 0.4},
    {"rule": "holm", "alpha": 0.5, "max_k": 12, "min_k": 2},
    {"rule": "topk", "k_per_layer": "5-3-3-5"},
    {"rule": "topk", "max_k": 3, "mass": 0.5},
    {"rule": "min_w", "alpha": 0.05, "mass": 0.2},
    {"rule": "min_p", "alpha": 0.3, "layers": "last2"},
    {"rule": "bh", "target_experts": 4.0},
    {"rule": "bh", "family": "all", "alpha": 0.3},
    {"rule": "top_p", "target_experts": 3.0, "budget": "layer"},
]


@pytest.fixture
def made(tiny, null, demo_texts, tokenizer):
    def make(**options):
        config = RoutingConfig(**options)
        return BHRoutingIntegration(
            tiny,
            config,
            null_model=null if config.needs_null else "auto",
            texts=demo_texts[:4],
            tokenizer=tokenizer,
        )

    return make


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_it_routes_as_its_configuration_bit_by_bit(made, tiny, ids, options, tmp_path):
    routing = made(**options)
    with routing, torch.no_grad():
        expected = tiny(ids).logits
    routing.policy(found="by hand").save(tmp_path / "p.safetensors")
    again = BHRoutingIntegration(tiny, policy=tmp_path / "p.safetensors")
    with again, torch.no_grad():
        assert torch.equal(tiny(ids).logits, expected)
    assert again.describe() == routing.describe()
    assert again.get_routing_stats() == routing.get_routing_stats()
    loaded = Policy.load(tmp_path / "p.safetensors")
    assert loaded.provenance == {"found": "by hand"}
    assert loaded.digest() == routing.policy().digest()


def test_another_configuration_is_another_digest(made):
    digests = {made(**options).policy().digest() for options in CONFIGS}
    assert len(digests) == len(CONFIGS)


def test_a_policy_of_other_routers_is_refused(made, tiny):
    policy = made(alpha=0.4).policy()
    with torch.no_grad():
        find_routers(tiny)[1].module.weight[0, 0] += 1
    with pytest.raises(PolicyError, match="whose routers differ from those of"):
        BHRoutingIntegration(tiny, policy=policy)


def test_nothing_is_given_beside_it(made, tiny):
    policy = made(alpha=0.4).policy()
    with pytest.raises(ParameterError, match="holds all"):
        BHRoutingIntegration(tiny, policy=policy, max_k=4)


def test_hf_bh_runs_it(made, tiny_model_folder, tmp_path, ids):
    made(alpha=0.4).policy().save(tmp_path / "p.safetensors")
    arguments = f"pretrained={tiny_model_folder},device=cpu,dtype=float32"
    one = BHLM.create_from_arg_string(f"{arguments},policy={tmp_path / 'p.safetensors'}")
    other = BHLM.create_from_arg_string(f"{arguments},alpha=0.4")
    with torch.no_grad():
        assert torch.equal(one.model(ids).logits, other.model(ids).logits)
    with pytest.raises(ParameterError, match=r"alpha=0\.4 contradicts policy="):
        BHLM.create_from_arg_string(f"{arguments},alpha=0.4,policy={tmp_path / 'p.safetensors'}")


def header_of(path):
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()[METADATA_KEY])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(format_version=2),
        lambda header: header.update(format_version="1"),
        lambda header: header["config"].update(alpha=0.5),
        lambda header: header["config"].update(alpha=2.0),
        lambda header: header["config"].update(rule=["bh"]),
        lambda header: header.update(config=3),
        lambda header: header.update(null_model=None),
        lambda header: header.update(num_experts="64"),
        lambda header: header.pop("fingerprint"),
        lambda header: header.update(solved={"alphas": 3}),
        lambda header: header["null_model"].update(num_layers=3),
        lambda header: header.update(provenance=["found", "by"]),
        lambda header: header.update(provenance="by hand"),
        lambda header: header.update(model=3),
        lambda header: header.update(revision={}),
        lambda header: header.update(fingerprint=None),
    ],
)
def test_a_changed_header_is_refused(made, tmp_path, change):
    path = tmp_path / "p.safetensors"
    made(alpha=0.4).policy().save(path)
    header = header_of(path)
    change(header)
    save_file(load_file(path), path, {METADATA_KEY: json.dumps(header)})
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    assert "\n" not in str(caught.value)


def test_damaged_and_foreign_files_are_refused(made, null, tmp_path):
    path = tmp_path / "p.safetensors"
    made(alpha=0.4).policy().save(path)
    whole = path.read_bytes()
    for at in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at])
        with pytest.raises(PolicyError):
            Policy.load(path)
    for at in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(PolicyError):
            Policy.load(path)
    null.save(path)
    with pytest.raises(PolicyError, match="is not a policy"):
        Policy.load(path)
    with pytest.raises(PolicyError, match="There is no policy"):
        Policy.load(tmp_path)
    path.write_bytes(whole)
    assert isinstance(Policy.load(path).null_model, NullModel)
