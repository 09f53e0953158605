"""Writes a model's folder for vLLM's own models, if they cannot read transformers' folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.model_folder import write_model


def write_for_vllm(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder with linked weights, and with everything that vLLM's own models need.

    Their OLMoE does not support tied embeddings, and some models read values from ``config.json``
    that transformers omits if they have their usual value.
    """
    config = _usual(checkpoint.config) | checkpoint.config
    folder.mkdir(parents=True)
    write_model(checkpoint, folder, config, {}, link=True, untie=True)


def _usual(config: dict[str, Any]) -> dict[str, Any]:
    if config["model_type"] == "glm4_moe":
        return {"head_dim": config["hidden_size"] // config["num_attention_heads"]}
    if config["model_type"] == "deepseek_v3":
        return {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    return {}
