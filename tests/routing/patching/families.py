"""Tiny random models of every family of transformers that records router logits."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedModel,
)

from lm_eval_bh import BHRoutingIntegration, ModelError, NullModel, ParameterError
from lm_eval_bh.routing.probe import Behaviour
from lm_eval_bh.routing.routers import find_routers

EXPERTS, TOP_K, LAYERS = 16, 4, 2
IDS = torch.arange(5, 45).reshape(2, 20)

# Whatever of these a family's configuration has takes this value.
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "unpadded_vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "top_k_experts": TOP_K,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "moe_layer_start_index": 0,
    "moe_layer_end_index": 1,
    "moe_layer_interval": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# What else a family needs.
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"mlp_layer_types": ["sparse"] * LAYERS},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "default",
            "partial_rotary_factor": 1.0,
            "mrope_section": [1, 1, 2],
        }
    },
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 16],
        "mlp_layer_types": ["sparse"] * LAYERS,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]},
    },
    "gemma4": {
        "enable_moe_block": True,
        "moe_intermediate_size": 16,
        "num_experts": EXPERTS,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "global_head_dim": 8,
    },
    "glm5_next": {"qk_rope_head_dim": 0, "linear_num_heads": 4, "linear_head_dim": 8},
    "hy_v4_vl": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
        }
    },
    "jamba": {
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "lfm2_moe": {"layer_types": ["full_attention"] * LAYERS},
    "mistral4": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 128,
        }
    },
    "step3p7": {"sliding_window": 16},
}


@functools.cache
def families() -> list[str]:
    """Return the families whose modelling code records router logits, in alphabetical order."""
    models = Path(transformers.__file__).parent / "models"
    return sorted(
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if '"router_logits": ' in file.read_text(encoding="utf-8")
        and file.parent.name in CONFIG_MAPPING
    )


def build(family: str, top_k: int = TOP_K) -> torch.nn.Module:
    """Return a random model of two layers; the same weights for every number of experts."""
    default = CONFIG_MAPPING[family]()
    text = default.get_text_config()
    values = {name: value for name, value in SIZES.items() if _has(text, name)}
    values |= _layers(text) | {"num_experts_per_tok": top_k}
    for name in ("moe_k", "moe_topk", "top_k_experts"):
        if _has(text, name):
            values[name] = top_k
    values |= SPECIAL.get(family, {})
    config = type(text)(**values)
    torch.manual_seed(0)
    model = _model_class(config)(config).eval()
    scramble(model)
    return model


def _has(text: Any, name: str) -> bool:
    """Whether a configuration knows a name; one that differs by layer may not be looked at."""
    try:
        return hasattr(text, name)
    except RuntimeError:
        return True


@functools.cache
def stock(family: str) -> torch.nn.Module:
    """Return the family's model, built once: tests that patch it unpatch it again."""
    return build(family)


def _model_class(config: Any) -> Any:
    """Return the class with a language head, or else without one."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    name = type(config).__module__.replace("configuration_", "modeling_")
    for found in vars(importlib.import_module(name)).values():
        if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
            continue
        if found.config_class is type(config) and found.__name__.endswith("TextModel"):
            return found
    raise LookupError(f"no model takes a {type(config).__name__}")


def scramble(model: torch.nn.Module) -> None:
    """Give routers distinct logits, biases that change the order, and scales other than 1."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        router = any(part in name for part in ("router", "gate.", "gating"))
        if router and tensor.ndim == 2 and tensor.shape[0] == EXPERTS:
            torch.nn.init.normal_(tensor, std=0.3, generator=generator)
        elif name.endswith("bias") and tensor.numel() == EXPERTS:
            torch.nn.init.normal_(tensor, std=0.2, generator=generator)
        elif name.endswith("per_expert_scale"):
            torch.nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)


def run(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=False)
    return output.logits if "logits" in output else output.last_hidden_state


def _layers(text: Any) -> dict[str, Any]:
    """Return the lists that say what every layer is, for two layers, with attention if they can."""
    found = {}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "attn_type_list"):
        kinds = getattr(text, name, None)
        if isinstance(kinds, (list, tuple)) and len(kinds):
            best = [k for k in kinds if k in ("full_attention", "sparse", "moe")]
            prop = getattr(type(text), name, None)
            if isinstance(prop, property) and prop.fset is None:
                continue
            found[name] = (best or list(kinds))[:1] * LAYERS if best else list(kinds)[:LAYERS]
    return found


@dataclass(frozen=True)
class Examined:
    """The result for a family; ``fault`` says why it is unsupported or was not built."""

    family: str
    behaviour: Behaviour | None = None
    eager: bool = False
    fault: str = ""
    built: bool = True


@functools.cache
def examine(family: str) -> Examined:
    """Build a family, patch it, and report what works."""
    try:
        model = stock(family)
        run(model, IDS)
    except Exception as error:  # whatever a family wants that is not known here
        return Examined(family, fault=type(error).__name__, built=False)
    try:
        [behaviour] = {router.behaviour for router in find_routers(model)}
    except ModelError as error:
        return Examined(family, fault=str(error))
    eager = True
    try:
        with BHRoutingIntegration(model, kde=null_of(model), max_k=2, experts="eager"):
            run(model, IDS)
    except ParameterError:
        eager = False
    return Examined(family, behaviour, eager)


def null_of(model: torch.nn.Module) -> NullModel:
    """Fit a null model to the routers' output for ``IDS``."""
    routers = [router.module for router in find_routers(model)]
    heard: dict[int, torch.Tensor] = {}
    handles = [
        router.register_forward_hook(lambda _, __, out, at=at: heard.update({at: out[0].float()}))
        for at, router in enumerate(routers)
    ]
    run(model, IDS)
    for handle in handles:
        handle.remove()
    return NullModel.fit(heard)
