"""Describes a run in the results file: ``results["config"]["bh"]``."""

from __future__ import annotations

from lm_eval_bh.harness.logs.run_log import RunLog
from lm_eval_bh.routing.config import rule_info
from lm_eval_bh.routing.patching.integration import BHRoutingIntegration
from lm_eval_bh.routing.routers import transformers_model
from lm_eval_bh.schema import SCHEMA_VERSION, RunInfo, SpeedRouting

# Configuration keys from which FLOPs of a forward pass are computed.
FLOPS_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_experts",
    "num_experts_per_tok",
    "tie_word_embeddings",
)


def run_info(integration: BHRoutingIntegration, log: RunLog) -> RunInfo:
    """Describe the routing of an evaluation and its outcome, as plain values."""
    config = transformers_model(integration.model).config.get_text_config().to_dict()
    return {
        **described_routing(integration),
        "run_id": log.run_id,
        "experts": integration.experts_implementation,
        "log_routing": log.options.log_routing,
        "log_dir": log.options.log_dir,
        "model_config": {name: config.get(name) for name in FLOPS_FIELDS},
        "summary": log.summary(),
        "documents": log.documents.digests(log.cached_requests),
    }


def described_routing(integration: BHRoutingIntegration) -> SpeedRouting:
    """Describe everything that decides experts; equal for equal routing."""
    null = integration.null_model
    return {
        "schema_version": SCHEMA_VERSION,
        "rule": rule_info(integration.config.rule),
        "config": integration.describe(),
        "routed_layers": integration.layers,
        "num_layers": len(integration.routers),
        "num_experts": integration.num_experts,
        "native_top_k": integration.routers[0].top_k,
        "null_model": None if null is None else null.header.as_dict(),
    }
