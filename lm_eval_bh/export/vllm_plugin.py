"""What vLLM calls in each of its processes: names our OLMoE, and imports nothing heavy."""

from __future__ import annotations

import os

POLICY_VARIABLE = "LM_EVAL_BH_POLICY"
POLICY_OVERRIDE = "lm_eval_bh_policy"  # of hf_overrides
_HOME = "lm_eval_bh.export.vllm_olmoe:AdaptiveOlmoeForCausalLM"


def register() -> None:
    """Register the architecture of exported folders, and of any OLMoE if a policy is named.

    The environment variable ``LM_EVAL_BH_POLICY`` names a policy file for every OLMoE, and for a
    single model ``hf_overrides={"architectures": ["AdaptiveOlmoeForCausalLM"],
    "lm_eval_bh_policy": FILE}`` does. Where nothing is asked for, vLLM's own models stay as they
    are.
    """
    from vllm import ModelRegistry

    ModelRegistry.register_model("AdaptiveOlmoeForCausalLM", _HOME)
    if os.environ.get(POLICY_VARIABLE):
        ModelRegistry.register_model("OlmoeForCausalLM", _HOME)
