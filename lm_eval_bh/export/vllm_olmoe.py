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

from lm_eval_bh.export.layer_tables import layer_tables
from lm_eval_bh.export.portable.adaptive_selection import AdaptiveSelection
from lm_eval_bh.export.vllm_plugin import POLICY_OVERRIDE, POLICY_VARIABLE
from lm_eval_bh.routing.nulls.fingerprint import router_fingerprint
from lm_eval_bh.routing.policy import Policy


class AdaptiveOlmoeForCausalLM(olmoe.OlmoeForCausalLM):
    """vLLM's OLMoE with selections of ours in its routers.

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
        if exported is not None:
            selections = [AdaptiveSelection(settings) for settings in exported["layers"]]
        else:
            self._policy = Policy.load(file or "")
            selections = []
            for own in layer_tables(self._policy, normalizes=config.norm_topk_prob):
                selection = AdaptiveSelection(own.settings)
                selection.load_state_dict(own.tables)
                selections.append(selection)
        with _routed_by(selections):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **arguments)
        for layer in self._layers():  # there it is moved and, from an exported folder, loaded
            layer.mlp.gate.selection = selections[extract_layer_index(layer.mlp.experts.layer_name)]

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
def _routed_by(selections: Sequence[AdaptiveSelection]) -> Iterator[None]:
    """Let vLLM's OLMoE, while it is built, make experts that a selection of ours routes to.

    vLLM takes a routing function only when experts are made, which its OLMoE does by itself.
    """
    original = olmoe.FusedMoEFactory

    def routed(*, prefix: str, top_k: int, **arguments: Any) -> Any:
        selection = selections[extract_layer_index(prefix)]

        def route(
            hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
        ) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = selection(gating_output, hidden_states)
            return found

        return original(
            prefix=prefix,
            top_k=selection.settings["max_k"],
            custom_routing_function=route,
            **arguments,
        )

    olmoe.FusedMoEFactory = routed
    try:
        yield
    finally:
        olmoe.FusedMoEFactory = original
