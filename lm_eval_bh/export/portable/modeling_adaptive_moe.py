"""Mixture-of-experts models whose routers give each token as many experts as a policy says.

An exported folder holds this file; ``from_pretrained(folder, trust_remote_code=True)`` runs it. It
needs torch and transformers 5.18 or later. The policy is in ``config.json`` under
``adaptive_routing``, its tables beside the weights. There ``"unused": "skip"`` avoids the work of
unused slots, in transformers only; other engines need ``"repeat"``.

The model is transformers' own: ``AdaptiveOlmoeForCausalLM`` is ``OlmoeForCausalLM`` with adaptive
routers. Its class is created on first use.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .methods_of_policy import METHODS
from .pick import pick, repeated
from .reading import Reading
from .steps import step_of_queries, steps_of

ADAPTIVE = "Adaptive"  # prefix of class names
# Which tokens of the current pass are decoded together, if a method needs it.
_step: ContextVar[Tensor | None] = ContextVar("adaptive_step", default=None)


class AdaptiveRouter(nn.Module):
    """Makes a family's router adaptive; precedes it among the base classes.

    The router ranks and weighs experts itself; a method chooses among them.
    """

    def adapt(
        self,
        settings: dict[str, Any],
        router: dict[str, Any],
        policy: dict[str, Any],
        parent: nn.Module,
    ) -> None:
        """Take a layer's method, the router's properties, and those of all layers."""
        if policy["unused"] not in ("repeat", "skip"):
            raise ValueError(f"unused must be 'repeat' or 'skip': found {policy['unused']!r}.")
        self.selection = METHODS[settings["method"]](settings)
        self.repeats = policy["unused"] == "repeat"
        self.reading = Reading(**router["reading"])
        self.bias_name = router["bias"]
        self.beside = (parent,) if router["beside"] else ()  # a tuple, so not registered
        if router["obeys"]:
            self.top_k = self.reading.slots

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return router logits, and weights and indices of the kept experts."""
        output = super().forward(*args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        said = self.reading(output, hidden_states, self.adaptive_bias())
        if self.selection.joint:
            said = said._replace(step=_step.get())
        picked = pick(self.selection, said)
        if self.repeats:
            picked = repeated(picked, self.selection.num_experts)
        return output[0], picked.weights, picked.indices

    def adaptive_bias(self) -> Tensor | None:
        """Return the bias that the router adds to its scores for ranking."""
        if self.bias_name is None:
            return None
        found: Any = self.beside[0] if self.beside else self
        for name in self.bias_name.split("."):
            found = getattr(found, name)
        return found  # type: ignore[no-any-return]


class AdaptiveMoe:
    """Makes a family's model adaptive; precedes it among the base classes."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        policy = config.adaptive_routing
        for settings, router in zip(policy["layers"], policy["routers"], strict=True):
            name = router["name"]
            if self.base_model is self:  # type: ignore[attr-defined]
                name = name.removeprefix(f"{self.base_model_prefix}.")
            parent = self.get_submodule(name.rpartition(".")[0])  # type: ignore[attr-defined]
            module = parent.get_submodule(name.rpartition(".")[2])
            module.__class__ = _adaptive(AdaptiveRouter, type(module))
            module.adapt(settings, router, policy, parent)
        if any(METHODS[settings["method"]].joint for settings in policy["layers"]):
            self.register_forward_pre_hook(_begin_step, with_kwargs=True)  # type: ignore[attr-defined]
        if policy["unused"] == "skip":  # tells all of transformers' implementations
            for module in self.modules():  # type: ignore[attr-defined]
                if hasattr(module, "_is_expert_parallel"):
                    module._is_expert_parallel = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: transformers renames weights as for the family."""
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the file of the class, which is this one, but the
        # experts with the decorator are in the family's file.
        return True


def _begin_step(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Find the tokens of a pass that are decoded together: those at one position of its rows.

    vLLM's transformers backend puts all tokens in one row, and does not say which of them are
    decoded: there all tokens form one step. Continuous batching does so too, but says it.
    """
    given = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if given is None else given
    if tokens is None or "attention_instances" in kwargs:
        _step.set(None)
        return
    starts = kwargs.get("cu_seq_lens_q")
    if starts is not None and kwargs.get("cache") is not None:  # continuous batching
        _step.set(step_of_queries(starts, tokens.shape[1]).of)
        return
    layers, (rows, length) = model.config.adaptive_routing["layers"], tokens.shape[:2]
    settings = next(one for one in layers if METHODS[one["method"]].joint)
    mask, counted = kwargs.get("attention_mask"), None
    if mask is not None and mask.ndim == 2:
        counted = mask[:, -length:].reshape(-1) != 0
    if settings["phase"] == "decode" and length > 1:
        counted = torch.zeros(rows * length, dtype=torch.bool)
    _step.set(steps_of(rows, length, settings["decode_batch"], counted, tokens.device).of)


def _adaptive(kind: type, family: type) -> type:
    """Return the adaptive class of a family, always the same object."""
    name = f"{ADAPTIVE}{family.__name__}"
    if name not in globals():
        made = {"__module__": __name__, "__doc__": f"{family.__name__} with a policy."}
        globals()[name] = type(name, (kind, family), made)
    return globals()[name]  # type: ignore[no-any-return]


def __getattr__(name: str) -> type:
    """Create a model's class on first use."""
    family = getattr(transformers, name.removeprefix(ADAPTIVE), None)
    if not (name.startswith(ADAPTIVE) and isinstance(family, type)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _adaptive(AdaptiveMoe, family)
