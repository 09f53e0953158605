"""A model's folder as vLLM's own models read it, where that of transformers does not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.model_folder import write_model


def write_for_vllm(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder, its weights linked to, with what vLLM's own models ask for.

    Their OLMoE knows no tied embeddings, and some read from ``config.json`` what transformers
    leaves out where it has its usual value.
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
