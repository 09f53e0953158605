"""Families in vLLM's own code, swapped from policy to policy in one engine of each."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from made_policies import PARAMETERS, random_benefits
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lm_eval_bh import BHRoutingIntegration, NullModel, Policy, PolicyError
from lm_eval_bh.export import verification
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.verification import TOLERANCE
from lm_eval_bh.export.vllm_folder import write_for_vllm
from lm_eval_bh.resources import MODELS, model_path
from lm_eval_bh.routing.releases import returned_cache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of vLLM's
    pytest.mark.skipif(
        find_spec("vllm") is None,
        reason="needs vLLM, which is not installed: scripts/verify_vllm.sh makes an environment",
    ),
]

EXPERTS, NATIVE, LAYERS = 16, 4, 2
# What vLLM's kernels for a CPU want: heads of 32, experts of multiples of 32.
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": NATIVE,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
SHARED = {"n_shared_experts": 1, "first_k_dense_replace": 0, "norm_topk_prob": True}
LATENT = {  # the one size that vLLM's latent attention on a CPU has, and positions as DeepSeek has
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "head_dim": 64,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
FAMILIES = {
    "olmoe": {},
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen3_moe": {"norm_topk_prob": True, "decoder_sparse_step": 1},
    # The first layer has no experts, so that the policy's first layer is the second one.
    "glm4_moe": SHARED
    | {"first_k_dense_replace": 1, "num_hidden_layers": LAYERS + 1, "n_group": 1}
    | {"topk_group": 1, "routed_scaling_factor": 1.5, "head_dim": 32},
    "deepseek_v3": LATENT | SHARED | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek_v2": LATENT
    | {"n_shared_experts": 1, "first_k_dense_replace": 0, "topk_method": "group_limited_greedy"},
    "gpt_oss": {
        "sliding_window": 64,
        "layer_types": ["full_attention"] * LAYERS,
    },
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
NAMED = [*FAMILIES, "tiny-glm"]
DECIDED = ("benefit", "bh", "static", "top2")


def made(family, folder):
    """Write a random model with distinct router logits, and biases that reorder them."""
    if family in MODELS:
        write_for_vllm(Checkpoint.find(model_path(family)), folder)
        return folder
    known = CONFIG_MAPPING[family]()
    values = {name: value for name, value in SIZES.items() if hasattr(known, name)}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(values | FAMILIES[family])))
    draw = torch.Generator().manual_seed(4)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.shape == (EXPERTS, 64) and ("gate" in name or "router" in name):
            torch.nn.init.normal_(tensor, std=0.5, generator=draw)
        elif name.endswith("bias") and tensor.shape == (EXPERTS,):
            torch.nn.init.normal_(tensor, std=0.2, generator=draw)
        elif tensor.ndim > 1 and tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.1, generator=draw)
    model.save_pretrained(folder)
    return folder


def policies_of(folder):
    """Return the file of each policy, beside the model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    routing = BHRoutingIntegration(model, rule="topk", max_k=1)
    layers, experts = len(routing.routers), routing.num_experts
    draw = torch.Generator().manual_seed(7)
    logits = {n: torch.randn(500, experts, generator=draw) * 2 for n in range(layers)}
    native = routing.routers[0].top_k
    static = "-".join(str(1 + (n * 2 + 1) % native) for n in range(layers))
    found = {}
    for name, parameters, null in (
        (
            "benefit",
            PARAMETERS["benefit"] | {"alpha": 0.15, "max_k": native + 2},
            random_benefits(layers, experts),
        ),
        ("bh", {"alpha": 0.5, "max_k": native}, NullModel.fit(logits)),
        ("static", {"rule": "topk", "k_per_layer": static}, "auto"),
        ("top2", {"rule": "topk", "max_k": 2}, "auto"),
    ):
        found[name] = BHRoutingIntegration(model, null_model=null, **parameters).policy()
    return found


@pytest.fixture(scope="module")
def vllm():
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    return pytest.importorskip("vllm")


def started(vllm, folder, **options):
    """Return an engine in this process."""
    return vllm.LLM(
        model=str(folder),
        dtype="float32",
        max_model_len=80,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
        **options,
    )


