"""Compares static numbers of experts in llama.cpp with hf-bh, on tiny-olmoe in float32.

Writes the model as GGUF, and runs it in llama.cpp's build for a CPU that a package brings, so that
no compiler is needed: ``pip install gguf xllamacpp``, then ``python scripts/verify_llama_cpp.py``.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh import BHRoutingIntegration
from lm_eval_bh.export import verification
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.llama_cpp import llama_cpp_options
from lm_eval_bh.harness.demo_texts import demo_documents
from lm_eval_bh.resources import tiny_olmoe

TOLERANCE = 1e-3  # of a token's log-probability
POLICIES = ({"max_k": 8}, {"max_k": 4}, {"max_k": 2}, {"max_k": 1}, {"k_per_layer": "5-3-3-5"})
TEXTS, TOKENS = 3, 40
SAID = 2  # what it answers, "!": half a character, or the end of a text, come without scores


def write_gguf(file: Path, experts_used: int | Sequence[int]) -> None:
    """Write tiny-olmoe in float32, with the number of a token's experts, or one a layer."""
    import gguf

    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=torch.float32)
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(file, "olmoe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    if isinstance(experts_used, int):
        writer.add_expert_used_count(experts_used)
    else:
        writer.add_array("olmoe.expert_used_count", list(experts_used))
    tokenizer = json.loads((tiny_olmoe() / "tokenizer.json").read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("olmo")
    writer.add_token_list(tokens)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if n in special else kinds.NORMAL for n in ids.values()])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)

    def add(name: str, tensor: torch.Tensor) -> None:
        writer.add_tensor(name, tensor.float().contiguous().numpy())

    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output.weight", weights["lm_head.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    for n, layer in enumerate(model.model.layers):
        block = f"blk.{n}."
        add(f"{block}attn_norm.weight", layer.input_layernorm.weight.data)
        add(f"{block}ffn_norm.weight", layer.post_attention_layernorm.weight.data)
        for name in "qkv":
            add(f"{block}attn_{name}.weight", getattr(layer.self_attn, f"{name}_proj").weight.data)
        for name in "qk":
            norm = getattr(layer.self_attn, f"{name}_norm").weight.data
            add(f"{block}attn_{name}_norm.weight", norm)
        add(f"{block}attn_output.weight", layer.self_attn.o_proj.weight.data)
        add(f"{block}ffn_gate_inp.weight", layer.mlp.gate.weight.data)
        gate, up = layer.mlp.experts.gate_up_proj.data.chunk(2, dim=1)
        add(f"{block}ffn_gate_exps.weight", gate)
        add(f"{block}ffn_up_exps.weight", up)
        add(f"{block}ffn_down_exps.weight", layer.mlp.experts.down_proj.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_probs_of(file: Path, documents: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return what llama.cpp gives each token of documents but their first, nats.

    Its server has scores of what it generates alone, so every token is asked for by all before it.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = max(map(len, documents)) + 8
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # Keys and values in half precision, as by default, would differ by more than the policies do.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    vocabulary = AutoTokenizer.from_pretrained(tiny_olmoe()).vocab_size

    def next_token(ids: Sequence[int], token: int) -> float:
        asked = {"prompt": list(ids), "max_tokens": 1, "logprobs": vocabulary}
        answer = server.handle_completions(asked | {"logit_bias": [[SAID, 100]]})
        [said] = answer["choices"][0]["logprobs"]["content"]
        return next(one["logprob"] for one in said["top_logprobs"] if one["id"] == token)

    return [[next_token(ids[:n], ids[n]) for n in range(1, len(ids))] for ids in documents]


def main() -> int:
    """Print a table, and return 1 if a difference is larger than allowed."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_olmoe())
    documents = [tokenizer(text).input_ids[:TOKENS] for text in demo_documents(TEXTS)]
    model = AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=torch.float32)
    largest, stock = 0.0, None
    print("| rule=topk | largest difference to hf-bh | to the model's own top-8 |\n|---|---:|---:|")
    for given in POLICIES:
        policy = BHRoutingIntegration(model, rule="topk", **given).policy()
        option, *_ = llama_cpp_options(policy, Checkpoint.find(str(tiny_olmoe())))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tiny-olmoe.gguf"
            write_gguf(file, json.loads(re.split(r"=(?:int:)?", option)[-1]))  # in place of options
            found = log_probs_of(file, documents)
        ours = verification.reference(policy, tiny_olmoe(), documents)["log_probs"]
        stock = stock or ours
        apart = _largest(found, ours)
        name = ",".join(f"{key}={value}" for key, value in given.items())
        print(f"| {name} | {apart:.1e} | {_largest(found, stock):.1e} |", flush=True)
        largest = max(largest, apart)
    return int(largest > TOLERANCE)


def _largest(one: list[list[float]], other: list[list[float]]) -> float:
    pairs = zip(chain.from_iterable(one), chain.from_iterable(other), strict=True)
    return max(abs(a - b) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
