"""Identifies a model by its ``--model_args``.

Every argument distinguishes runs unless it is known to be harmless: arguments of later releases of
lm-eval or transformers may change the numbers.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Mapping
from typing import Any

from lm_eval_bh.resources import MODELS

# Arguments about place and speed, and those whose outcome in the file is compared.
HARMLESS = frozenset(
    {
        "batch_size",
        "cache_dir",
        "data_parallel_size",
        "device",
        "device_map",
        "dtype",  # its outcome is config.model_dtype
        "enable_prefix_caching",
        "enforce_eager",
        "experts",
        "experts_implementation",
        "force_download",
        "gpu_memory_utilization",
        "local_files_only",
        "log_dir",
        "log_logits",
        "log_routing",
        "log_samples",
        "logits_cache",
        "low_cpu_mem_usage",
        "max_batch_size",
        "max_cpu_memory",
        "max_length",  # its outcome is max_length
        "max_memory",
        "max_memory_per_gpu",
        "max_model_len",  # of vLLM; its outcome is max_length
        "model_impl",  # which code of the model vLLM runs
        "offload_folder",
        "parallelize",
        "pipeline_parallel_size",
        "pretrained",  # compared as the model
        "revision",  # compared with the commit
        "tensor_parallel_size",
        "token",
        "tp_plan",
        "use_safetensors",
    }
)
# Arguments of hf-bh that config.bh describes.
OF_ROUTING = frozenset(
    {
        "affine",
        "alpha",
        "batch_seed",
        "budget",
        "combine",
        "decode_batch",
        "fallback",
        "family",
        "fold",
        "gap",
        "k0",
        "k2",
        "k_per_layer",
        "k_values",
        "kde",
        "layers",
        "mass",
        "max_k",
        "min_k",
        "mode",
        "null",
        "null_from",
        "null_model",
        "null_scope",
        "of",
        "phase",
        "policy",
        "power",
        "renormalize",
        "routes",
        "rule",
        "seed",
        "statistic",
        "step_budget",
        "target_distinct",
        "target_experts",
        "temperature",
        "trim",
    }
)
# Defaults of lm-eval and transformers that are not None.
DEFAULTS: dict[str, Any] = {
    "autogptq": False,
    "backend": "default",
    "gptqmodel": False,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "subfolder": "",
    "trust_remote_code": False,
    "truncation": False,
    "use_fast_tokenizer": True,
}
# Names of the number of experts per token in transformers' configurations.
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_k",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
)


def arguments_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's arguments in a results file, given as text or pairs."""
    given = content["config"].get("model_args") or {}
    if isinstance(given, str):
        pairs = (part.partition("=") for part in given.split(",") if part.strip())
        return {name.strip(): _value(value.strip()) for name, _, value in pairs}
    return dict(given)


def _value(text: str) -> Any:
    """Return an argument's value as lm-eval parses it."""
    known = {"true": True, "false": False, "none": None}
    if text.lower() in known:
        return known[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def pretrained_of(content: Mapping[str, Any]) -> str:
    """Return the hub name or path of a results file's model."""
    # For a model given as an object, lm-eval invents a random model_name.
    drawn = content.get("model_source") == "CUSTOM"
    named = None if drawn else content.get("model_name")
    return str(arguments_of(content).get("pretrained") or named or content["config"].get("model"))


def model_of(content: Mapping[str, Any]) -> str:
    """Return a key that is equal for files of one model: its hub name or absolute path.

    The last part of a path is not enough: ``a/final`` and ``b/final`` are two models.
    """
    return one_name(pretrained_of(content))


def one_name(name: str) -> str:
    """Return a key that is equal for all ways to name a model; see :func:`model_of`."""
    if not (is_path(name) or posixpath.isdir(name)):
        return name
    path = posixpath.abspath(posixpath.expanduser(name))  # ./m and /home/me/m are one
    return next((model for model in MODELS if path.endswith(f"/models/{model}")), path)  # shipped


def is_path(name: str) -> bool:
    """Return whether a model is given as a path instead of a hub name."""
    return name.startswith(("/", ".", "~"))


def telling_arguments(content: Mapping[str, Any], besides: Collection[str] = ()) -> str | None:
    """Return the arguments that distinguish a model, except ``besides``, as readable text.

    Returns
    -------
    str or None
        Such as ``"peft=adapter, tokenizer=other"``, or ``"none"``; None if the model was given as
        an object with unknown arguments.
    """
    given = arguments_of(content)
    if not given and content.get("model_source") == "CUSTOM":
        return None
    ignored = HARMLESS if chosen_top_k(content) is None else HARMLESS | set(TOP_K)
    if "bh" in content["config"]:
        ignored |= OF_ROUTING
    telling = {
        name: value
        for name, value in given.items()
        if name not in ignored
        and name not in besides
        and value is not None
        and value != DEFAULTS.get(name)
        and not (name == "tokenizer" and value == given.get("pretrained"))
    }
    shown = [f"{name}={_text(value)}" for name, value in sorted(telling.items())]
    return ", ".join(shown) or "none"


def revision_of(content: Mapping[str, Any]) -> str:
    """Return the requested branch, tag or commit."""
    return str(arguments_of(content).get("revision") or "main")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def chosen_top_k(content: Mapping[str, Any]) -> int | None:
    """Return the number of experts that the arguments set in the model's configuration, or None."""
    given = arguments_of(content)
    found = (given[name] for name in TOP_K if name in given)
    return next((k for k in found if isinstance(k, int) and not isinstance(k, bool)), None)


def engine_of(content: Mapping[str, Any]) -> str:
    """Return the backend of the unmodified model: ``hf``, or another name in lm-eval."""
    name = content["config"].get("model")
    other = isinstance(name, str) and name.isidentifier() and name.islower()
    return str(name) if other and name not in ("hf", "huggingface") else "hf"
