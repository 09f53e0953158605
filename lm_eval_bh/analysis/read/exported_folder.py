"""Recognises runs of other engines on an exported model, whose folder has the policy."""

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
# Arguments for loading an exported folder, which change nothing else.
OF_EXPORTED = frozenset({"trust_remote_code"})


def exported_policy(content: Mapping[str, Any]) -> tuple[str, RunInfo] | None:
    """Return the exported model and its routing; None without an exported folder.

    Parameters
    ----------
    content : mapping
        Content of a results file, whose model must still exist.

    Raises
    ------
    DataError
        If the exported folder is damaged.
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
