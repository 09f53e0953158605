"""Any mixture-of-experts model of vLLM, routed by a policy."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import vllm
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from lm_eval_bh.errors import ModelError, PolicyError
from lm_eval_bh.export.checkpoint import Checkpoint
from lm_eval_bh.export.layer_methods import layer_methods
from lm_eval_bh.export.model_folder import FORMAT_VERSION
from lm_eval_bh.export.vllm_limits import check_engine
from lm_eval_bh.export.vllm_names import EXPORTED, policy_file
from lm_eval_bh.export.vllm_router import Route, routes_made
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint

_logger = init_logger("vllm.lm_eval_bh")
_ROUTER = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe|feed_forward)\.(?:gate|router)\.weight$"
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_TABLE = re.compile(r"(?:^|\.)layers\.(\d+)\.[\w.]+\.selection\.(\w+)$")  # in an exported folder


@functools.cache
def routed(own: type) -> type:
    """Return a model class of vLLM routed by a policy and otherwise unchanged."""
    body = {"__module__": own.__module__, "__doc__": own.__doc__}
    return types.new_class(
        own.__name__, (RoutedModel, own), exec_body=lambda names: names.update(body)
    )


class RoutedModel:
    """Routes a model class of vLLM; precedes it among the base classes.

    The policy is that of the loaded exported folder, or a file named by the environment or by
    ``hf_overrides``.

    Raises
    ------
    PolicyError
        If the file is damaged, was made for other routers, or cannot be run; or if vLLM has
        settings under which no policy was verified.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "", **arguments: Any) -> None:
        of_model = vllm_config.model_config
        self._name, self._layers = of_model.model, dict[int, Route]()
        self._exported, self._policy = _exported(of_model), None
        if self._exported is None:
            self._policy = Policy.load(policy_file(of_model.hf_config))
            joint = self._policy.config.method.joint
        else:
            joint = any(METHODS[one["method"]].joint for one in self._exported["layers"])
        doubts = check_engine(vllm.__version__, vllm_config, joint=joint)
        self._checked = self._policy is not None and _checked(self._policy, of_model)
        with routes_made() as routes:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **arguments)  # type: ignore[call-arg]
        self._num_layers = of_model.hf_text_config.num_hidden_layers
        rescales = bool(getattr(of_model.hf_text_config, "norm_topk_prob", False))
        self._layers = _bound(self, routes, rescales)
        self._places = self._placed(vllm_config)
        if self._exported is None:
            self.decide_by(self._policy)
        else:
            for place, route in self._places.items():
                settings = self._exported["layers"][place]
                route.native_k = self._exported["native_top_k"]
                route.decide_by(METHODS[settings["method"]](settings))
        self._say(policy_file(of_model.hf_config), doubts)

    def _placed(self, vllm_config: Any) -> dict[int, Route]:
        """Return the routes of this pipeline stage by the layers' places in a policy."""
        whole = vllm_config.parallel_config.pipeline_parallel_size == 1
        decided = self._policy.num_layers if self._policy else len(self._exported["layers"])  # type: ignore[index]
        if decided != (len(self._layers) if whole else self._num_layers):
            raise PolicyError(
                f"The policy has {decided} layers, and {self._name} has {self._num_layers}, "
                f"{len(self._layers)} of them with experts here: give a policy of this model, and "
                "use no pipeline if some layers have no experts."
            )
        return dict(enumerate(self.routes)) if whole else self._layers

    def _say(self, file: str, doubts: list[str]) -> None:
        if self._policy is None:
            described = self._exported["policy"]  # type: ignore[index]
            name, config, digest = "of this folder", described["config"], described["digest"]
        else:
            name, config = Path(file).name, self._policy.config.as_dict()
            digest = self._policy.digest()
        usual = RoutingConfig().as_dict()
        words = (f"{n}={v}" for n, v in config.items() if n == "rule" or v != usual.get(n))
        _logger.info(
            "lm-eval-bh: the policy %s (%s, digest %s) decides in %d layers of %s; unused slots "
            "repeat an expert with weight 0.%s",
            name,
            ",".join(words),
            digest[:12],
            len(self._layers),
            type(self).__name__,
            "".join(f" Forced: no policy was compared under {doubt}." for doubt in doubts),
        )

    @property
    def routes(self) -> list[Route]:
        """The routes of the layers, in order."""
        return list(self._layers.values())

    def decide_by(self, policy: Policy | None) -> None:
        """Use a policy in all layers, or for None the engine's own top-k."""
        if policy is None:
            for route in self.routes:
                route.decide_by(None)
            return
        first = next(iter(self._layers.values()))
        given = (policy.num_experts, policy.native_top_k)
        if given != (first.num_experts, first.native_k):
            raise PolicyError(
                f"The policy is for {given[1]} of {given[0]} experts, but {self._name} uses "
                f"{first.native_k} of {first.num_experts}: make one for {self._name}."
            )
        methods = layer_methods(policy, softmax=first.softmax)
        for place, route in self._places.items():
            route.decide_by(methods[place])

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights, and check that the policy was made for them."""
        seen: dict[int, Tensor] = {}
        loaded: set[str] = super().load_weights(self._watched(weights, seen))  # type: ignore[misc]
        if self._policy is not None and not self._checked and seen:
            found = router_fingerprint(seen[layer] for layer in sorted(seen))
            self._policy.check(found, self._name)
        return loaded

    def _watched(
        self, weights: Iterable[tuple[str, Tensor]], seen: dict[int, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Pass on weights, keep those of routers, and load the tables of an exported folder."""
        for name, tensor in weights:
            if table := _TABLE.search(name):
                if route := self._layers.get(int(table[1])):
                    getattr(route.method, table[2]).copy_(tensor)
                continue
            router = None if self._checked else _ROUTER.search(name)
            if router and int(router[1]) < self._num_layers:  # further ones are of a draft model
                seen[int(router[1])] = tensor
            yield name, tensor


