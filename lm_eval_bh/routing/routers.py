"""Finds the MoE routers of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_eval_bh.errors import ModelError
from lm_eval_bh.routing.probe import Behaviour, Order, probe

# Top-k of a router before it was patched; see lm_eval_bh/routing/patching/unpatch.py.
OWN_TOP_K = "_own_top_k_before_bh"


@dataclass(frozen=True)
class Router:
    """One router of a model, in the order of the layers.

    Attributes
    ----------
    name : str
        Name among the model's modules, e.g. ``model.layers.3.mlp.gate``.
    module : nn.Module
        Its forward returns (router logits, weights, indices).
    num_experts, top_k : int
        How many experts it scores, and how many it selects.
    behaviour : Behaviour
        How it turns scores into experts and weights.
    parent : nn.Module or None
        Its parent module.
    copies : tuple of nn.Module
        Inactive copies of it, made by PEFT's ``modules_to_save``.
    """

    name: str
    module: nn.Module
    num_experts: int
    top_k: int
    behaviour: Behaviour
    parent: nn.Module | None = field(default=None, repr=False)
    copies: tuple[nn.Module, ...] = field(default=(), repr=False)

    @property
    def weight(self) -> Tensor:
        """The projection from hidden states to router logits, ``[experts, hidden]``.

        It is read from where accelerate stores it, if that differs from where it computes.
        """
        return router_weight(self.module)

    @property
    def softmax(self) -> bool:
        """Whether its weights are, or are proportional to, a softmax of all its logits."""
        return self.behaviour.softmax

    @property
    def normalizes(self) -> bool:
        """Whether it rescales the weights of the selected experts to a fixed sum."""
        return self.behaviour.normalizes

    @property
    def order(self) -> Order | None:
        """How it ranks its experts."""
        return self.behaviour.order


def router_weight(module: nn.Module) -> Tensor:
    """Return a router's projection ``[experts, hidden]``, read through accelerate's hooks."""
    inner, name = _projection(module)
    with align_module_device(inner):
        weight = getattr(inner, name)
    assert isinstance(weight, Tensor)
    return weight


def find_routers(model: nn.Module) -> list[Router]:
    """Return every MoE router of a transformers model, in the order of its layers.

    A router has the class from which transformers itself records ``router_logits``. Of the copies
    of a router that PEFT makes for ``modules_to_save``, the active one is returned.

    Raises
    ------
    ModelError
        If the model has no routers, or they do not return (logits, weights, indices).
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{model!r:.60} is not a loaded model: load one, for example with "
            "AutoModelForCausalLM.from_pretrained."
        )
    classes = tuple({recorder.target_class for recorder in _recorders(model)})
    found: dict[str, list[tuple[str, nn.Module, bool]]] = {}
    if classes:
        for place, name, module, active in _walk(model, ("", ""), True, set()):
            if isinstance(module, classes):
                found.setdefault(place, []).append((name, module, active))
    routers = []
    for group in found.values():
        [(name, module, _)] = [each for each in group if each[2]] or group[:1]
        copies = tuple(other for _, other, _ in group if other is not module)
        routers.append(_describe(name, module, model, copies))
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
        If there is no such model inside.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ModelError(
        f"{type(model).__name__} holds no transformers model: "
        "load it with AutoModelForCausalLM.from_pretrained."
    )


def _walk(
    module: nn.Module, names: tuple[str, str], active: bool, seen: set[int]
) -> Iterator[tuple[str, str, nn.Module, bool]]:
    """Yield (place, name, module, whether it is active) of all modules; copies share a place."""
    if id(module) in seen:
        return
    seen.add(id(module))
    place, name = names
    yield place, name, module, active
    saved = getattr(module, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict) and hasattr(module, "original_module"):  # PEFT's wrapper
        current = next(iter(module.active_adapters), "")  # type: ignore[arg-type]
        serves_original = bool(module.disable_adapters) or current not in saved
        copies = [("original_module", module.original_module, serves_original)]
        copies += [
            (f"modules_to_save.{key}", copy, not serves_original and key == current)
            for key, copy in saved.items()
        ]
        for suffix, copy, serves in copies:
            assert isinstance(copy, nn.Module)
            yield from _walk(copy, (place, f"{name}.{suffix}"), active and serves, seen)
        return
    for key, child in module.named_children():
        inner = tuple(f"{prefix}.{key}" if prefix else key for prefix in names)
        yield from _walk(child, (inner[0], inner[1]), active, seen)


def _recorders(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            found = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
            yield from (
                r
                for r in (found if isinstance(found, list) else [found])
                if hasattr(r, "target_class")
            )


def _describe(
    name: str, module: nn.Module, model: nn.Module, copies: tuple[nn.Module, ...]
) -> Router:
    config = transformers_model(model).config.get_text_config()
    num_experts = getattr(module, "num_experts", None) or getattr(module, "n_routed_experts", None)
    top_k = getattr(module, OWN_TOP_K, None) or getattr(module, "top_k", None)
    top_k = top_k or getattr(config, "num_experts_per_tok", None)
    if num_experts is None:
        num_experts = getattr(config, "num_local_experts", None) or getattr(
            config, "num_experts", None
        )
    if not (isinstance(num_experts, int) and isinstance(top_k, int)):
        raise ModelError(
            f"The router {name} ({type(module).__name__}) does not tell its number of experts "
            "and its top-k: routers of this family are not supported."
        )
    _projection(module)
    parent = model.get_submodule(name.rpartition(".")[0])
    behaviour = probe(module, parent, num_experts, top_k)
    if not behaviour.obeys:
        top_k = behaviour.slots
    return Router(name, module, num_experts, top_k, behaviour, parent, copies)


def is_projection(parameter: Tensor) -> bool:
    """Return whether a tensor is a router's matrix, not a bias or scale."""
    return parameter.ndim == 2 and min(parameter.shape) > 1


def _projection(module: nn.Module) -> tuple[nn.Module, str]:
    """Return the module that holds the router's projection, and its name there."""
    matrices = [
        (inner, name)
        for inner in module.modules()
        for name, parameter in inner._parameters.items()
        if parameter is not None and is_projection(parameter)
    ]
    if len(matrices) != 1:
        raise ModelError(
            f"A router of class {type(module).__name__} has {len(matrices)} weight matrices, not "
            "one that projects hidden states to router logits: routers of this "
            "family are not supported."
        )
    return matrices[0]
