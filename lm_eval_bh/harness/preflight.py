"""Checks before weights load: names, values, files, the model's config."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.harness.quantized import take_quantization
from lm_eval_bh.logged_rows import find_log
from lm_eval_bh.resources import DEFAULT_MODEL, TINY_OLMOE, model_path
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.declared import PARAMETERS
from lm_eval_bh.routing.parameters import ALIASES
from lm_eval_bh.routing.patching.experts_switch import check_implementation
from lm_eval_bh.routing.placement import placement
from lm_eval_bh.routing.tables.null_model import NullModel

WEIGHTS_INDEX = "model.safetensors.index.json"  # for weights in several files
# Arguments that HFLM passes to from_pretrained; any other unknown name is a misspelling.
FROM_PRETRAINED = frozenset(
    {
        "attn_implementation",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "cache_dir",
        "device_map",
        "force_download",
        "load_in_4bit",
        "load_in_8bit",
        "local_files_only",
        "low_cpu_mem_usage",
        "max_memory",
        "quantization_config",
        "token",
        "use_safetensors",
        "variant",
    }
)
OWN_NAMES = frozenset(
    {
        "null_model",
        "policy",
        "experts_implementation",
        "log_routing",
        "log_dir",
        "log_samples",
        "log_logits",
        "pretrained",
    }
)


def check_names(given: Iterable[str]) -> None:
    """Raise a :class:`ParameterError` for a name that is unknown to hf-bh and HFLM."""
    from lm_eval.models.huggingface import HFLM

    known = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
    known |= FROM_PRETRAINED | OWN_NAMES | set(PARAMETERS) | set(ALIASES)
    for name in given:
        if name not in known:
            raise ParameterError(
                f"The model argument {name!r} is unknown to hf-bh{did_you_mean(name, known)}; "
                "the page Model arguments of the documentation lists what --model_args takes."
            )


def check_routes(config: RoutingConfig) -> None:
    """Raise if a configuration replays a missing log.

    Raises
    ------
    DataError
        If the folder has no log, or more than one.
    """
    if config.method.recorded and config.routes is not None:
        find_log(config.routes)


def say_download(pretrained: object) -> None:
    """State the size of hf-bh's default model on stderr, if it has to be downloaded."""
    from huggingface_hub import constants, try_to_load_from_cache

    if pretrained != DEFAULT_MODEL or constants.HF_HUB_OFFLINE:
        return
    if not isinstance(try_to_load_from_cache(DEFAULT_MODEL, WEIGHTS_INDEX), str):
        print(
            f"lm-eval-bh: {DEFAULT_MODEL} is not on this machine: it has 14 GB to download. "
            f"pretrained={TINY_OLMOE} ships and needs no download.",
            file=sys.stderr,
        )


def given_null_model(null_model: str | None) -> str | NullModel:
    """Load the null model if its path is a file; return "auto" and folders unchanged.

    Raises
    ------
    ParameterError
        If there is no such file or folder.
    NullModelError
        If the file is damaged.
    """
    if null_model in (None, "auto"):
        return "auto"
    path = Path(str(null_model))
    if not path.exists():
        raise ParameterError(
            f"null_model={str(null_model)!r} is not a file or folder: "
            "use the path of a null model, or null_model=auto."
        )
    return NullModel.load(path) if path.is_file() else str(null_model)


def check_model_config(config: Any, routing: RoutingConfig) -> None:
    """Raise a :class:`ParameterError` if the model that a config describes has too few experts."""
    config = config.get_text_config()
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if isinstance(getattr(config, name, None), int):
            routing.check_experts(getattr(config, name))
            routing.select_layers(config.num_hidden_layers)
            return


def check_run(
    pretrained: str, arguments: Mapping[str, Any], routings: Iterable[RoutingConfig]
) -> None:
    """Raise the errors of a run with these model arguments, before weights load.

    A model that is not on this machine is not downloaded.

    Raises
    ------
    ParameterError, NullModelError
        If an argument is unknown or unusable, or a configuration does not fit the model.
    """
    from transformers import AutoConfig

    check_names(arguments)
    given_null_model(arguments.get("null_model"))
    check_implementation(arguments.get("experts_implementation", "auto"))
    take_quantization(dict(arguments))
    placement(dtype=arguments.get("dtype", "auto"))
    try:
        config = AutoConfig.from_pretrained(
            model_path(pretrained),
            revision=arguments.get("revision", "main"),
            local_files_only=True,
        )
    except (OSError, ValueError):  # not on this machine, or the run says why
        return
    for routing in routings:
        check_model_config(config, routing)
