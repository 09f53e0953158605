"""Finds out by experiment how a router turns scores into experts and weights.

A twin of the router, with the same code and settings but with random weights and biases, is run on
random hidden states: the result depends on neither its class nor its trained weights, and the
router and its hooks are not touched. Routers with equal settings are probed once.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import ModelError
from lm_eval_bh.routing.methods.reading import SCORES
from lm_eval_bh.routing.releases import unsupported

TOKENS = 128
BIAS = 0.2  # standard deviation of correction biases, enough to change the order of the scores
SPREAD = 1.5  # standard deviation of router logits


@dataclass(frozen=True)
class Order:
    """How a router ranks its experts: for each k, the first k are those that it selects.

    Attributes
    ----------
    score : str
        A key of :data:`~lm_eval_bh.routing.methods.reading.SCORES`.
    bias : str or None
        Path, from the router, of the bias added to the score; with ``beside``, the name of an
        attribute of the router's parent.
    beside : bool
        Whether the bias belongs to the router's parent, which passes it.
    in_slots : bool
        Whether the router returns its experts in this order, without sorting.
    """

    score: str
    bias: str | None = None
    beside: bool = False
    in_slots: bool = False


@dataclass(frozen=True)
class Behaviour:
    """The behaviour of a router.

    Attributes
    ----------
    softmax : bool
        Whether its weights are the softmax over all experts of its logits, taken at the largest
        ones, rescaled to sum to one or not.
    normalizes : bool
        Whether a token's weights always have the same sum.
    slots : int
        Number of experts per token.
    obeys : bool
        Whether it selects as many experts as its attribute ``top_k`` says, with weights of the same
        sum if that is fixed.
    order : Order or None
        How it ranks its experts; None if that could not be determined.
    """

    softmax: bool
    normalizes: bool
    slots: int
    obeys: bool
    order: Order | None

    @property
    def scores(self) -> str:
        """How logits become scores before any bias; empty if unknown."""
        if self.softmax:
            return "softmax"
        return "" if self.order is None or self.order.score == "logit" else self.order.score


_known: dict[object, Behaviour] = {}


def probe(module: nn.Module, parent: nn.Module | None, num_experts: int, top_k: int) -> Behaviour:
    """Return the behaviour of a router.

    Parameters
    ----------
    module : nn.Module
        The router, which is neither run nor changed.
    parent : nn.Module or None
        Its parent module, which may pass a bias to it.
    num_experts, top_k : int
        How many experts it scores, and how many it selects.

    Raises
    ------
    ModelError
        If it does not run on hidden states, or does not return (logits, weights, indices).
    """
    key = _make(module), _beside(module, parent), num_experts, top_k
    if key not in _known:
        _known[key] = _Probe(module, parent, num_experts).behaviour(top_k)
    return _known[key]


class _Probe:
    def __init__(self, module: nn.Module, parent: nn.Module | None, num_experts: int) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.module, self.num_experts = module, num_experts
        self.twin = _twin(module, self._tensor)
        width = next(p.shape[-1] for p in self.twin.parameters() if _is_matrix(p))
        self.hidden = torch.randn(TOKENS, width, generator=self.random)
        self.beside = {
            name: torch.randn(num_experts, generator=self.random) * BIAS
            for name in _beside(module, parent)
        }

    def behaviour(self, top_k: int) -> Behaviour:
        # torch's unsorted top-k is sorted anyway if k is at most a 64th of the experts.
        asked = min(max(top_k, 2, self.num_experts // 64 + 1), self.num_experts)
        logits, weights, indices = self.ask(asked)
        obeys = hasattr(self.module, "top_k") and all(
            self.ask(k)[1].shape[-1] == k for k in {asked, 1}
        )
        # All experts sum to one even without rescaling.
        half = max(1, min(asked, self.num_experts // 2))
        sums = self.ask(half)[1].sum(-1)
        normalizes = bool(sums.std() < 1e-3 * sums.mean())
        if obeys and normalizes:  # the block around it may rely on the sum at top_k
            obeys = torch.allclose(sums, self.ask(max(1, half // 2))[1].sum(-1), rtol=1e-3)
        return Behaviour(
            softmax=_is_softmax(logits, weights, indices),
            normalizes=normalizes,
            slots=self.ask(top_k)[1].shape[-1],
            obeys=obeys,
            order=self._order(logits, indices),
        )

    def ask(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (logits, weights, indices) of the router with ``k`` experts per token."""
        name = type(self.module).__name__
        if hasattr(self.twin, "top_k"):
            self.twin.top_k = k  # type: ignore[assignment]
        try:
            with torch.no_grad():
                try:
                    output = type(self.module).forward(self.twin, self.hidden, **self.beside)
                except (ValueError, IndexError):  # it takes [batch, length, hidden]
                    output = type(self.module).forward(self.twin, self.hidden[None], **self.beside)
        except Exception as error:
            raise ModelError(
                f"A router of class {name} does not run on hidden states alone ({error}): routers "
                "of this family are not supported."
            ) from error
        if not _is_triple(output, self.num_experts):
            raise ModelError(
                f"A router of class {name} does not return (logits, weights, indices) of its "
                f"{self.num_experts} experts: {unsupported(name)}"
            )
        logits, weights, indices = output
        return logits.float(), weights.float(), indices

    def _order(self, logits: Tensor, indices: Tensor) -> Order | None:
        """Return the score whose largest values the router selects, for every k."""
        slots = indices.shape[-1]
        asked = {k: self.ask(k)[2] for k in range(1, slots)}
        taken = {k: _mask(own, logits) for k, own in asked.items() if own.shape[-1] == k}
        everyone = _mask(indices, logits)
        for score, bias, beside, values in self._candidates(logits):
            in_slots = bool((values.gather(-1, indices).diff(dim=-1) <= 0).all())
            among = values.masked_fill(~everyone, float("-inf"))
            if all(
                torch.equal(_mask(among.topk(k, dim=-1).indices, logits), own)
                for k, own in taken.items()
            ) and (in_slots or len(taken) == len(asked)):
                return Order(score, bias, beside, in_slots)
        return None

    def _candidates(self, logits: Tensor) -> Iterator[tuple[str, str | None, bool, Tensor]]:
        yield "logit", None, False, logits
        biases = [(name, True, value) for name, value in self.beside.items()]
        biases += [
            (name, False, value)
            for name, value in _tensors(self.twin)
            if value.numel() == self.num_experts and value.ndim <= 2
        ]
        for score, function in SCORES.items():
            for name, beside, value in biases:
                yield score, name, beside, function(logits) + value.flatten()

    def _tensor(self, value: Tensor) -> Tensor:
        """Return a random tensor to replace one of the router's, of the same shape."""
        if not value.is_floating_point():
            return value
        scale = BIAS
        if value.ndim > 1 and value.numel() != self.num_experts:
            scale = SPREAD / float(value.shape[-1]) ** 0.5
        return torch.randn(value.shape, generator=self.random) * scale


