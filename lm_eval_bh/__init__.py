"""Benjamini-Hochberg expert routing for mixture-of-experts models, as a plugin of lm-eval.

Importing the package registers it with lm-eval and is cheap: torch is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lm_eval_bh.errors import (
    BHError,
    DataError,
    ModelError,
    NullModelError,
    ParameterError,
    PolicyError,
    RoutingError,
    UnreachableError,
)
from lm_eval_bh.harness.plugin.activation import activate

if TYPE_CHECKING:
    from lm_eval_bh.analysis.show.plots import (
        create_comprehensive_visualization,
        create_single_panel,
    )
    from lm_eval_bh.harness.sweep.runner import BHRoutingExperimentRunner
    from lm_eval_bh.routing.config import RoutingConfig
    from lm_eval_bh.routing.patching.integration import BHRoutingIntegration
    from lm_eval_bh.routing.patching.unpatch import unpatch
    from lm_eval_bh.routing.policy import Policy
    from lm_eval_bh.routing.selection import Selection, select_experts
    from lm_eval_bh.routing.tables.null_model import NullModel
    from lm_eval_bh.viewing.text_view import view

    __version__: str

__all__ = [
    "BHError",
    "BHRoutingExperimentRunner",
    "BHRoutingIntegration",
    "DataError",
    "ModelError",
    "NullModel",
    "NullModelError",
    "ParameterError",
    "Policy",
    "PolicyError",
    "RoutingConfig",
    "RoutingError",
    "Selection",
    "UnreachableError",
    "__version__",
    "create_comprehensive_visualization",
    "create_single_panel",
    "select_experts",
    "unpatch",
    "view",
]

_HOME = {
    "BHRoutingExperimentRunner": "lm_eval_bh.harness.sweep.runner",
    "BHRoutingIntegration": "lm_eval_bh.routing.patching.integration",
    "NullModel": "lm_eval_bh.routing.tables.null_model",
    "Policy": "lm_eval_bh.routing.policy",
    "RoutingConfig": "lm_eval_bh.routing.config",
    "Selection": "lm_eval_bh.routing.selection",
    "create_comprehensive_visualization": "lm_eval_bh.analysis.show.plots",
    "create_single_panel": "lm_eval_bh.analysis.show.plots",
    "select_experts": "lm_eval_bh.routing.selection",
    "unpatch": "lm_eval_bh.routing.patching.unpatch",
    "view": "lm_eval_bh.viewing.text_view",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("lm-eval-bh")
        except PackageNotFoundError:  # a checkout on PYTHONPATH
            value = "0+uninstalled"
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


activate()
