"""One layer's router in vLLM: the engine ranks and weighs experts, a method decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import layer as fused_moe
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter

from lm_eval_bh.errors import PolicyError
from lm_eval_bh.export.vllm_step import decode_step
from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.methods.pick import pick, repeated
from lm_eval_bh.routing.methods.reading import choice_scores
from lm_eval_bh.routing.methods.router import RouterOutput, softmax_output

# Arguments of vLLM's routers that leave a method no ranking of experts to use.
FOREIGN = ("custom_routing_function", "hash_indices_table", "zero_expert_type", "eplb_state")
_by_name: dict[str, Route] = {}


class Route:
    """The routing function of one layer, which vLLM's :class:`CustomRoutingRouter` calls.

    Correction bias, groups and scaling stay those of vLLM's router for the family, which returns as
    many experts as the method needs.

    Parameters
    ----------
    create : callable
        vLLM's ``create_fused_moe_router``.
    arguments : keyword arguments
        vLLM's arguments for the layer's router.

    Attributes
    ----------
    router : CustomRoutingRouter
        The router that vLLM's layer gets.
    method : Method or None
        The method; None leaves the engine's own top-k.
    native_k, num_experts : int
        The model's top-k, and its experts per layer.
    scale : float
        Factor by which vLLM multiplies the experts' sum, and transformers their weights.
    watch : callable or None
        Called with the weights and experts ``[tokens, slots]`` of every pass.

    Raises
    ------
    PolicyError
        If the layer does not route by a ranking of its experts.
    """

    def __init__(self, create: Callable[..., Any], arguments: dict[str, Any]) -> None:
        foreign = [name for name in FOREIGN if arguments.get(name) is not None]
        foreign += ["num_fused_shared_experts"] * bool(arguments.get("num_fused_shared_experts"))
        if foreign:
            raise PolicyError(
                f"This model's routers use {foreign[0]}, with which no policy was compared: "
                "serve it without a policy, or give a model whose routers rank experts."
            )
        self._own = create(**arguments)
        self.native_k: int = arguments["top_k"]
        self.num_experts: int = arguments["global_num_experts"]
        self.method: Method | None = None
        self.scale = 1.0
        self.watch: Callable[[Tensor, Tensor], None] | None = None
        self._rescales = bool(arguments.get("renormalize", True))
        self._scoring: str = arguments.get("scoring_func", "softmax")
        self._bias: Tensor | None = arguments.get("e_score_correction_bias")
        groups = arguments.get("num_expert_group") if arguments.get("use_grouped_topk") else None
        ungrouped, unscaled = (groups or 1) <= 1, arguments.get("routed_scaling_factor", 1.0) == 1.0
        self._plain = self._scoring == "softmax" and self._bias is None and ungrouped and unscaled
        self._name = ""
        self.router = _Router(
            top_k=self.native_k,
            global_num_experts=self.num_experts,
            custom_routing_function=self,
            renormalize=self._rescales,
        )

    @property
    def softmax(self) -> bool:
        """Whether the weights are a softmax of the logits, rescaled or not, as in hf-bh."""
        return self._plain and self.scale == 1.0

    def bind(self, runner: Any, *, rescales: bool) -> None:
        """Attach to one layer, before its weights are loaded.

        Parameters
        ----------
        runner : MoERunner
            The layer's runner.
        rescales : bool
            Whether the model's configuration says that weights are rescaled, which vLLM's OLMoE
            ignores.
        """
        self.scale = float(getattr(runner, "routed_scaling_factor", 1.0))
        self._rescales = self._rescales or rescales
        self._name = runner.layer_name
        _by_name[self._name] = self
        self._runner = runner

    def decide_by(self, method: Method | None) -> None:
        """Use a method from now on, or the engine's own top-k."""
        self.method = method if method is None else method.to(self._runner.moe_config.device)
        slots = self.native_k if method is None else method.max_k
        self.router.top_k = self._runner.moe_config.experts_per_token = slots
        self._runner.routed_experts.top_k = slots

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Return weights, float32, and experts, int32, of ``[tokens, topk]``."""
        if torch.compiler.is_compiling():  # no graph may keep another policy's decisions
            return _route(hidden_states, gating_output, self._name, topk)  # type: ignore[no-any-return]
        weights, indices = self.decided(hidden_states, gating_output)
        if self.watch is not None:
            self.watch(weights, indices)
        return weights, indices

    def decided(self, hidden_states: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the method's decisions, with unused slots filled by an expert of weight 0."""
        if self.method is None:
            self._own.top_k = self.native_k
            weights, indices = self._own._compute_routing(hidden_states, logits, None)
            return weights, indices
        picked = repeated(pick(self.method, self.said(hidden_states, logits)), self.num_experts)
        weights = picked.weights.float() / self.scale
        return weights.contiguous(), picked.indices.int().contiguous()

    def traced(self, experts: Tensor) -> Tensor:
        """Return experts of as many slots as vLLM's trace has, ``[tokens, native_k]``.

        What is missing repeats, which a reader of the trace takes for one use.

        Raises
        ------
        PolicyError
            If the policy has more slots.
        """
        if (slots := experts.shape[-1]) > self.native_k:
            raise PolicyError(
                f"vLLM records {self.native_k} experts a token, and the policy has up to {slots}: "
                f"make one with max_k={self.native_k}, or serve without routed_experts."
            )
        return experts[:, torch.arange(self.native_k, device=experts.device).clamp(max=slots - 1)]

    def said(self, hidden_states: Tensor, logits: Tensor) -> RouterOutput:
        """Return the router's output for ``[tokens]``, as read by hf-bh's hook."""
        assert self.method is not None
        slots = self.method.asks(self.native_k)
        step = decode_step(len(logits), logits.device) if self.method.joint else None
        if self.softmax:
            said = softmax_output(
                logits,
                slots,
                self.native_k,
                rescales=self._rescales,
                hidden_states=hidden_states,
            )
            return said._replace(step=step)
        self._own.top_k = slots
        weights, indices = self._own._compute_routing(hidden_states, logits, None)
        indices = indices.long()
        ranked = choice_scores(self._scoring, logits, self._bias).gather(-1, indices)
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        return RouterOutput(
            logits,
            weights.gather(-1, order) * self.scale,
            indices.gather(-1, order),
            self.native_k,
            softmax=False,
            rescales=self._rescales,
            scores=self._scoring,
            hidden_states=hidden_states,
            step=step,
        )


