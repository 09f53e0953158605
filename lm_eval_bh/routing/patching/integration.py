"""Puts a selection rule into the routers of a loaded model, and takes it out without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import ModelError, ParameterError
from lm_eval_bh.routing.config import RoutingConfig, one_configuration
from lm_eval_bh.routing.fitted import fitted_method
from lm_eval_bh.routing.methods import Method
from lm_eval_bh.routing.parameters import ALIASES, accepts
from lm_eval_bh.routing.patching.affine import Array, align, fit_affine
from lm_eval_bh.routing.patching.counters import RoutingCounters, routing_stats
from lm_eval_bh.routing.patching.experts_switch import ExpertsSwitch, check_implementation
from lm_eval_bh.routing.patching.fits import check_fit
from lm_eval_bh.routing.patching.forward_pass import real_tokens
from lm_eval_bh.routing.patching.hook import RouterHook
from lm_eval_bh.routing.patching.null_in_force import NullInForce, refuse_stale
from lm_eval_bh.routing.patching.patch import Observer, Patch
from lm_eval_bh.routing.patching.routes import routes_for
from lm_eval_bh.routing.patching.unpatch import put_in, refuse_patched, unpatch
from lm_eval_bh.routing.policy import Policy, described
from lm_eval_bh.routing.rich_display import integration_html
from lm_eval_bh.routing.routers import find_routers, transformers_model
from lm_eval_bh.routing.solution import Solution
from lm_eval_bh.routing.tables.find import rounded
from lm_eval_bh.routing.tables.fingerprint import router_fingerprint
from lm_eval_bh.routing.tables.null_model import NullModel
from lm_eval_bh.routing.target import solve


class BHRoutingIntegration:
    """Adaptive expert selection in a loaded mixture-of-experts model.

    Parameters
    ----------
    model : nn.Module
        A transformers model with MoE routers, possibly wrapped (PEFT, accelerate); not yet
        compiled.
    alpha : float or RoutingConfig, optional
        The level, by default the rule's; or a whole configuration.
    temperature, min_k, max_k, mode, **parameters
        Parameters of :class:`~lm_eval_bh.routing.config.RoutingConfig`. With ``target_experts``
        alpha is solved.
    collect_stats : bool
        Whether to count for :meth:`get_routing_stats`. Padding never counts.
    null_model : "auto", path or NullModel
        The null model; "auto", or None, finds or calibrates one for this router. Alias ``kde=``.
    policy : Policy or path, optional
        The whole routing from a file, in place of all routing parameters.
    texts : sequence of str, optional
        Texts to solve a target and fit ``affine``; by default WikiText-2's training text.
    experts_implementation : "auto", "ragged" or the name of one of transformers'
        The experts implementation while patched; "auto" keeps the model's own if no slot can stay
        unused, and otherwise takes "ragged". ``experts=`` is an alias.

    Raises
    ------
    ParameterError, NullModelError, ModelError
        If the parameters, the null model or the model are unsuitable; nothing is changed.

    Examples
    --------
    >>> with BHRoutingIntegration(model, alpha=0.4, max_k=8):
    ...     model.generate(**inputs)
    """

    @accepts(ALIASES)
    def __init__(
        self,
        model: nn.Module,
        alpha: float | RoutingConfig | None = None,
        temperature: float = 1.0,
        min_k: int = 1,
        max_k: int = 8,
        mode: Literal["patch", "analyze"] = "patch",
        collect_stats: bool = True,
        *,
        null_model: str | Path | NullModel | None = "auto",
        experts_implementation: str = "auto",
        tokenizer: Any = None,
        texts: Sequence[str] | None = None,
        config: RoutingConfig | None = None,
        policy: Policy | str | Path | None = None,
        **parameters: Any,
    ) -> None:
        if policy is not None and not isinstance(policy, Policy):
            policy = Policy.load(policy)
        given = {"temperature": temperature, "min_k": min_k, "max_k": max_k, "mode": mode}
        given |= parameters
        self.config = one_configuration(alpha, config, given)
        if policy is not None:
            if self.config != RoutingConfig() or null_model != "auto":
                raise ParameterError("A policy holds all routing parameters: leave out the others.")
            self.config, null_model = policy.config, policy.null_model or "auto"
        check_implementation(experts_implementation)
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            raise ModelError(
                "The model is compiled and would not call the hooks: patch it before torch.compile."
            )
        self.model = model
        self.experts_implementation = experts_implementation
        self.routers = find_routers(model)
        self.num_experts = self.routers[0].num_experts
        self._tokenizer = tokenizer
        self._texts = texts
        self._nulls = NullInForce(
            "auto" if null_model is None else null_model, model, self.routers, tokenizer
        )
        self.solution: Solution | None = None
        self.affine: Array | None = None
        if policy is not None:
            name = transformers_model(model).name_or_path or type(model).__name__
            own = router_fingerprint(r.weight for r in self.routers)
            policy.check(own, name, rounded(self.routers))
        check_fit(self.config, self.routers)
        self.null_model = self._nulls.of(self.config)
        self.observers: list[Observer] = []
        self._patch: Patch | None = None
        self.counters: RoutingCounters | None = None
        if collect_stats:
            self.reset_stats()
        if policy is None:
            self._solve()
        else:
            self.solution, self.affine = policy.solution, policy.affine

    @property
    def patched(self) -> bool:
        """Whether the hooks are in the model now."""
        return self._patch is not None and self._patch.alive

    @property
    def layers(self) -> list[int]:
        """Positions of the routed layers' routers."""
        return self.config.select_layers(len(self.routers))

    @property
    def alphas(self) -> dict[int, float]:
        """The rule's parameter in every routed layer."""
        if self.solution is not None:
            return self.solution.alphas
        return dict.fromkeys(self.layers, self.config.alpha)

    def describe(self) -> dict[str, Any]:
        """Return the configuration as plain values, with solved values."""
        return described(self.config, self.solution)

    def policy(self, **provenance: Any) -> Policy:
        """Return the routing now in force as a policy, with its provenance."""
        own = transformers_model(self.model)
        return Policy(
            self.config,
            router_fingerprint(router.weight for router in self.routers),
            len(self.routers),
            self.num_experts,
            self.routers[0].top_k,
            self.solution,
            self.null_model,
            own.name_or_path or None,
            getattr(own.config, "_commit_hash", None),
            provenance,
            self.affine,
        )

    def configure(self, config: RoutingConfig) -> None:
        """Change the configuration, patched or not, and reset the statistics.

        If it does not fit, a :class:`BHError` is raised and the old one stays in force.
        """
        check_fit(config, self.routers)
        patched = self.patched
        before = self.config, self.null_model, self.solution, self.affine
        self.unpatch_model()  # a null model may be calibrated, on the unpatched model
        try:
            self.null_model = self._nulls.of(config)
            self.config = config
            self._solve()
            if patched:
                self.patch_model()
        except BaseException:
            self.config, self.null_model, self.solution, self.affine = before
            if patched:
                self.patch_model()
            raise

    def patch_model(self) -> BHRoutingIntegration:
        """Put the hooks into the model.

        Raises
        ------
        ModelError, NullModelError
            If a router has hooks already, or has changed since its null model was found.
        """
        refuse_patched(self.model)
        refuse_stale(self.null_model, self.routers)
        routes = routes_for(self.config, self.routers)
        patch = Patch(self.config, self.observers, self.counters, routes)
        routers = [(layer, self.routers[layer]) for layer in self.layers]
        hooks = [(own, RouterHook(patch, layer, own, self.method(layer))) for layer, own in routers]
        try:
            put_in(self.model, patch, hooks)
            if self.config.mode == "patch":
                align(self.model, patch, hooks, self.affine)
                unused = self.config.adaptive and self.config.min_k < self.config.max_k
                how = self.experts_implementation
                patch.switch = ExpertsSwitch(self.model, how, unused_slots=unused)
        except BaseException:
            unpatch(self.model)
            raise
        self._patch = patch
        return self

    def method(self, layer: int) -> Method:
        """Return the fitted method of a routed layer."""
        router = self.routers[layer]
        return fitted_method(
            self.config.for_layer(layer, len(self.routers)),
            self.null_model,
            layer,
            router.num_experts,
            self.alphas[layer],
            softmax=router.softmax,
            parent=router.parent,
        )

    def unpatch_model(self) -> None:
        """Remove every hook and restore the model's own experts implementation."""
        if self.patched:  # otherwise hooks may be another integration's
            unpatch(self.model)
        self._patch = None

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
    def real_tokens(self, mask: Tensor, decoded: Tensor | None = None) -> Iterator[None]:
        """State which tokens of forward passes are real, where no attention mask does.

        The mask is bool ``[rows, length]``, False for padding. Padding is not counted, and gets no
        experts where unused slots cost no work: a causal model's real tokens never see the padding
        after them. ``decoded`` marks the tokens for ``phase=decode``.
        """
        with real_tokens(transformers_model(self.model).base_model, mask, decoded):
            yield

    @property
    def rows_computed(self) -> int | None:
        """Expert rows computed since the model was patched; see :class:`ExpertsSwitch`."""
        switch = None if self._patch is None else self._patch.switch
        return None if switch is None else switch.rows_computed

    def get_routing_stats(self) -> dict[str, float | None]:
        """Return :func:`~lm_eval_bh.routing.patching.counters.routing_stats` since the last reset.

        Raises :class:`ParameterError` with ``collect_stats=False``.
        """
        if self.counters is None:
            raise ParameterError(
                "No statistics were collected: create the integration with collect_stats=True."
            )
        analyze = self.config.mode == "analyze"
        return routing_stats(self.counters, self.routers[0].top_k, analyze=analyze)

    def reset_stats(self) -> None:
        """Reset the statistics."""
        rows = self.config.decode_batch
        self.counters = RoutingCounters(len(self.routers), self.num_experts, rows)
        if self._patch is not None:
            self._patch.counters = self.counters

    def _repr_html_(self) -> str:
        return integration_html(self)

    def _solve(self) -> None:
        self.solution = self.affine = None
        if self.config.solves:
            self.solution = solve(self, self._tokenizer, self._texts)
        if self.config.affine:
            self.affine = fit_affine(self, self._tokenizer, self._texts)
        if self.counters is not None:
            self.reset_stats()
