"""A policy's fitted methods, one per layer, with which engines decide."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path

from lm_eval_bh.errors import PolicyError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.fitted import fitted_method
from lm_eval_bh.routing.methods import Method, pick
from lm_eval_bh.routing.methods.reading import Reading
from lm_eval_bh.routing.methods.steps import Steps
from lm_eval_bh.routing.policy import Policy

_IMPORT = re.compile(r"^from \.(\w+) import ", re.MULTILINE)


def layer_methods(policy: Policy, *, softmax: bool = True) -> list[Method]:
    """Return a policy's methods, including the model's own top-k in unrouted layers.

    Parameters
    ----------
    policy : Policy
        The policy.
    softmax : bool
        Whether the weights of the routers are a softmax of their logits.

    Raises
    ------
    PolicyError
        If engines cannot run the policy.
    """
    config = policy.config
    if config.mode != "patch":
        raise PolicyError(
            f"A policy with mode={config.mode} only counts and does not route: make one with "
            "mode=patch."
        )
    if config.method.random:
        raise PolicyError(
            f"rule={config.rule} draws experts at random and has no thresholds for an engine: the "
            "nearest rule that can be exported is rule=topk with the same max_k."
        )
    if config.method.runs_experts:
        raise PolicyError(
            f"rule={config.rule} runs all experts before it decides, which no engine can do: the "
            "nearest rule that can be exported is rule=min_w with statistic=contribution."
        )
    if config.affine:
        raise PolicyError(
            "affine=true corrects the layers' outputs, but engines only let a policy decide "
            "experts and their weights: make a policy without it, for example with mass=0.5."
        )
    if config.method.recorded:
        raise PolicyError(
            f"rule={config.rule} serves logged experts for the log's own texts, but an engine "
            "reads other texts: export the policy with which the log was made."
        )
    routed = config.select_layers(policy.num_layers)
    native = RoutingConfig(rule="topk", max_k=policy.native_top_k)
    alphas = {} if policy.solution is None else policy.solution.alphas
    return [
        fitted_method(
            config.for_layer(layer, policy.num_layers) if layer in routed else native,
            policy.null_model,
            layer,
            policy.num_experts,
            alphas.get(layer),
            softmax=softmax,
        )
        for layer in range(policy.num_layers)
    ]


def files_of(methods: Iterable[Method]) -> list[Path]:
    """Return the source files of methods, and the modules that they import."""
    found: dict[str, Path] = {}
    waiting = [Path(inspect.getfile(type(method))) for method in methods]
    waiting += [Path(inspect.getfile(used)) for used in (Reading, Steps, pick)]
    home = waiting[-1].parent
    while waiting:
        path = waiting.pop()
        if path.name in found:
            continue
        found[path.name] = path
        names = _IMPORT.findall(path.read_text(encoding="utf-8"))
        waiting += [home / f"{name}.py" for name in names]
    return [found[name] for name in sorted(found)]
