"""The plugin that vLLM loads in each process: applies a named policy to vLLM's models."""

from __future__ import annotations

from typing import Any

from lm_eval_bh.export.vllm_limits import check_engine
from lm_eval_bh.export.vllm_names import EXPORTED, PREFIX, policy_file


def register() -> None:
    """Enable policies in vLLM's models; without a policy, nothing changes.

    The environment variable ``LM_EVAL_BH_POLICY`` names a policy file for the served model, as does
    ``hf_overrides={"lm_eval_bh_policy": FILE}``. An exported folder needs neither.
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
    """Return whether to route a model, which excludes drafts of speculative decoding."""
    if model_config.runner_type == "draft":
        return False
    if hasattr(model_config.hf_config, EXPORTED):  # in transformers the folder's own code routes
        return not own.__module__.startswith("vllm.model_executor.models.transformers")
    return bool(policy_file(model_config.hf_config))
