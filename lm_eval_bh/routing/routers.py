"""Finds the MoE routers of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_eval_bh.errors import ModelError

# Routers whose weights are a float32 softmax over all experts of the logits they return, of which
# the top-k are taken. Only for these can experts beyond the router's own top-k be given a weight.
SOFTMAX_ROUTERS = frozenset(
    {
        "OlmoeTopKRouter",
        "FlexOlmoTopKRouter",
        "Qwen2MoeTopKRouter",
        "Qwen3MoeTopKRouter",
        "Qwen3NextTopKRouter",
        "MixtralTopKRouter",
    }
)

# Routers that always rescale the selected weights to sum to one; the others have a switch for it.
NORMALIZING_ROUTERS = frozenset({"MixtralTopKRouter", "GptOssTopKRouter", "GraniteMoeTopKRouter"})


@dataclass(frozen=True)
class Router:
    """One router of a model, in the order of the layers.

    Attributes
    ----------
    name : str
        Its name among the model's modules, e.g. ``model.layers.3.mlp.gate``.
    module : nn.Module
        Its forward returns (router logits, weights, indices).
    num_experts, top_k : int
        How many experts it scores and how many it selects on its own.
    softmax : bool
        Whether its weights are the softmax over all experts of its logits.
    normalizes : bool
        Whether it rescales the weights of the selected experts to a fixed sum.
    """

    name: str
    module: nn.Module
    num_experts: int
    top_k: int
    softmax: bool
    normalizes: bool

    @property
    def weight(self) -> Tensor:
        """The projection from hidden states to router logits, ``[experts, hidden]``."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight


def find_routers(model: nn.Module) -> list[Router]:
    """Return every MoE router of a transformers model, in the order of its layers.

    The router's class is the one from which transformers itself records ``router_logits``.

    Raises
    ------
    ModelError
        If the model has none, or only ones that do not return (logits, weights, indices).
    """
    classes = tuple({recorder.target_class for recorder in _recorders(model)})
    routers = [
        _describe(name, module, model)
        for name, module in model.named_modules()
        if classes and isinstance(module, classes)
    ]
    if not routers:
        raise ModelError(
            f"{type(model).__name__} has no MoE routers, so there is nothing to route: give a "
            "mixture-of-experts model such as allenai/OLMoE-1B-7B-0924 or tiny-olmoe."
        )
    return routers


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside wrappers such as PEFT's.

    Raises
    ------
    ModelError
        If there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ModelError(
        f"{type(model).__name__} holds no transformers model: "
        "load it with AutoModelForCausalLM.from_pretrained."
    )


def _recorders(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            found = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
            yield from (
                r
                for r in (found if isinstance(found, list) else [found])
                if hasattr(r, "target_class")
            )


def _describe(name: str, module: nn.Module, model: nn.Module) -> Router:
    config = transformers_model(model).config.get_text_config()
    num_experts = getattr(module, "num_experts", None) or getattr(module, "n_routed_experts", None)
    top_k = getattr(module, "top_k", None) or getattr(config, "num_experts_per_tok", None)
    if num_experts is None:
        num_experts = getattr(config, "num_local_experts", None) or getattr(
            config, "num_experts", None
        )
    weight = getattr(module, "weight", None)
    if not (isinstance(num_experts, int) and isinstance(top_k, int) and isinstance(weight, Tensor)):
        raise ModelError(
            f"The router {name} ({type(module).__name__}) does not tell its number of experts, "
            "its top-k and its weight: routers of this family are not supported."
        )
    family = type(module).__name__
    switch = getattr(module, "norm_topk_prob", getattr(config, "norm_topk_prob", False))
    return Router(
        name=name,
        module=module,
        num_experts=num_experts,
        top_k=top_k,
        softmax=family in SOFTMAX_ROUTERS,
        normalizes=family in NORMALIZING_ROUTERS or bool(switch),
    )
