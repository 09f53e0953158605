"""Predicts what hf-bh would do with a model, loading only its routers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.hub import cached_file

from lm_eval_bh.doctor.finding import NOTE, PROBLEM, Finding
from lm_eval_bh.errors import BHError, ModelError, PolicyError
from lm_eval_bh.resources import TINY_OLMOE, model_path
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.routing.routers import Router, find_routers
from lm_eval_bh.routing.tables.find import cached_null, known_null
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint
from lm_eval_bh.routing.tables.null_kind import LOGITS_OF_A_LAYER

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_model(pretrained: str, policy: Path | None = None) -> Iterator[Finding]:
    """Yield a description of a model, and the null model and policy that hf-bh would use.

    Parameters
    ----------
    pretrained : str
        Hub name or folder; what is not on this machine is not downloaded.
    policy : Path, optional
        A policy to compare with it.
    """
    name = model_path(pretrained)
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        routers = find_routers(model)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        yield Finding(
            "model",
            f"{pretrained} is not on this machine, or not a transformers model: {reason}",
            PROBLEM,
            f"download it, or check the name; {TINY_OLMOE} is shipped",
        )
        return
    except BHError as error:
        yield Finding("model", str(error), PROBLEM, "take a mixture-of-experts model")
        return
    first = routers[0]
    yield Finding(
        "model",
        f"{pretrained}: {type(model).__name__}, {len(routers)} MoE layers, {first.num_experts} "
        f"experts, native top-{first.top_k}",
    )
    try:
        fingerprint = router_fingerprint(_weights(name, routers))
    except ModelError as error:
        yield Finding(
            "null model", str(error), NOTE, "run the model: hf-bh then finds or calibrates one"
        )
        return
    yield _null_model(pretrained, fingerprint)
    yield _policy(pretrained, fingerprint, policy)


def _null_model(pretrained: str, fingerprint: str) -> Finding:
    found = known_null(fingerprint, LOGITS_OF_A_LAYER)
    if found is not None:
        path, null = found
        return Finding(
            "null model",
            f"{path}, by the fingerprint of the routers ({fingerprint[:12]}); of "
            f"{null.header.tokens} tokens",
        )
    return Finding(
        "null model",
        f"none is known for these routers ({fingerprint[:12]}): the first run calibrates one on "
        f"WikiText and keeps it as {cached_null(fingerprint)}",
        NOTE,
        f"lm-eval-bh calibrate --model {pretrained} does it beforehand, and checks it",
    )


def _policy(pretrained: str, fingerprint: str, path: Path | None) -> Finding:
    if path is None:
        return Finding("policy", "none: --model_args decide, by default BH at alpha=0.4")
    try:
        found = Policy.load(path)
        found.check(fingerprint, pretrained)
    except PolicyError as error:
        return Finding("policy", str(error), PROBLEM, "make one with lm-eval-bh policy")
    return Finding("policy", f"{path} fits: rule {found.config.rule}, made for these routers")


def _weights(name: str, routers: list[Router]) -> Iterator[Tensor]:
    """Yield the projection of each router from the model's files.

    Raises
    ------
    ModelError
        If the files are missing, or name it differently from transformers.
    """
    files: dict[str, str] = {}
    index = _file(name, INDEX)
    if index is not None:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for router in routers:
        inner = next(n for n, p in router.module.named_parameters() if p is router.weight)
        key = f"{router.name}.{inner}"
        path = _file(name, files.get(key, WEIGHTS))
        if path is None:
            raise ModelError(f"unknown: the weights of {name} are not on this machine")
        try:
            with safe_open(path, framework="pt") as weights:
                yield weights.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"unknown before {name} is loaded ({error})") from error


def _file(name: str, file: str) -> Path | None:
    options: dict[str, Any] = {
        "local_files_only": True,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    found = cached_file(name, file, **options)
    return None if found is None else Path(found)