def closed(engine):
    """Make room for the next engine."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    del engine
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("family", NAMED)
def test_every_policy_scores_as_hf_bh(family, vllm, tmp_path, monkeypatch):
    """The first is given at start, and the others replace it in the running engine."""
    folder = made(family, tmp_path / "model")
    policies = policies_of(folder)
    draw = torch.Generator().manual_seed(8)
    documents = [torch.randint(3, 100, (n,), generator=draw).tolist() for n in (60, 33, 5)]
    for name, policy in policies.items():
        policy.save(tmp_path / f"{name}.safetensors")
    monkeypatch.setenv("LM_EVAL_BH_POLICY", str(tmp_path / "benefit.safetensors"))
    engine = started(vllm, folder)
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    apart, experts = {}, {}
    for name in DECIDED:
        policy = Policy.load(tmp_path / f"{name}.safetensors")
        if name != "benefit":
            engine.apply_model(lambda model, policy=policy: model.decide_by(policy))
        prompts = [{"prompt_token_ids": ids} for ids in documents]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        expected = verification.reference(policy, folder, documents)
        found = [
            [at[token].logprob for token, at in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
            for ids, out in zip(documents, outputs, strict=True)
        ]
        apart[name] = max(
            abs(a - b)
            for ours, theirs in zip(expected["log_probs"], found, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        )
        experts[name] = {n for counts in expected["counts"] for n in counts}
    print(family, {name: f"{distance:.1e}" for name, distance in apart.items()}, experts)
    closed(engine)
    assert min(len(experts["benefit"]), len(experts["bh"])) > 1, "the case would prove nothing"
    assert max(apart.values()) < TOLERANCE, apart


@pytest.mark.parametrize(
    "parameters",
    [
        {"rule": "oea", "k0": 1, "max_k": NATIVE},
        {"rule": "batch_min_w", "alpha": 0.4, "max_k": NATIVE, "mass": 0.2},
    ],
    ids=str,
)
def test_tokens_that_are_decoded_together_are_one_step(parameters, vllm, tmp_path, monkeypatch):
    """32 prompts are read, with the model's own top-k, and then decoded side by side."""
    folder, rows, steps = made("olmoe", tmp_path / "model"), 32, 6
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    routing = BHRoutingIntegration(model, decode_batch=rows, phase="decode", **parameters)
    routing.policy().save(tmp_path / "policy.safetensors")
    monkeypatch.setenv("LM_EVAL_BH_POLICY", str(tmp_path / "policy.safetensors"))
    engine = started(vllm, folder, max_num_seqs=rows)
    ids = torch.randint(3, 100, (rows, 10), generator=torch.Generator().manual_seed(9))
    sampling = vllm.SamplingParams(
        max_tokens=steps, temperature=0, logprobs=0, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    outputs = [out.outputs[0] for out in engine.generate(prompts, sampling, use_tqdm=False)]
    tokens = torch.tensor([list(out.token_ids) for out in outputs])
    found = torch.tensor(
        [
            [at[token].logprob for token, at in zip(out.token_ids, out.logprobs, strict=True)]
            for out in outputs
        ]
    )
    closed(engine)
    expected, cache, fed = [], {}, ids
    with routing, torch.no_grad():
        for step in range(steps):
            out = model(fed, **cache, use_cache=True)
            cache, fed = returned_cache(out), tokens[:, step : step + 1]
            expected.append(out.logits[:, -1].log_softmax(-1).gather(-1, fed))
        distinct = routing.get_routing_stats()["distinct_experts"]
    apart = (found - torch.cat(expected, 1)).abs()
    print(parameters, f"{apart.max():.1e}", f"{distinct:.1f} distinct experts")
    assert NATIVE < distinct < EXPERTS, "the case would prove nothing"
    assert apart.max() < TOLERANCE


def test_a_policy_of_another_model_is_refused_before_weights_load(vllm, tmp_path, monkeypatch):
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    def load(*arguments):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(DefaultModelLoader, "load_weights", load)
    folder = made("olmoe", tmp_path / "model")
    policy = policies_of(folder)["static"]
    dataclasses.replace(policy, fingerprint="0" * 64).save(tmp_path / "other.safetensors")
    monkeypatch.setenv("LM_EVAL_BH_POLICY", str(tmp_path / "other.safetensors"))
    with pytest.raises(PolicyError, match="whose routers differ from those of"):
        vllm.LLM(model=str(folder), dtype="float32", max_model_len=80, skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("options", "joint", "doubts"),
    [
        ({"tensor_parallel_size": 2}, False, ["tensor_parallel_size=2"]),
        (
            {"enable_expert_parallel": True, "tensor_parallel_size": 2},
            False,
            ["tensor_parallel_size=2", "expert parallelism"],
        ),
        ({"quantization": "fp8"}, False, ["quantization=fp8"]),
        ({"speculative_config": NGRAM}, True, ["a method of a step and speculative decoding"]),
        ({"speculative_config": NGRAM}, False, []),
        ({}, True, []),
    ],
    ids=str,
)
def test_what_no_policy_was_compared_under(options, joint, doubts, vllm, tmp_path, monkeypatch):
    """Configurations as vLLM makes them; a model that is built asks the same."""
    from vllm.engine.arg_utils import EngineArgs

    from lm_eval_bh.export.vllm_limits import check_engine

    folder = made("olmoe", tmp_path / "model")
    arguments = EngineArgs(model=str(folder), skip_tokenizer_init=True, max_model_len=80, **options)
    config = arguments.create_engine_config()
    monkeypatch.setenv("LM_EVAL_BH_FORCE", "1")
    assert check_engine(vllm.__version__, config, joint=joint) == doubts
    monkeypatch.delenv("LM_EVAL_BH_FORCE")
    if doubts:
        with pytest.raises(PolicyError, match=f"No policy was compared with .* {doubts[0]}: chan"):
            check_engine(vllm.__version__, config, joint=joint)


def test_another_release_is_refused_before_its_modules_are_imported(vllm, tmp_path, monkeypatch):
    folder = made("olmoe", tmp_path / "model")
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    monkeypatch.setenv("LM_EVAL_BH_POLICY", str(tmp_path / "any.safetensors"))
    monkeypatch.setitem(sys.modules, "lm_eval_bh.export.vllm_model", None)
    with pytest.raises(PolicyError, match=r"under vLLM 0\.99\.1 \(tested: 0\.32; read: 0\.33\)"):
        vllm.LLM(model=str(folder), dtype="float32", max_model_len=80, skip_tokenizer_init=True)
    monkeypatch.setenv("LM_EVAL_BH_FORCE", "1")
    with pytest.raises(ImportError, match="vllm_model"):
        vllm.LLM(model=str(folder), dtype="float32", max_model_len=80, skip_tokenizer_init=True)


def test_the_routers_of_a_draft_model_are_none_of_the_policys(vllm, tmp_path, monkeypatch):
    """Of a model from the hub the weights tell that a policy is for it: without further layers."""
    folder = made("glm4_moe", tmp_path / "model")
    policies_of(folder)["top2"].save(tmp_path / "top2.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    further = f"model.layers.{config['num_hidden_layers']}.mlp.gate.weight"
    weights[further] = torch.ones(EXPERTS, config["hidden_size"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("LM_EVAL_BH_POLICY", str(tmp_path / "top2.safetensors"))
    monkeypatch.setattr("lm_eval_bh.export.vllm_model._checked", lambda *_: False)  # of the hub
    engine = started(vllm, folder)
    [slots] = engine.apply_model(lambda model: [route.method.max_k for route in model.routes])
    closed(engine)
    assert slots == [2, 2]


def recording(engine):
    """Bind vLLM's recorder, as ``--enable-return-routed-experts`` does where there is Triton."""
    from vllm.model_executor.layers.fused_moe import routed_experts_capturer as theirs

    recorder = theirs.RoutedExpertsCapturer(80, engine.llm_engine.vllm_config)
    engine.apply_model(lambda model: theirs.bind_routed_experts_capturer(model, recorder))
    return recorder


def answered(vllm, engine, recorder, ids):
    """Return what vLLM's server would answer to a prompt, and its log-probabilities."""
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    [out] = engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    rows = zip(ids[1:], out.prompt_logprobs[1:], strict=True)
    file = io.BytesIO()
    np.save(file, recorder.snapshot_routing_data(len(ids)).numpy())
    choice = {
        "index": 0,
        "prompt_token_ids": ids,
        "token_ids": list(out.outputs[0].token_ids),
        "routed_experts": base64.b64encode(file.getvalue()).decode(),
    }
    return {"choices": [choice]}, [at[token].logprob for token, at in rows]


@pytest.mark.parametrize("name", ["bh", "top2", "stock"])
def test_its_trace_is_replayed(name, vllm, run, tmp_path, monkeypatch):
    """The experts that vLLM records, under a policy or its own top-k, give its scores in hf-bh."""
    folder = made("tiny-olmoe", tmp_path / "model")
    for made_for, policy in policies_of(folder).items():
        policy.save(tmp_path / f"{made_for}.safetensors")
    named = "bh" if name == "stock" else name
    monkeypatch.setenv("LM_EVAL_BH_POLICY", str(tmp_path / f"{named}.safetensors"))
    engine = started(vllm, folder)
    if name == "stock":
        engine.apply_model(lambda model: model.decide_by(None))
    recorder = recording(engine)
    draw = torch.Generator().manual_seed(8)
    documents = [torch.randint(3, 4000, (n,), generator=draw).tolist() for n in (70, 33, 5)]
    answers, theirs = zip(
        *(answered(vllm, engine, recorder, ids) for ids in documents), strict=True
    )
    closed(engine)
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    code, _, err = run("import-routing", trace, "--model", folder, "--output-dir", tmp_path / "log")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def apart():
        largest = 0.0
        for ids, scores in zip(documents, theirs, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            own = logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            largest = max(largest, float((own - torch.tensor(scores)).abs().max()))
        return largest

    stock = apart()
    with BHRoutingIntegration(model, rule="replay", routes=tmp_path / "log") as routing:
        replayed = apart()
        mean = routing.get_routing_stats()["mean_experts_per_token"]
    print(f"{name}: {replayed:.1e} replayed, {stock:.1e} with top-8, {mean:.2f} experts")
    assert (stock > 0.1) == (name != "stock"), "the case would prove nothing"
    assert replayed < TOLERANCE


def test_a_policy_with_more_experts_than_vllm_records_is_refused(vllm, tmp_path, monkeypatch):
    folder = made("olmoe", tmp_path / "model")
    policies_of(folder)["benefit"].save(tmp_path / "benefit.safetensors")
    monkeypatch.setenv("LM_EVAL_BH_POLICY", str(tmp_path / "benefit.safetensors"))
    engine = started(vllm, folder)
    with pytest.raises(PolicyError, match="vLLM records 4 experts a token, and the policy has up"):
        recording(engine)
    closed(engine)


def test_drafted_tokens_are_decided_as_any_other(vllm, tmp_path, monkeypatch):
    """Token by token, as those that a draft is verified with.

    The last test here: vLLM 0.32 starts no further engine in this process after such a one.
    """
    folder = made("olmoe", tmp_path / "model")
    policy = policies_of(folder)["bh"]
    policy.save(tmp_path / "bh.safetensors")
    monkeypatch.setenv("LM_EVAL_BH_POLICY", str(tmp_path / "bh.safetensors"))
    engine = started(vllm, folder, speculative_config=NGRAM)
    passes = []
    [routes] = engine.apply_model(lambda model: model.routes)
    routes[0].watch = lambda weights, experts: passes.append(len(weights))
    ids = [5, 9, 7] * 6
    sampling = vllm.SamplingParams(max_tokens=40, temperature=0, logprobs=0, ignore_eos=True)
    [out] = engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    [out] = out.outputs
    found = [at[token].logprob for token, at in zip(out.token_ids, out.logprobs, strict=True)]
    closed(engine)
    text = [*ids, *out.token_ids]
    expected = verification.reference(policy, folder, [text])["log_probs"][0][len(ids) - 1 :]
    apart = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    print(f"{len(passes)} passes of {passes[0]}, then up to {max(passes[1:])} tokens: {apart:.1e}")
    assert max(passes[1:]) > 1, "nothing was drafted"
    assert apart < TOLERANCE