def _twin(module: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a module with the same code and settings, its own tensors and no hooks."""
    twin = copy.copy(module)
    state = twin.__dict__
    state.pop("forward", None)  # replaced by accelerate
    for name, value in list(state.items()):
        if name.endswith("_hooks") and isinstance(value, dict):
            state[name] = OrderedDict()
    state["_parameters"] = {
        name: None if p is None else nn.Parameter(tensor(p), requires_grad=False)
        for name, p in module._parameters.items()
    }
    state["_buffers"] = {
        name: None if buffer is None else tensor(buffer) for name, buffer in module._buffers.items()
    }
    state["_modules"] = {
        name: None if child is None else _twin(child, tensor)
        for name, child in module._modules.items()
    }
    state["training"] = False  # no jitter
    return twin


def _make(module: nn.Module) -> object:
    """Return a key that is equal for routers that behave alike."""
    settings = tuple(
        sorted((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)))
    )
    shapes = tuple((name, tuple(value.shape)) for name, value in _tensors(module))
    return type(module), settings, shapes


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and min(tensor.shape) > 1


def _beside(module: nn.Module, parent: nn.Module | None) -> tuple[str, ...]:
    """Return the parent's tensors that are parameters of the router's forward."""
    names = list(inspect.signature(type(module).forward).parameters)[2:]
    return tuple(name for name in names if isinstance(getattr(parent, name, None), Tensor))


def _is_triple(output: Any, num_experts: int) -> bool:
    if not (isinstance(output, tuple) and len(output) == 3):
        return False
    if not all(isinstance(part, Tensor) and part.ndim == 2 for part in output):
        return False
    logits, weights, indices = output
    return (
        logits.shape == (TOKENS, num_experts)
        and weights.shape == indices.shape
        and len(weights) == TOKENS
        and weights.is_floating_point()
        and indices.dtype in (torch.int64, torch.int32)
        and int(indices.min()) >= 0
        and int(indices.max()) < num_experts
        and bool(logits.isfinite().all())
    )


def _mask(indices: Tensor, logits: Tensor) -> Tensor:
    """Return which experts occur in ``[tokens, slots]``: bool ``[tokens, experts]``."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, indices.long(), True)


def _is_softmax(logits: Tensor, weights: Tensor, indices: Tensor) -> bool:
    """Return whether these are the largest softmax weights, rescaled or not."""
    scores = torch.softmax(logits, dim=-1)
    top = scores.topk(indices.shape[-1], dim=-1)
    if not torch.equal(_mask(top.indices, logits), _mask(indices, logits)):
        return False
    expected = scores.gather(-1, indices.long())
    rescaled = expected / expected.sum(-1, keepdim=True)
    return any(torch.allclose(weights, each, rtol=1e-3, atol=1e-5) for each in (expected, rescaled))
