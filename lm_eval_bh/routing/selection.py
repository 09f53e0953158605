"""Selects experts from router logits, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from lm_eval_bh.errors import ParameterError, RoutingError
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.fitted import fitted_method
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.pick import Picked, pick
from lm_eval_bh.routing.methods.router import softmax_output
from lm_eval_bh.routing.methods.step_up import StepUp
from lm_eval_bh.routing.parameters import accepts
from lm_eval_bh.routing.rich_display import selection_html
from lm_eval_bh.routing.tables.null_model import NullModel
from lm_eval_bh.routing.tensors import numbers_of


class Selection(Picked):
    """The experts of a batch of tokens, with a table for notebooks; see :class:`Picked`."""

    def _repr_html_(self) -> str:
        return selection_html(*self)


@accepts({"null": "null_model"})
def select_experts(
    router_logits: Tensor | NDArray[Any] | Sequence[Sequence[float]],
    null_model: NullModel | str | Path | None = None,
    layer: int = 0,
    alpha: float = 0.4,
    rule: str = "bh",
    min_k: int = 1,
    max_k: int = 8,
    temperature: float = 1.0,
    renormalize: bool | Literal["auto"] = False,
    seed: int = 0,
    mass: float | None = None,
    hidden_states: Tensor | None = None,
    step: Tensor | Sequence[int] | None = None,
) -> Selection:
    """Select the experts of every token by a rule, from router logits.

    Parameters
    ----------
    router_logits : Tensor or array
        float ``[tokens, experts]``.
    null_model : NullModel, path or None
        Null distribution of the layer's logits; rules other than tests do not need one. The null
        model determines the score, and whether each expert has its own distribution. ``null=`` is
        the argument's earlier name.
    layer : int
        The layer of ``null_model`` that the logits come from.
    alpha : float
        The rule's parameter, in (0, 1); for a test its level. The level bounds the expected share
        of false rejections if the logits of the null hypotheses follow F and are independent or
        positively dependent, which has not been shown for the logits of one token.
    rule, min_k, max_k, temperature, seed, mass
        See :class:`~lm_eval_bh.routing.config.RoutingConfig`.
    renormalize : bool or "auto"
        Whether to rescale the selected weights to sum to one; "auto" is False here, like OLMoE's
        ``norm_topk_prob``.
    hidden_states : Tensor, optional
        float ``[tokens, hidden]``, the router's input; for a null model of the statistic
        "predicted".
    step : Tensor or sequence of int, optional
        ``[tokens]``, for methods of a step: tokens with the same number are decided together; -1
        takes the model's own top-k. By default all tokens form one step.

    Returns
    -------
    Selection
        Indices, weights (softmax over *all* experts, float32 or better, differentiable), counts.

    Raises
    ------
    ParameterError
        If a parameter is out of range, or the null model belongs to other routers.
    RoutingError
        If a logit is NaN or infinite.

    References
    ----------
    Benjamini and Hochberg (1995), "Controlling the false discovery rate", J. R. Stat. Soc. B
    57:289.
    """
    if not isinstance(null_model, (NullModel, type(None))):
        null_model = NullModel.load(null_model)
    router_logits = numbers_of(router_logits, "router_logits")
    config = _config(
        null_model,
        alpha=alpha,
        rule=rule,
        min_k=min_k,
        max_k=max_k,
        temperature=temperature,
        renormalize=renormalize,
        seed=seed,
        mass=mass,
    )
    if router_logits.ndim != 2 or not router_logits.is_floating_point():
        raise ParameterError(
            "router_logits must be floating-point [tokens, experts]: found shape "
            f"{tuple(router_logits.shape)} and dtype {router_logits.dtype}; give a layer's logits."
        )
    if not torch.isfinite(router_logits).all():
        raise RoutingError(
            f"The router logits of layer {layer} hold NaN or infinite values: "
            "check the model's weights."
        )
    num_experts = router_logits.shape[-1]
    config.check_experts(num_experts)
    if null_model is not None:
        null_model.cdf(layer)  # raises if there is no such layer
        if null_model.header.num_experts not in (None, num_experts):
            raise ParameterError(
                f"The null model has {null_model.header.num_experts} experts per layer, but the "
                f"router logits have {num_experts}: give the null model of this router."
            )
        if null_model.header.statistic == "predicted" and hidden_states is None:
            raise ParameterError(
                "statistic=predicted needs the router's hidden states: give hidden_states."
            )
    method = fitted_method(config, null_model, layer, num_experts).to(router_logits.device)
    slots = method.asks(config.max_k)
    said = softmax_output(
        router_logits,
        slots,
        config.max_k,
        hidden_states=hidden_states,
        step=_numbered(step, router_logits),
    )
    return Selection(*pick(method, said))


def _numbered(step: Tensor | Sequence[int] | None, router_logits: Tensor) -> Tensor | None:
    """Return steps numbered from 0 on, int64 ``[tokens]`` on the device of the logits."""
    if step is None:
        return None
    given = torch.as_tensor(step, device=router_logits.device)
    if given.shape != router_logits.shape[:1] or given.is_floating_point():
        raise ParameterError(
            f"step must have a number for each of the {len(router_logits)} tokens: found shape "
            f"{tuple(given.shape)} and dtype {given.dtype}."
        )
    _, numbered = given.clamp(min=-1).unique(return_inverse=True)
    return torch.where(given < 0, -1, numbered - int((given < 0).any()))


def _config(null_model: NullModel | None, **given: Any) -> RoutingConfig:
    """Return the configuration; a null model determines what is tested."""
    if null_model is not None:
        method = METHODS.get(given["rule"])
        if method is None or "statistic" in method.declared:
            given["statistic"] = null_model.header.statistic
        if method is not None and method.tests:
            given["null_scope"] = null_model.header.null_scope
    return RoutingConfig(**given)


def reject(
    p_values: Tensor | NDArray[Any] | Sequence[Sequence[float]], alpha: float, rule: str = "bh"
) -> Tensor:
    """Decide every hypothesis from its p-value: the direct form of the procedure.

    Parameters
    ----------
    p_values : Tensor
        float ``[tokens, N]``, a tensor, array or lists, in any order; compared in float64.
    alpha : float
        Level, in (0, 1).
    rule : str
        A multiple-testing rule of :data:`~lm_eval_bh.routing.methods.METHODS`.

    Returns
    -------
    Tensor
        bool ``[tokens, N]``, True where the null hypothesis is rejected.

    Raises
    ------
    ParameterError
        If the rule is not a test, alpha is not a level, or a p-value is invalid.
    """
    config = RoutingConfig(alpha=alpha, rule=rule)
    p_values = numbers_of(p_values, "p_values")
    if p_values.ndim < 1 or not ((p_values >= 0) & (p_values <= 1)).all():
        raise ParameterError("p_values must be numbers from 0 to 1.")
    n = p_values.shape[-1]
    test = METHODS[rule](config.settings(0, n))
    if not isinstance(test, StepUp):
        raise ParameterError(
            f"rule={rule!r} is not a test: use a multiple-testing rule such as 'bh'."
        )
    ranked, order = (-p_values.double()).sort(dim=-1, descending=True)
    count = test.count(ranked, test.level(alpha).to(ranked.device))
    decisions = torch.arange(n, device=p_values.device) < count.unsqueeze(-1)
    return torch.zeros_like(decisions).scatter(-1, order, decisions)
