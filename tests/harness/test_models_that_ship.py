"""The shipped models: each loads offline by name, is small, and matches its card."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh.analysis.read.model_arguments import one_name
from lm_eval_bh.doctor.outlook import check_model
from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.resources import MODELS, model_path, shipped, tiny_glm, tiny_olmoe

NATIVE_K = 8
MEGABYTE = 10**6


def of_folder(name):
    return shipped(f"models/{name}")


def demo_windows(tokenizer, number=16, length=256):
    """Return the first windows of the demo articles, end to end."""
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text().splitlines()
    ids = tokenizer("\n".join(json.loads(line)["page"] for line in lines))["input_ids"]
    return torch.tensor(ids[: number * length]).view(number, length)


@pytest.fixture(scope="module")
def glm():
    return AutoModelForCausalLM.from_pretrained(tiny_glm(), experts_implementation="eager").eval()


@pytest.fixture(scope="module")
def loads(glm):
    """Return how many tokens of the demo articles each expert serves, [layers, experts]."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_glm())
    chosen = [[] for _ in glm.model.layers]
    hooks = [
        block.mlp.gate.register_forward_hook(lambda gate, args, out, to=to: to.append(out[2]))
        for block, to in zip(glm.model.layers, chosen, strict=True)
    ]
    with torch.no_grad():
        glm(input_ids=demo_windows(tokenizer))
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(c).flatten().bincount(minlength=64) for c in chosen])


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_bfloat16_and_the_folder_is_small(name):
    with safe_open(of_folder(name) / "model.safetensors", framework="pt") as weights:
        kinds = {key: weights.get_slice(key).get_dtype() for key in list(weights.keys())}
    biases = {key for key in kinds if key.endswith("e_score_correction_bias")}
    assert {kinds.pop(key) for key in biases} <= {"F32"}  # they decide by small differences
    assert set(kinds.values()) == {"BF16"}
    assert sum(file.stat().st_size for file in of_folder(name).iterdir()) <= 9 * MEGABYTE


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_holds_a_card_and_the_course_of_training(name):
    folder = of_folder(name)
    assert f"# {name}\n" in (folder / "README.md").read_text()
    last = json.loads((folder / "train.json").read_text())["log"][-1]
    assert last["dead_experts"] == [0] * 4
    assert f"{last['validation_loss']:.2f} nats per token" in (folder / "README.md").read_text()


def test_both_models_read_tokens_of_one_tokenizer():
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tiny_glm() / file).read_bytes() == (tiny_olmoe() / file).read_bytes()


def test_tiny_glm_is_of_the_family_of_sigmoid_routers(glm):
    config = glm.config
    assert (config.model_type, config.first_k_dense_replace, config.n_shared_experts) == (
        "glm4_moe",
        0,
        1,
    )
    assert (config.n_routed_experts, config.num_experts_per_tok) == (64, NATIVE_K)
    gate = glm.model.layers[1].mlp.gate
    hidden = torch.randn(50, config.hidden_size, generator=torch.Generator().manual_seed(0))
    logits, weights, chosen = gate(hidden)
    scores = torch.sigmoid(hidden @ gate.weight.T)
    best = (scores + gate.e_score_correction_bias).topk(NATIVE_K).indices
    assert torch.equal(chosen.sort().values, best.sort().values)
    own = scores.gather(1, chosen)  # the bias has a say in the choice, none in the weights
    torch.testing.assert_close(weights, 1.8 * own / own.sum(1, keepdim=True))
    torch.testing.assert_close(logits.sigmoid(), scores)


def test_the_correction_bias_of_tiny_glm_changes_what_is_chosen(glm):
    for block in glm.model.layers:
        assert block.mlp.gate.e_score_correction_bias.std() > 0.01


def test_no_expert_of_tiny_glm_is_dead_or_serves_much_more_than_its_share(loads):
    trained = json.loads((tiny_glm() / "train.json").read_text())["log"][-1]
    assert max(trained["largest_load_over_mean"]) < 1.3  # on WikiText-2's validation text
    share = loads / loads.float().mean(1, keepdim=True)  # the demo articles are of other text
    assert share.min() > 0.1
    assert share.max() < 3


@pytest.mark.parametrize("name", MODELS)
def test_the_native_top_8_by_name_is_the_stock_model_to_the_last_digit(evaluate, name):
    tasks = ["bh_demo_wikitext", "bh_demo_lambada", "bh_demo_hellaswag"]
    stock = evaluate("hf", f"pretrained={of_folder(name)}", tasks, limit=4)["results"]
    ours = evaluate("hf-bh", f"pretrained={name},rule=topk,max_k={NATIVE_K}", tasks, limit=4)
    assert ours["results"] == stock
    assert ours["config"]["bh"]["summary"]["mean_experts_per_token"] == NATIVE_K


def test_fewer_experts_of_tiny_glm_lose(evaluate):
    perplexities = [
        evaluate(
            "hf-bh", f"pretrained=tiny-glm,rule=topk,max_k={k}", ["bh_demo_wikitext"], limit=4
        )["results"]["bh_demo_wikitext"]["word_perplexity,none"]
        for k in (8, 4, 1)
    ]
    assert perplexities == sorted(perplexities)
    assert perplexities[2] > 1.05 * perplexities[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_name_is_found_everywhere_a_folder_is(run, name):
    assert model_path(name) == str(of_folder(name))
    assert run("doctor", "path", name)[1].strip() == str(of_folder(name))
    assert one_name(f"/elsewhere/models/{name}") == name  # runs on the folder are runs on the name
    found = {finding.subject: finding for finding in check_model(name)}
    assert found["model"].found.startswith(f"{name}: ")
    assert "4 MoE layers, 64 experts, native top-8" in found["model"].found


def test_any_other_name_is_left_as_it_is():
    assert model_path("allenai/OLMoE-1B-7B-0924") == "allenai/OLMoE-1B-7B-0924"
    assert model_path("./tiny-glm") == "./tiny-glm"


def test_tiny_glm_serves_from_python(glm):
    lm = BHLM(pretrained="tiny-glm", rule="topk", max_k=NATIVE_K, device="cpu")
    ids = demo_windows(lm.tokenizer, number=1, length=64)
    with torch.no_grad():
        torch.testing.assert_close(lm.model(input_ids=ids).logits, glm(input_ids=ids).logits)
