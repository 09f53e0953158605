"""An exported folder routes as hf-bh does, in any family, and is written whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from made_policies import random_benefits, random_null
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    MixtralConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from lm_eval_bh import BHRoutingIntegration, ModelError, ParameterError, Policy, PolicyError
from lm_eval_bh.export import model_folder
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.model_folder import check_apart, export_folder
from lm_eval_bh.resources import tiny_olmoe
from lm_eval_bh.routing.releases import returned_cache

IDS = torch.arange(5, 65).reshape(2, 30)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "olmoe": OlmoeConfig(num_experts=16, **SIZES),
    "olmoe, rescaled": OlmoeConfig(num_experts=16, norm_topk_prob=True, **SIZES),
    "mixtral": MixtralConfig(num_local_experts=16, **SIZES),
    "qwen2_moe": Qwen2MoeConfig(num_experts=16, **SIZES),
    "qwen3_moe": Qwen3MoeConfig(num_experts=16, head_dim=8, norm_topk_prob=True, **SIZES),
    "qwen3_moe, one dense": Qwen3MoeConfig(
        num_experts=16, head_dim=8, mlp_only_layers=[1], **SIZES
    ),
}


def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments)


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def export(policies, name, folder, **arguments):
    policy = Policy.load(policies[name])
    export_folder(policy, Checkpoint.find(str(tiny_olmoe())), folder, name="tiny", **arguments)
    return folder


@pytest.mark.parametrize("name", ["bh", "static", "top8", "own", "benefit"])
def test_it_gives_the_logits_of_hf_bh(policies, name, tmp_path, model):
    exported = load(export(policies, name, tmp_path / "out"), dtype=torch.float32)
    with BHRoutingIntegration(model, policy=policies[name]) as routing:
        expected = logits_of(model)
        mean = routing.get_routing_stats()["mean_experts_per_token"]
    torch.testing.assert_close(logits_of(exported), expected, rtol=0, atol=2e-5)
    if name == "top8":
        assert mean == 8
    else:
        assert (logits_of(exported) - logits_of(model)).abs().max() > 0.1, "it changes nothing"


@pytest.mark.parametrize("rule", ["static", "bh"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, rule, tmp_path):
    torch.manual_seed(3)
    original = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()
    for name, weight in original.named_parameters():
        if name.endswith("mlp.gate.weight"):  # else all logits are near zero
            weight.data.normal_()
    original.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    layers = 2 if "dense" in family else 3
    parameters = {"alpha": 0.7, "null_scope": "expert", "statistic": "contribution", "max_k": 6}
    if rule == "static":
        parameters = {"rule": "topk", "k_per_layer": "5-2-6" if layers == 3 else "5-2"}
    null = random_null(layers, 16) if rule == "bh" else "auto"
    integration = BHRoutingIntegration(original, null_model=null, **parameters)
    policy = integration.policy()
    export_folder(policy, Checkpoint.find(str(tmp_path / "in")), tmp_path / "out", name=family)
    exported = load(tmp_path / "out", dtype=torch.float32)
    with integration:
        expected = logits_of(original)
        if rule == "bh":
            assert integration.get_routing_stats()["std_experts_per_token"] > 0.5
    torch.testing.assert_close(logits_of(exported), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("phase", ["all", "decode"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rule": "oea", "k0": 1},
        {"rule": "batch_min_w", "alpha": 0.5, "statistic": "benefit", "mass": 0.2},
    ],
    ids=str,
)
def test_the_tokens_of_a_step_are_decided_together(parameters, phase, tmp_path, model):
    """32 rows, padded on the left, read whole and then decoded with a cache."""
    config = {"decode_batch": 20, "phase": phase} | parameters
    null = random_benefits(4, 64) if "statistic" in parameters else None
    routing = BHRoutingIntegration(model, null_model=null, **config)
    routing.policy().save(tmp_path / "policy.safetensors")
    checkpoint = Checkpoint.find(str(tiny_olmoe()))
    policy = Policy.load(tmp_path / "policy.safetensors")
    export_folder(policy, checkpoint, tmp_path / "exported", name="steps")
    ids = torch.randint(4, 4000, (32, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:5, :3] = 0

    def outputs(one):
        with torch.no_grad():
            read = one(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
            more = one(ids[:, -1:], attention_mask=mask, **returned_cache(read))
        return torch.cat([read.logits[mask[:, :-1].bool()], more.logits.flatten(0, 1)])

    def continuous(one):
        small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
        how = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=0, pad_token_id=1)
        found = one.generate_batch(ids[5:8].tolist(), how, small, progress_bar=False)
        return [list(row.generated_tokens) for row in found.values()]

    exported = load(tmp_path / "exported", dtype=torch.float32)
    with routing:
        ours = outputs(model)
        if phase == "decode":
            assert continuous(exported) == continuous(model)
    torch.testing.assert_close(outputs(exported), ours, rtol=1e-4, atol=1e-4)


def test_the_experts_run_as_fast_as_the_family_s(policies, tmp_path, model, monkeypatch):
    """Use transformers' own choice of implementation, not the fallback loop of remote code.

    transformers caches its finding with a class, and subclasses inherit it.
    """
    remembered = "_can_set_experts_implementation_cached_value"
    monkeypatch.delattr(OlmoeForCausalLM, remembered, raising=False)
    exported = load(export(policies, "bh", tmp_path / "out"), dtype=torch.float32)
    chosen = model.config._experts_implementation
    assert chosen != "eager"
    assert exported.config._experts_implementation == chosen
    assert exported.config._attn_implementation == model.config._attn_implementation


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_unused_slots_can_be_skipped(policies, tmp_path, implementation):
    folder = export(policies, "bh", tmp_path / "out")
    expected = logits_of(load(folder, dtype=torch.float32))
    config = json.loads((folder / "config.json").read_text())
    config["adaptive_routing"]["unused"] = "skip"
    (folder / "config.json").write_text(json.dumps(config))
    skipping = load(folder, dtype=torch.float32, experts_implementation=implementation)
    assert skipping.get_experts_implementation() == {"": implementation}
    seen = []
    gate = skipping.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    torch.testing.assert_close(logits_of(skipping), expected, rtol=0, atol=2e-5)
    assert (seen[0] == 64).any()


def test_it_generates_and_records_router_logits(policies, tmp_path, model):
    exported = load(export(policies, "bh", tmp_path / "out"), dtype=torch.float32)
    arguments = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    with BHRoutingIntegration(model, policy=policies["bh"]):
        expected = model.generate(IDS, **arguments)
    assert torch.equal(exported.generate(IDS, **arguments), expected)
    recorded = exported(IDS, output_router_logits=True).router_logits
    assert [logits.shape for logits in recorded] == [(60, 64)] * 4


def test_it_survives_bfloat16_and_saving(policies, tmp_path):
    folder = export(policies, "own", tmp_path / "out")
    low = load(folder, dtype=torch.bfloat16)
    exact = load(folder, dtype=torch.float32)
    for name, table in exact.model.layers[2].mlp.gate.selection.named_buffers():
        assert torch.equal(table, low.model.layers[2].mlp.gate.selection.get_buffer(name))
    exact.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(exact))


def test_links_and_untied_heads(policies, tmp_path):
    expected = logits_of(load(export(policies, "bh", tmp_path / "copy"), dtype=torch.float32))
    folder = export(policies, "bh", tmp_path / "link", link=True, untie=True)
    weights = tiny_olmoe() / "model.safetensors"
    assert (folder / "model-original.safetensors").resolve() == weights.resolve()
    assert not (tmp_path / "copy" / "model-original.safetensors").is_symlink()
    untied = load(folder, dtype=torch.float32)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert torch.equal(logits_of(untied), expected)


def test_nothing_is_half_written(policies, tmp_path, monkeypatch):
    folder = export(policies, "bh", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*arguments, **named):
        raise OSError("the disk is full")

    monkeypatch.setattr(model_folder, "save_file", fail)
    for name in ("out", "new"):
        with pytest.raises(OSError, match="full"):
            export(policies, "static", tmp_path / name, force=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_replaced(policies, tmp_path):
    folder = export(policies, "bh", tmp_path / "out")
    with pytest.raises(ParameterError, match="use --overwrite"):
        export(policies, "static", folder)
    export(policies, "static", folder, force=True)
    layers = json.loads((folder / "config.json").read_text())["adaptive_routing"]["layers"]
    assert {settings["method"] for settings in layers} == {"topk"}
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(ParameterError, match="something other"):
        export(policies, "static", other, force=True)
    assert (other / "chapter.txt").read_text() == "years of work"


def tree_of(folder):
    """Return every file and link below a folder with its content."""
    return {
        str(path.relative_to(folder)): (path.is_symlink(), path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# What is exported, and where to, in a folder with: ex, an export; linked, one whose weights are
# links into ex; alias, a link to ex; in, an export that holds another, and a link to one.
INTO_ITSELF = {
    "the same folder": ("ex", "ex"),
    "by another path": ("ex", "in/../ex"),
    "through a link to the output": ("ex", "alias"),
    "through a link to the source": ("alias", "ex"),
    "a folder inside": ("ex", "ex/new"),
    "a folder inside, through a link": ("ex", "alias/new"),
    "a folder that holds it": ("in/ex", "in"),
    "where its weights are linked to": ("linked", "ex"),
    "a link that lies inside": ("in", "in/out"),
}


@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize(("source", "output"), INTO_ITSELF.values(), ids=INTO_ITSELF)
def test_an_export_never_destroys_what_it_is_made_from(
    source, output, link, policies, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    export(policies, "bh", tmp_path / "ex")
    policy = Policy.load(policies["bh"])
    export_folder(
        policy, Checkpoint.find("ex"), tmp_path / "linked", name="ex", link=True, force=True
    )
    (tmp_path / "alias").symlink_to("ex")
    export(policies, "bh", tmp_path / "in")
    export(policies, "bh", tmp_path / "in" / "ex")
    (tmp_path / "in" / "out").symlink_to(tmp_path / "linked")
    before = tree_of(tmp_path)
    with pytest.raises(ParameterError, match=rf"--output-dir {output} (is or lies in|holds)"):
        export_folder(
            policy, Checkpoint.find(source), Path(output), name="ex", link=link, force=True
        )
    assert tree_of(tmp_path) == before
    load(tmp_path / "ex")


def test_an_export_never_destroys_its_policy(policies, tmp_path):
    folder = export(policies, "bh", tmp_path / "out")
    own = folder / "own.safetensors"
    own.write_bytes(policies["bh"].read_bytes())
    with pytest.raises(ParameterError, match=r"holds .*own.safetensors, which the export needs"):
        check_apart(folder, Checkpoint.find(str(tiny_olmoe())), own)


def test_models_that_do_not_serve(policies, tmp_path):
    policy = Policy.load(policies["bh"])
    another = AutoModelForCausalLM.from_config(FAMILIES["olmoe"])
    another.save_pretrained(tmp_path / "another")
    with pytest.raises(PolicyError, match="differ from those of another"):
        export_folder(
            policy, Checkpoint.find(str(tmp_path / "another")), tmp_path / "out", name="another"
        )
    config = tmp_path / "another" / "config.json"
    config.write_text(config.read_text().replace('"olmoe"', '"llama"'))
    with pytest.raises(ModelError, match="'llama' cannot be exported: give a mixture"):
        Checkpoint.find(str(tmp_path / "another"))
    assert not (tmp_path / "out").exists()


BAD_FILES = {
    "NaN": ("config.json", lambda c: json.dumps(c | {"rms_norm_eps": math.nan}), "holds NaN"),
    "infinite": ("config.json", lambda c: json.dumps(c | {"x": [math.inf]}), "holds Infinity"),
    "a list": ("config.json", lambda c: json.dumps([c]), "must be an object"),
    "nested": ("config.json", lambda c: "[" * 100_000, "could not be read"),
    "type a list": ("config.json", lambda c: json.dumps(c | {"model_type": []}), "must be text"),
    "type a number": ("config.json", lambda c: json.dumps(c | {"model_type": 3}), "must be text"),
    "tied as text": (
        "config.json",
        lambda c: json.dumps(c | {"tie_word_embeddings": "no"}),
        "must be true or false or null",
    ),
    "context as text": (
        "config.json",
        lambda c: json.dumps(c | {"max_position_embeddings": "512"}),
        "must be an integer or null",
    ),
    "index a list": ("model.safetensors.index.json", lambda c: "[]", "must be an object"),
    "index empty": ("model.safetensors.index.json", lambda c: "{}", "lacks weight_map"),
    "map a list": (
        "model.safetensors.index.json",
        lambda c: '{"weight_map": ["a"]}',
        "must be an object",
    ),
    "map of numbers": (
        "model.safetensors.index.json",
        lambda c: '{"weight_map": {"a": 1}}',
        "must be text",
    ),
    "map elsewhere": (
        "model.safetensors.index.json",
        lambda c: '{"weight_map": {"a": "../b.safetensors"}}',
        "outside its folder",
    ),
}


@pytest.mark.parametrize(("file", "content", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_damaged_files_of_a_model_are_one_sentence(file, content, said, tmp_path):
    config = json.loads((tiny_olmoe() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / file).write_text(content(config))
    if file == "config.json":
        (tmp_path / "model.safetensors").symlink_to(tiny_olmoe() / "model.safetensors")
    with pytest.raises(ModelError, match=rf"could not be read \(.*{said}|{said}"):
        Checkpoint.find(str(tmp_path))
