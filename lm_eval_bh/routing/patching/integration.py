"""Puts a selection rule into the routers of a loaded model, and takes it out without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_eval_bh.errors import ModelError, ParameterError, RoutingError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.nulls.find import is_auto, resolve_null
from lm_eval_bh.routing.nulls.null_model import NullModel
from lm_eval_bh.routing.parameters import ALIASES, accepts
from lm_eval_bh.routing.patching.counters import RoutingCounters
from lm_eval_bh.routing.patching.experts import ExpertsSwitch, check_implementation
from lm_eval_bh.routing.routers import Router, find_routers, transformers_model
from lm_eval_bh.routing.selection import Selection, select
from lm_eval_bh.routing.selector import Selector
from lm_eval_bh.routing.target import Solution, solve

Observer = Callable[[int, Tensor, Selection], None]


class RouterHook:
    """A forward hook of one router: replaces what the router selected, or only watches it.

    It runs after the router, so whatever the router computes stays the router's own business.
    """

    def __init__(
        self, owner: BHRoutingIntegration, layer: int, router: Router, selector: Selector
    ) -> None:
        self.owner = owner
        self.layer = layer
        self.router = router
        self.selector = selector
        self.extremes: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the router's output with the selection in it, or None to leave it as it is."""
        if not (isinstance(output, tuple) and len(output) == 3):
            raise ModelError(
                f"The router {self.router.name} ({type(module).__name__}) does not return "
                "(logits, weights, indices): routers of this family are not supported."
            )
        router_logits, weights, indices = output
        self._check_finite(router_logits)
        selection = select(
            router_logits,
            self.selector,
            (weights, indices),
            softmax=self.router.softmax,
            normalizes=self.router.normalizes,
        )
        for observe in self.owner.observers:
            observe(self.layer, router_logits, selection)
        if self.owner.config.mode == "analyze":
            return None
        return router_logits, selection.weights, self.owner.without_padding(selection.indices)

    def _check_finite(self, router_logits: Tensor) -> None:
        """Note the extreme logits; the end of the forward pass asks all layers at once.

        Where one logit is NaN, both of them are.
        """
        self.extremes.extend(router_logits.detach().aminmax())


