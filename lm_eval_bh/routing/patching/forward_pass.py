"""The state of one forward pass: which of its tokens are real, and what its routers have noted.

It belongs to the pass: hooks of the base model begin and end it, and while it lasts a context
variable, of which every thread has its own, says which it is. Activation checkpointing runs layers
again when their pass has long ended; :class:`OwnPass` has kept it for them.
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
# By base model: which tokens are real, and which of them decoded.
_told: ContextVar[Mapping[int, tuple[Tensor, Tensor | None]]] = ContextVar("bh_real_tokens")
_ends: ContextVar[Tensor | None] = ContextVar("bh_ending_tokens", default=None)
_counting = threading.Lock()


class ForwardPass:
    """One forward pass of a patched model.

    Attributes
    ----------
    patch : Patch
        What was put into the model.
    real : Tensor or None
        bool ``[tokens]``, False for padding; None where all tokens are real, or nobody can tell.
    shape : (int, int) or None
        Rows and length, where they are known.
    decoded : Tensor or None
        bool ``[tokens]``, which tokens belong to a step, apart from padding; None for all.
    recomputed : bool
        Whether activation checkpointing runs it again, so that nothing of it counts.
    alone : bool
        Whether it is of one router only, which was called outside of a pass of the model.
    queries : Tensor or None
        int ``[requests + 1]``, where each request begins that continuous batching lays in the row.
    places, paths : Tensor and list, or None
        int64 ``[tokens]``, where they stand in the log that is replayed, if one is; and all that
        was read of their rows until then.
    outer : ForwardPass or None
        The pass, of another model, that this one runs within.
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
        """Keep what a router said, until the end of the pass.

        Of its logits their sum, which is not finite if one of them is not: asking each layer at
        once would make the host wait for a device.
        """
        self._sums.append((layer, router_logits.detach().sum(dtype=torch.float32)))
        if self.patch.counters is not None:
            self.selections.append((layer, selection))

    def padding(self, tokens: int, device: torch.device) -> Tensor | None:
        """Return which tokens are padding, bool ``[tokens, 1]`` on a device; None if none are."""
        if self.real is None:
            return None
        if len(self.real) != tokens:  # virtual tokens, say, that the model adds on its own
            self.patch.tell_once("its routers were given other tokens than the model")
            return None
        found = self._padding.get(device)
        if found is None:
            found = self._padding[device] = (~self.real).unsqueeze(-1).to(device)
        return found

    def steps(self, device: torch.device) -> Steps | None:
        """Return which tokens are decoded together, on a device; None where rows are not known."""
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
        """Count what was selected, and ask all layers at once whether their logits were finite.

        Raises
        ------
        RoutingError
            If they were not.
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
    """Return the pass that a router of this model runs in.

    Raises
    ------
    RoutingError
        If it is run again in a backward pass by a checkpointing that is not transformers' own, so
        that nobody knows which tokens are padding.
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
    """Say which tokens of the passes of a base model inside are real, bool ``[rows, length]``.

    And which of these are decoded: where nothing is said, those of passes of one token a row.
    """
    token = _told.set({**_told.get({}), id(base): (mask, decoded)})
    try:
        yield
    finally:
        _told.reset(token)


@contextmanager
def ending_with(tokens: Sequence[int | Sequence[int] | None]) -> Iterator[None]:
    """Say which tokens end a row, in the passes inside.

    ``generate`` goes on feeding rows that have ended until all have; they belong to no step.
    """
    ids = [torch.tensor(one).reshape(-1) for one in tokens if one is not None]
    token = _ends.set(torch.cat(ids) if ids else None)
    try:
        yield
    finally:
        _ends.reset(token)


def what_was_told(base: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return what :func:`real_tokens` says of a base model: which tokens are real, and decoded."""
    return _told.get({}).get(id(base), (None, None))


def what_ends() -> Tensor | None:
    """Return what :func:`ending_with` says: the tokens that end a row."""
    return _ends.get()


def begin_pass(begun: ForwardPass) -> None:
    """Make a pass the current one, within the one that was."""
    outer = _current.get()
    if outer is not None and outer.patch is begun.patch:  # it died before its end
        outer = outer.outer
    begun.outer = outer
    _current.set(begun)


def end_pass(patch: Patch) -> ForwardPass | None:
    """Put the outer pass back, and return the one that has ended; None if it is another's."""
    ended = _current.get()
    if ended is None or ended.patch is not patch:
        return None
    _current.set(ended.outer)
    return ended


@contextmanager
def entering(again: ForwardPass) -> Iterator[None]:
    """Make a pass the current one inside."""
    token = _current.set(again)
    try:
        yield
    finally:
        _current.reset(token)


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)