def _bound(model: Any, routes: list[Route], rescales: bool) -> dict[int, Route]:
    """Return the routes by layer number; raise if a layer with experts has none."""
    by_router = {id(route.router): route for route in routes}
    found = {}
    for runner in model.modules():
        if not isinstance(runner, MoERunner):
            continue
        number, route = _LAYER.search(runner.layer_name), by_router.get(id(runner.router))
        if number is None or route is None or runner.routed_experts.quant_method.is_monolithic:
            raise PolicyError(
                f"The layer {runner.layer_name} of {type(model).__name__} routes inside a kernel, "
                "where a policy has no effect: serve the model without one."
            )
        route.bind(runner, rescales=rescales)
        found[int(number[1])] = route
    if not found:
        raise PolicyError(
            f"{type(model).__name__} has no experts that vLLM routes, so a policy has no effect: "
            "serve it without one, or in vLLM's own code (--model-impl vllm)."
        )
    return dict(sorted(found.items()))


def _checked(policy: Policy, of_model: Any) -> bool:
    """Return whether a model's files are local and match the policy."""
    try:
        checkpoint = Checkpoint.find(of_model.model, of_model.revision, download=False)
    except ModelError:  # then weights are checked while loading
        return False
    checkpoint.check(policy, of_model.model)
    return True


def _exported(of_model: Any) -> dict[str, Any] | None:
    """Return the routing of an exported folder, or None for other models."""
    found: dict[str, Any] | None = getattr(of_model.hf_config, EXPORTED, None)
    if found is not None and found["format_version"] != FORMAT_VERSION:
        raise PolicyError(
            f"The folder {of_model.model} has adaptive routing of format version "
            f"{found['format_version']}, and this release reads {FORMAT_VERSION}: export it again, "
            "or run it with --model-impl transformers."
        )
    return found