class BHRoutingIntegration:
    """Adaptive expert selection in a loaded mixture-of-experts model.

    Parameters
    ----------
    model : nn.Module
        A transformers model with MoE routers, possibly wrapped (PEFT, accelerate); not yet
        compiled.
    alpha : float or RoutingConfig
        The level; or the whole configuration, instead of its parameters one by one.
    temperature, min_k, max_k, mode, **parameters
        Those of :class:`~lm_eval_bh.routing.config.RoutingConfig`. With ``target_experts`` alpha is
        solved.
    collect_stats : bool
        Whether :meth:`get_routing_stats` is served. Padding never counts.
    null_model : "auto", path or NullModel
        The null model; "auto" finds one for this router, or calibrates it. ``kde=`` is an alias.
    texts : sequence of str, optional
        The documents that a target is solved on; default WikiText-2's training text.
    experts_implementation : "auto", "ragged" or the name of one of transformers
        What computes the experts while patched; "auto" keeps the model's own where no slot can stay
        unused, and takes "ragged" elsewhere. ``experts=`` is an alias.

    Raises
    ------
    ParameterError, NullModelError, ModelError
        If the parameters, the null model or the model cannot serve, before anything is changed.

    Examples
    --------
    >>> with BHRoutingIntegration(model, alpha=0.4, max_k=8) as routing:
    ...     model.generate(**inputs)
    ...     routing.get_routing_stats()["mean_experts_per_token"]
    """

    @accepts(ALIASES)
    def __init__(
        self,
        model: nn.Module,
        alpha: float | RoutingConfig = 0.05,
        temperature: float = 1.0,
        min_k: int = 1,
        max_k: int = 8,
        mode: Literal["patch", "analyze"] = "patch",
        collect_stats: bool = True,
        *,
        null_model: str | Path | NullModel = "auto",
        experts_implementation: str = "auto",
        tokenizer: Any = None,
        texts: Sequence[str] | None = None,
        config: RoutingConfig | None = None,
        **parameters: Any,
    ) -> None:
        given = {"temperature": temperature, "min_k": min_k, "max_k": max_k, "mode": mode}
        given |= parameters
        if isinstance(alpha, RoutingConfig):
            config = alpha
        else:
            given["alpha"] = alpha
        if config is not None and RoutingConfig.of(given) != RoutingConfig():
            raise ParameterError(
                "A configuration and parameters beside it were given: "
                "put the parameters into the RoutingConfig."
            )
        self.config = config or RoutingConfig.of(given)
        check_implementation(experts_implementation)
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            raise ModelError(
                "The model is compiled and would never call the hooks: "
                "patch it before torch.compile."
            )
        self.model = model
        self.experts_implementation = experts_implementation
        self.routers = find_routers(model)
        self.num_experts = self.routers[0].num_experts
        self._tokenizer = tokenizer
        self._texts = texts
        self._given_null = null_model
        self.solution: Solution | None = None
        self._check(self.config)
        self._known: NullModel | None = None  # kept while a rule without a test is in force
        self.null_model = self._resolve(self.config)
        self.observers: list[Observer] = []
        self.counters: RoutingCounters | None = None
        if collect_stats:
            self.reset_stats()
            self.observers.append(self._count)
        self.token_mask: Tensor | None = None
        self._real: Tensor | None = None
        self._hooks: list[RouterHook] = []
        self._handles: list[Any] = []
        self._switch: ExpertsSwitch | None = None
        self._solve()

    @property
    def patched(self) -> bool:
        """Whether the hooks sit in the model now."""
        return bool(self._handles)

    @property
    def layers(self) -> list[int]:
        """Positions of the routers that the rule applies to."""
        return self.config.select_layers(len(self.routers))

    @property
    def alphas(self) -> dict[int, float]:
        """The rule's parameter in every routed layer."""
        if self.solution is not None:
            return self.solution.alphas
        return dict.fromkeys(self.layers, self.config.alpha)

    def describe(self) -> dict[str, Any]:
        """Return the configuration as plain values, with what was solved.

        Where alpha was solved it stands in ``alpha``, or with ``budget="layer"`` the mean over the
        layers does; ``solved`` holds every layer's, and how well the target was met.
        """
        content = self.config.as_dict()
        if self.solution is None:
            return content
        alphas = self.solution.alphas
        mean = sum(alphas.values()) / len(alphas)
        return content | {"alpha": mean, "solved": self.solution.as_dict()}

    def configure(self, config: RoutingConfig) -> None:
        """Take another configuration, patched or not; the statistics start anew.

        Raises
        ------
        BHError
            If it does not fit the model, or its target cannot be met; then the old configuration
            stays in force.
        """
        self._check(config)
        patched = self.patched
        before = self.config, self.null_model, self.solution
        self.unpatch_model()  # first: a null model may be calibrated, and on the model as it is
        try:
            self.null_model = self._resolve(config)
            self.config = config
            self._solve()
            if patched:
                self.patch_model()
        except BaseException:
            self.config, self.null_model, self.solution = before
            if patched:
                self.patch_model()
            raise
        if self.counters is not None:
            self.reset_stats()

    def patch_model(self) -> BHRoutingIntegration:
        """Put the hooks into the model.

        Raises
        ------
        ModelError
            If a router carries hooks of this or another integration already.
        """
        self._refuse_patched()
        base = transformers_model(self.model).base_model
        assert isinstance(base, PreTrainedModel)
        try:
            self._handles.append(
                base.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            )
            for layer in self.layers:
                router = self.routers[layer]
                selector = self.selector(layer, self.alphas[layer])
                hook = RouterHook(self, layer, router, selector)
                self._hooks.append(hook)
                self._handles.append(router.module.register_forward_hook(hook, prepend=True))
            self._handles.append(base.register_forward_hook(self._after_forward))
            if self.config.mode == "patch":
                self._switch = ExpertsSwitch(
                    self.model,
                    self.experts_implementation,
                    unused_slots=self._leaves_slots_unused(),
                )
        except BaseException:
            self.unpatch_model()
            raise
        return self

    def selector(self, layer: int, alpha: float) -> Selector:
        """Return the rule of a layer with a parameter of its own."""
        return Selector(self.config, self.null_model, layer, self.routers[layer].num_experts, alpha)

    def unpatch_model(self) -> None:
        """Take every hook out and give the model its own experts implementation back."""
        while self._handles:
            self._handles.pop().remove()
        self._hooks.clear()
        self.token_mask = None
        if self._switch is not None:
            self._switch.restore()
            self._switch = None

    def __enter__(self) -> BHRoutingIntegration:
        return self.patch_model()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unpatch_model()

    @contextmanager
    def real_tokens(self, mask: Tensor) -> Iterator[None]:
        """Say which tokens of the forward passes inside are real, where no attention mask does.

        What is not real is not counted, and given no experts wherever unused slots cost no work:
        a causal model's real tokens never see what is padded behind them.

        Parameters
        ----------
        mask : Tensor
            bool ``[rows, length]``, as an attention mask: False, or 0, for padding.
        """
        before, self._real = self._real, mask
        try:
            yield
        finally:
            self._real = before

    def without_padding(self, indices: Tensor) -> Tensor:
        """Mark every slot of a padding token as unused: int64 ``[tokens, slots]`` in and out."""
        mask = self.token_mask
        if mask is None or self._switch is None or not self._switch.skips_unused:
            return indices
        return indices.masked_fill(~mask.to(indices.device).unsqueeze(-1), self.num_experts)

    @property
    def rows_computed(self) -> int | None:
        """Expert rows computed since the model was patched; see :class:`ExpertsSwitch`."""
        return None if self._switch is None else self._switch.rows_computed

    def get_routing_stats(self) -> dict[str, float | None]:
        """Return statistics of the experts per token since the last reset; None before any token.

        ``sparsity_gain`` is one minus the mean as a share of the model's own top-k.

        Raises
        ------
        ParameterError
            If the integration was made with ``collect_stats=False``.
        """
        if self.counters is None:
            raise ParameterError(
                "No statistics were collected: make the integration with collect_stats=True."
            )
        mean, deviation = self.counters.moments()
        top_k = float(self.routers[0].top_k)
        gain = None if mean is None else 1.0 - mean / top_k
        if self.config.mode == "analyze":
            ran = None if mean is None else top_k
            return {
                "mean_experts_per_token": ran,
                "std_experts_per_token": None if mean is None else 0.0,
                "sparsity_gain": gain,
                "bh_would_select_mean": mean,
            }
        return {
            "mean_experts_per_token": mean,
            "std_experts_per_token": deviation,
            "sparsity_gain": gain,
        }

    def reset_stats(self) -> None:
        """Start the statistics anew."""
        self.counters = RoutingCounters(len(self.routers), self.num_experts)

    def _count(self, layer: int, router_logits: Tensor, selection: Selection) -> None:
        assert self.counters is not None
        weight = None if self.token_mask is None else self.token_mask.to(torch.int64)
        self.counters.add(layer, selection, weight)

    def _leaves_slots_unused(self) -> bool:
        return self.config.adaptive and self.config.min_k < self.config.max_k

    def _refuse_patched(self) -> None:
        for router in self.routers:
            if any(isinstance(hook, RouterHook) for hook in router.module._forward_hooks.values()):
                raise ModelError(
                    f"The router {router.name} is patched already: call unpatch_model() first."
                )

    def _resolve(self, config: RoutingConfig) -> NullModel | None:
        if not config.needs_null:
            return None
        auto = is_auto(self._given_null)
        wanted = config.null_kind
        if auto:
            wanted = replace(wanted, trim=wanted.trim or 0)
        if self._known is None or self._known.mismatch(wanted) is not None:
            if auto:
                self._refuse_patched()  # it may have to be calibrated, on the model as it is
            self._known = resolve_null(
                self._given_null, self.model, self.routers, self._tokenizer, wanted
            )
        return self._known

    def _solve(self) -> None:
        self.solution = None
        if self.config.target_experts is not None:
            self.solution = solve(self, self._tokenizer, self._texts)
            if self.counters is not None:
                self.reset_stats()

    def _check(self, config: RoutingConfig) -> None:
        config.check_experts(self.num_experts)
        for layer in config.select_layers(len(self.routers)):
            router = self.routers[layer]
            if router.softmax:
                continue
            if config.needs_softmax:
                raise ParameterError(
                    f"rule={config.rule}, statistic={config.statistic}, "
                    f"null_scope={config.null_scope} needs weights that are a softmax of the "
                    f"logits, which those of "
                    f"{type(router.module).__name__} are not: use a test of the logits of a layer."
                )
            if config.max_k > router.top_k:
                raise ParameterError(
                    f"max_k={config.max_k} is more than the {router.top_k} experts that "
                    f"{type(router.module).__name__} gives weights to, and its scores are its own: "
                    f"give a max_k of at most {router.top_k}."
                )
            if config.temperature != 1.0:
                raise ParameterError(
                    f"temperature={config.temperature} would replace the scores of "
                    f"{type(router.module).__name__}, which are no plain softmax: leave it at 1."
                )

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Learn from the caller, or else from the attention mask, which tokens are padding."""
        for hook in self._hooks:  # a pass that died before its end has left its note
            hook.extremes.clear()
        mask = kwargs.get("attention_mask") if self._real is None else self._real
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens = ids if ids is not None else kwargs.get("inputs_embeds")
        self.token_mask = None
        if tokens is not None and self._real is not None and self._real.shape != tokens.shape[:2]:
            raise ParameterError(
                f"real_tokens() was told of {tuple(self._real.shape)} tokens, but the forward pass "
                f"has {tuple(tokens.shape[:2])}: give a mask [rows, length] of the same tokens."
            )
        if isinstance(mask, Tensor) and mask.ndim == 2 and tokens is not None:
            self.token_mask = mask[:, -tokens.shape[1] :].reshape(-1).to(tokens.device) != 0

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Ask all layers at once, in one synchronisation, whether their logits were finite."""
        noted = [(hook.layer, extreme) for hook in self._hooks for extreme in hook.extremes]
        for hook in self._hooks:
            hook.extremes.clear()
        if not noted:
            return
        device = noted[0][1].device
        finite = torch.stack([extreme.to(device) for _, extreme in noted]).isfinite().tolist()
        broken = {layer for (layer, _), fine in zip(noted, finite, strict=True) if not fine}
        if broken:
            names = ", ".join(map(str, sorted(broken)))
            raise RoutingError(
                f"The router logits of layer {names} hold NaN or infinite values: "
                "check the model's weights and its dtype."
            )
