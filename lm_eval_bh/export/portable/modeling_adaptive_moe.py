"""Mixture-of-experts models whose routers give each token as many experts as a policy says.

An exported folder holds this file; ``from_pretrained(folder, trust_remote_code=True)`` runs it. It
needs torch and transformers 5.18 or later. The policy stands in ``config.json`` under
``adaptive_routing``, its tables beside the weights. There ``"unused": "skip"`` saves the work of
slots that a token does not use, in transformers only; other engines need ``"repeat"``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import (
    MixtralForCausalLM,
    MixtralModel,
    MixtralTopKRouter,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM, OlmoeModel, OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeForCausalLM,
    Qwen2MoeModel,
    Qwen2MoeTopKRouter,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoeTopKRouter,
)

from .methods_of_policy import METHODS
from .pick import pick, repeated
from .router import RouterOutput


class AdaptiveRouter(nn.Module):
    """What makes a family's router adaptive; stands before it among the base classes.

    The router ranks and weighs experts itself; a method chooses among them.
    """

    def adapt(self, settings: dict[str, Any], policy: dict[str, Any]) -> None:
        """Take a layer's method, and what holds for all layers."""
        if policy["unused"] not in ("repeat", "skip"):
            raise ValueError(f"unused must be 'repeat' or 'skip': found {policy['unused']!r}.")
        self.selection = METHODS[settings["method"]](settings)
        self.repeats, self.rescales = policy["unused"] == "repeat", policy["rescales"]
        self.native_k = policy["native_top_k"]
        self.top_k = self.selection.asks(self.native_k)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return router logits, and weights and indices of the experts that serve."""
        logits, weights, indices = super().forward(hidden_states)
        said = RouterOutput(
            logits,
            weights,
            indices,
            self.native_k,
            rescales=self.rescales,
            hidden_states=hidden_states.reshape(-1, hidden_states.shape[-1]),
        )
        picked = pick(self.selection, said)
        if self.repeats:
            picked = repeated(picked, self.selection.num_experts)
        return logits, picked.weights, picked.indices


class AdaptiveOlmoeRouter(AdaptiveRouter, OlmoeTopKRouter):
    """OLMoE's."""


class AdaptiveMixtralRouter(AdaptiveRouter, MixtralTopKRouter):
    """Mixtral's."""


class AdaptiveQwen2MoeRouter(AdaptiveRouter, Qwen2MoeTopKRouter):
    """Qwen2-MoE's."""


class AdaptiveQwen3MoeRouter(AdaptiveRouter, Qwen3MoeTopKRouter):
    """Qwen3-MoE's."""


ROUTERS: dict[type[nn.Module], type[AdaptiveRouter]] = {
    OlmoeTopKRouter: AdaptiveOlmoeRouter,
    MixtralTopKRouter: AdaptiveMixtralRouter,
    Qwen2MoeTopKRouter: AdaptiveQwen2MoeRouter,
    Qwen3MoeTopKRouter: AdaptiveQwen3MoeRouter,
}


class AdaptiveMoe:
    """What makes a family's model adaptive; stands before it among the base classes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        policy = config.adaptive_routing
        parents = [m for m in self.modules() if type(getattr(m, "gate", None)) in ROUTERS]  # type: ignore[attr-defined]
        if len(parents) != len(policy["layers"]):
            raise ValueError(
                f"config.json describes the routing of {len(policy['layers'])} layers, and the "
                f"model has {len(parents)} with experts: export it again."
            )
        for parent, settings in zip(parents, policy["layers"], strict=True):
            router = ROUTERS[type(parent.gate)](config)
            router.adapt(settings, policy)
            parent.gate = router
            if policy["unused"] == "skip":  # only so do all of transformers' implementations know
                parent.experts._is_expert_parallel = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the file of the class, which is this one; the
        # experts that have it are in the family's own.
        return True


class AdaptiveOlmoeModel(AdaptiveMoe, OlmoeModel):
    """OLMoE without its head."""


class AdaptiveOlmoeForCausalLM(AdaptiveMoe, OlmoeForCausalLM):
    """OLMoE."""


class AdaptiveMixtralModel(AdaptiveMoe, MixtralModel):
    """Mixtral without its head."""


class AdaptiveMixtralForCausalLM(AdaptiveMoe, MixtralForCausalLM):
    """Mixtral."""


class AdaptiveQwen2MoeModel(AdaptiveMoe, Qwen2MoeModel):
    """Qwen2-MoE without its head."""


class AdaptiveQwen2MoeForCausalLM(AdaptiveMoe, Qwen2MoeForCausalLM):
    """Qwen2-MoE."""


class AdaptiveQwen3MoeModel(AdaptiveMoe, Qwen3MoeModel):
    """Qwen3-MoE without its head."""


class AdaptiveQwen3MoeForCausalLM(AdaptiveMoe, Qwen3MoeForCausalLM):
    """Qwen3-MoE."""
