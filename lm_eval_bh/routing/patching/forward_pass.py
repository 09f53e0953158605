"""The state of one forward pass: its real tokens, and the selections of its routers.

It belongs to the pass: hooks of the base model begin and end it, and a context variable, one per
thread, holds the current pass. Activation checkpointing runs layers again after their pass has
ended; :class:`OwnPass` keeps it for them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from lm_eval_bh.errors import RoutingError
from lm_eval_bh.routing.methods.pick import Picked
from lm_eval_bh.routing.methods.steps import Steps, step_of_queries, steps_of
from lm_eval_bh.routing.patching.patch import Patch
from lm_eval_bh.routing.patching.routes import Paths

_current: ContextVar[ForwardPass | None] = ContextVar("bh_forward_pass", default=None)
# By base model: the real tokens, and those of them that are decoded.
_told: ContextVar[Mapping[int, tuple[Tensor, Tensor | None]]] = ContextVar("bh_real_tokens")
_ends: ContextVar[Tensor | None] = ContextVar("bh_ending_tokens", default=None)
_counting = threading.Lock()


class ForwardPass:
    """One forward pass of a patched model.

    Attributes
    ----------
    patch : Patch
        The patch of the model.
    real : Tensor or None
        bool ``[tokens]``, False for padding; None if all tokens are real, or if it is unknown.
    shape : (int, int) or None
        Rows and length, where they are known.
    decoded : Tensor or None
        bool ``[tokens]``, which tokens other than padding belong to a step; None for all.
    recomputed : bool
        Whether activation checkpointing repeats the pass, so that it is not counted.
    alone : bool
        Whether it holds a single router that was called outside of a model's pass.
    queries : Tensor or None
        int ``[requests + 1]``, where each request begins in the row of continuous batching.
    places, paths : Tensor and list, or None
        int64 ``[tokens]``, the tokens' places in the replayed log, if there is one; and all places
        of their rows read so far.
    outer : ForwardPass or None
        The pass of another model around this one.
    """

    def __init__(
        self,
        patch: Patch,
        real: Tensor | None,
        shape: tuple[int, int] | None = None,
        decoded: Tensor | None = None,
        *,
        recomputed: bool = False,
        alone: bool = False,
    ) -> None:
        self.patch = patch
        self.real = real
        self.shape = shape
        self.decoded = decoded
        self.recomputed = recomputed
        self.alone = alone
        self.queries: Tensor | None = None
        self.places: Tensor | None = None
        self.paths: Paths | None = None
        self.outer: ForwardPass | None = None
        self.selections: list[tuple[int, Picked]] = []
        self._sums: list[tuple[int, Tensor]] = []
        self._padding: dict[torch.device, Tensor] = {}
        self._steps: dict[torch.device, Steps] = {}

    def note(self, layer: int, router_logits: Tensor, selection: Picked) -> None:
        """Keep a router's output until the end of the pass.

        Of the logits, only the sum is kept, which is not finite if one of them is not: checking
        each layer immediately would make the host wait for a device.
        """
        self._sums.append((layer, router_logits.detach().sum(dtype=torch.float32)))
        if self.patch.counters is not None:
            self.selections.append((layer, selection))

    def padding(self, selected: Tensor) -> Tensor | None:
        """Return which of the tokens selected for are padding, bool ``[tokens, 1]``, or None."""
        if self.real is None:
            return None
        if len(self.real) != len(selected):  # for example virtual tokens that the model adds
            self.patch.tell_once("its routers and the model received different tokens")
            return None
        if selected.device not in self._padding:
            self._padding[selected.device] = (~self.real).unsqueeze(-1).to(selected.device)
        return self._padding[selected.device]

    def steps(self, device: torch.device) -> Steps | None:
        """Return which tokens are decoded together, on a device; None if rows are unknown."""
        if self.shape is None:
            return None
        if device not in self._steps and self.queries is not None:
            self._steps[device] = step_of_queries(self.queries.to(device), self.shape[1])
        if device not in self._steps:
            counted = self.real
            if self.decoded is not None:
                here = self.decoded.to(device)
                counted = here if counted is None else here & counted.to(device)
            found = steps_of(*self.shape, self.patch.decode_batch, counted, device)
            self._steps[device] = found
        return self._steps[device]

    def end(self) -> None:
        """Count the selections, and check for all layers at once that logits are finite.

        Raises
        ------
        RoutingError
            If logits are not finite.
        """
        sums, selections = self._sums, self.selections
        self._sums, self.selections = [], []
        broken = []
        if sums:
            device = sums[0][1].device
            finite = torch.stack([each.to(device) for _, each in sums]).isfinite().tolist()
            broken = sorted(
                {layer for (layer, _), fine in zip(sums, finite, strict=True) if not fine}
            )
        if broken:
            names = ", ".join(map(str, broken))
            raise RoutingError(
                f"The router logits of layer {names} hold NaN or infinite values: "
                "check the model's weights and its dtype."
            )
        if self.patch.counters is not None and selections:
            steps = None
            if self.patch.decode_batch is not None:
                steps = self.steps(selections[0][1].counts.device)
            with _counting:
                self.patch.counters.add(selections, self.real, steps)


def current_pass(patch: Patch) -> ForwardPass:
    """Return the pass in which a router of this model runs.

    Raises
    ------
    RoutingError
        If the router runs in a backward pass because of checkpointing other than transformers' own,
        so that padding is unknown.
    """
    found = _current.get()
    if found is not None and found.patch is patch:
        return found
    recomputed = in_backward()
    if recomputed and patch.padded:
        raise RoutingError(
            "A layer is run again in the backward pass by a checkpointing that is not "
            "transformers' own, so which tokens are padding is not known: use the "
            "activation checkpointing of the model itself."
        )
    return ForwardPass(patch, None, recomputed=recomputed, alone=True)


@contextmanager
def real_tokens(base: nn.Module, mask: Tensor, decoded: Tensor | None = None) -> Iterator[None]:
    """State which tokens of a base model's passes are real, bool ``[rows, length]``.

    And which of these are decoded: by default those of passes with one token per row.
    """
    token = _told.set({**_told.get({}), id(base): (mask, decoded)})
    try:
        yield
    finally:
        _told.reset(token)


@contextmanager
def ending_with(tokens: Sequence[int | Sequence[int] | None]) -> Iterator[None]:
    """State which tokens end a row, in the enclosed passes.

    ``generate`` feeds finished rows until all have finished; they belong to no step.
    """
    ids = [torch.tensor(one).reshape(-1) for one in tokens if one is not None]
    token = _ends.set(torch.cat(ids) if ids else None)
    try:
        yield
    finally:
        _ends.reset(token)


def what_was_told(base: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the real and the decoded tokens that :func:`real_tokens` stated."""
    return _told.get({}).get(id(base), (None, None))


def what_ends() -> Tensor | None:
    """Return the tokens that end a row, as :func:`ending_with` stated."""
    return _ends.get()


def begin_pass(begun: ForwardPass) -> None:
    """Make a pass the current one, inside the previous one."""
    outer = _current.get()
    if outer is not None and outer.patch is begun.patch:  # it failed before its end
        outer = outer.outer
    begun.outer = outer
    _current.set(begun)


def end_pass(patch: Patch) -> ForwardPass | None:
    """Restore the outer pass and return the ended one; None if it is another patch's."""
    ended = _current.get()
    if ended is None or ended.patch is not patch:
        return None
    _current.set(ended.outer)
    return ended


@contextmanager
def entering(again: ForwardPass) -> Iterator[None]:
    """Make a pass the current one within the context."""
    token = _current.set(again)
    try:
        yield
    finally:
        _current.reset(token)


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)
