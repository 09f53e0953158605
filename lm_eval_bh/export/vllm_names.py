"""The names by which vLLM gets a policy."""

from __future__ import annotations

import os
from typing import Any

POLICY_VARIABLE = "LM_EVAL_BH_POLICY"
FORCE_VARIABLE = "LM_EVAL_BH_FORCE"
POLICY_OVERRIDE = "lm_eval_bh_policy"  # key of hf_overrides
EXPORTED = "adaptive_routing"  # key in config.json of an exported folder; prefix of its classes:
PREFIX = "Adaptive"


def policy_file(config: Any) -> str:
    """Return the policy named by a model's configuration or the environment, or ""."""
    return getattr(config, POLICY_OVERRIDE, None) or os.environ.get(POLICY_VARIABLE, "")