class _Router(CustomRoutingRouter):  # type: ignore[misc]
    """vLLM's, whose trace takes a policy's experts."""

    def set_capture_fn(self, capture_fn: Callable[[Tensor], None] | None) -> None:
        """Let the experts of every pass be recorded; refuse at once a policy that has too many."""
        route = self.custom_routing_function
        route.traced(torch.empty(0, self.top_k))
        super().set_capture_fn(capture_fn and (lambda ids: capture_fn(route.traced(ids))))


@torch.library.custom_op("lm_eval_bh::route", mutates_args=())
def _route(hidden_states: Tensor, logits: Tensor, layer: str, slots: int) -> tuple[Tensor, Tensor]:
    return _by_name[layer].decided(hidden_states, logits)


@_route.register_fake
def _(hidden_states: Tensor, logits: Tensor, layer: str, slots: int) -> tuple[Tensor, Tensor]:
    weights = logits.new_empty((logits.shape[0], slots), dtype=torch.float32)  # len() is fixed
    return weights, weights.new_empty(weights.shape, dtype=torch.int32)


@contextmanager
def routes_made() -> Iterator[list[Route]]:
    """Route every layer that vLLM creates within the context by a :class:`Route`.

    vLLM takes a router only when a layer is made, which its models do themselves; its factory of
    routers is called in one place.
    """
    original, made = fused_moe.create_fused_moe_router, list[Route]()

    def create(**arguments: Any) -> CustomRoutingRouter:
        made.append(Route(original, arguments))
        return made[-1].router

    fused_moe.create_fused_moe_router = create
    try:
        yield made
    finally:
        fused_moe.create_fused_moe_router = original
