"""How vLLM is told of a policy."""

from __future__ import annotations

import os
from typing import Any

POLICY_VARIABLE = "LM_EVAL_BH_POLICY"
FORCE_VARIABLE = "LM_EVAL_BH_FORCE"
POLICY_OVERRIDE = "lm_eval_bh_policy"  # of hf_overrides
EXPORTED = "adaptive_routing"  # in config.json of an exported folder, whose models are named so:
PREFIX = "Adaptive"


def policy_file(config: Any) -> str:
    """Return what policy a model's configuration or the environment names, or an empty string."""
    return getattr(config, POLICY_OVERRIDE, None) or os.environ.get(POLICY_VARIABLE, "")
