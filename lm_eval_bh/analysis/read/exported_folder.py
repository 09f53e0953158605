"""Knows a run of another engine on an exported model: the folder says by what policy it routes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_bh.analysis.read.model_arguments import is_path, pretrained_of
from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import SCHEMA_VERSION, ExportedPolicy, RunInfo
from lm_eval_bh.validation import mismatch

KEY = "adaptive_routing"
# What loading an exported folder takes, and changes nothing else.
OF_EXPORTED = frozenset({"trust_remote_code"})


def exported_policy(content: Mapping[str, Any]) -> tuple[str, RunInfo] | None:
    """Return the model that was exported and its routing; None where no exported folder ran.

    Parameters
    ----------
    content : mapping
        Of a results file, whose model must still lie where it was.

    Raises
    ------
    DataError
        If the folder is one, and damaged.
    """
    name = pretrained_of(content)
    path = Path(name).expanduser() / "config.json"
    if not (is_path(name) or path.is_file()):
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config[KEY]["policy"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if reason := mismatch(found, ExportedPolicy, "its policy"):
        raise DataError(f"The exported model {path.parent} is damaged: {reason}; export it again.")
    policy: ExportedPolicy = found
    own = {name: value for name, value in config.items() if name != KEY}
    info: RunInfo = {
        "schema_version": SCHEMA_VERSION,
        "run_id": "",
        "rule": policy["rule"],
        "config": policy["config"],
        "experts": "auto",
        "log_routing": "off",
        "log_dir": None,
        "routed_layers": policy["routed_layers"],
        "num_layers": policy["num_layers"],
        "num_experts": policy["num_experts"],
        "native_top_k": policy["native_top_k"],
        "model_config": own | {"num_experts_per_tok": policy["native_top_k"]},
        "null_model": {"fingerprint": policy["fingerprint"]},
        "summary": None,
    }
    return policy["model"], info
