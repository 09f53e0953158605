"""vLLM's own OLMoE, routed by a policy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models import olmoe
from vllm.model_executor.models.utils import extract_layer_index

from lm_eval_bh.errors import PolicyError
from lm_eval_bh.export.layer_methods import layer_methods
from lm_eval_bh.export.model_folder import FORMAT_VERSION
from lm_eval_bh.export.vllm_plugin import POLICY_OVERRIDE, POLICY_VARIABLE
from lm_eval_bh.routing.methods import METHODS, Method
from lm_eval_bh.routing.methods.pick import pick, repeated
from lm_eval_bh.routing.methods.router import softmax_output
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint


class AdaptiveOlmoeForCausalLM(olmoe.OlmoeForCausalLM):
    """vLLM's OLMoE with methods of ours in its routers.

    They are those of the exported folder that is loaded, or of a policy file named by the
    environment or by ``hf_overrides``. Unused slots repeat a valid expert with weight 0.

    Raises
    ------
    PolicyError
        If the file is damaged, for other routers, or cannot be expressed.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **arguments: Any) -> None:
        config = vllm_config.model_config.hf_config
        self._name = vllm_config.model_config.model
        self._policy: Policy | None = None
        file = getattr(config, POLICY_OVERRIDE, None) or os.environ.get(POLICY_VARIABLE)
        exported = getattr(config, "adaptive_routing", None)
        self._native_k = config.num_experts_per_tok
        if exported is not None:
            if exported["format_version"] != FORMAT_VERSION:
                raise PolicyError(
                    f"The folder {self._name} has adaptive routing of format version "
                    f"{exported['format_version']}, and this release reads {FORMAT_VERSION}: "
                    "export it again, or run it with --model-impl transformers."
                )
            self._native_k = exported["native_top_k"]
            methods = [METHODS[own["method"]](own) for own in exported["layers"]]
        else:
            self._policy = Policy.load(file or "")
            methods = layer_methods(self._policy)
        with _routed_by(methods, self._native_k, bool(config.norm_topk_prob)):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **arguments)
        for layer in self._layers():  # there it is moved and, from an exported folder, loaded
            layer.mlp.gate.selection = methods[extract_layer_index(layer.mlp.experts.layer_name)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights; the policy must be for their routers."""
        loaded: set[str] = super().load_weights(weights)
        layers = self._layers()
        if self._policy is not None and len(layers) == self.config.num_hidden_layers:
            found = router_fingerprint(layer.mlp.gate.weight for layer in layers)
            self._policy.check(found, self._name)
        return loaded

    def _layers(self) -> list[Any]:
        """Return the layers of this stage of the pipeline."""
        return list(self.model.layers[self.model.start_layer : self.model.end_layer])


@contextmanager
def _routed_by(methods: Sequence[Method], native_k: int, rescales: bool) -> Iterator[None]:
    """Let vLLM's OLMoE, while it is built, make experts that a method of ours routes to.

    vLLM takes a routing function only when experts are made, which its OLMoE does by itself.
    """
    original = olmoe.FusedMoEFactory

    def routed(*, prefix: str, top_k: int, **arguments: Any) -> Any:
        method = methods[extract_layer_index(prefix)]

        def route(
            hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
        ) -> tuple[Tensor, Tensor]:
            said = softmax_output(
                gating_output,
                method.asks(native_k),
                native_k,
                rescales=rescales,
                hidden_states=hidden_states,
            )
            picked = repeated(pick(method, said), method.num_experts)
            return picked.weights, picked.indices

        return original(
            prefix=prefix,
            top_k=method.max_k,
            custom_routing_function=route,
            **arguments,
        )

    olmoe.FusedMoEFactory = routed
    try:
        yield
    finally:
        olmoe.FusedMoEFactory = original
