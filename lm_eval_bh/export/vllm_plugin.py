"""What vLLM calls in each of its processes: where a policy is named, vLLM's own model asks it."""

from __future__ import annotations

from typing import Any

from lm_eval_bh.export.vllm_limits import check_engine
from lm_eval_bh.export.vllm_names import EXPORTED, PREFIX, policy_file


def register() -> None:
    """Let policies into vLLM's models; nothing heavy is imported, and no model changes without one.

    The environment variable ``LM_EVAL_BH_POLICY`` names a policy file for the model that is served,
    and so does ``hf_overrides={"lm_eval_bh_policy": FILE}``. An exported folder needs neither.
    """
    import vllm

    registry = vllm.ModelRegistry
    for name, model in list(registry.models.items()):
        registry.models.setdefault(PREFIX + name, model)
    resolve = registry.resolve_model_cls

    def resolved(architectures: str | list[str], model_config: Any) -> tuple[type, str]:
        own, name = resolve(architectures, model_config)
        if not _routes(model_config, own):
            return own, name
        check_engine(vllm.__version__)  # before what another release may lack is imported
        from lm_eval_bh.export.vllm_model import routed

        return routed(own), name

    registry.resolve_model_cls = resolved


def _routes(model_config: Any, own: type) -> bool:
    """Whether a model is to be routed: the draft of speculative decoding is none of these."""
    if model_config.runner_type == "draft":
        return False
    if hasattr(model_config.hf_config, EXPORTED):  # in transformers its own code routes
        return not own.__module__.startswith("vllm.model_executor.models.transformers")
    return bool(policy_file(model_config.hf_config))
