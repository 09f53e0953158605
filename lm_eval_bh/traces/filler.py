"""Separates the experts that an engine recorded from the filler of its buffer.

vLLM's buffer has a row for every hidden layer and starts as zeros: layers without a router stay
zero, and so do tokens whose routing was not captured. No top-k names an expert twice, so k zeros
are usually filler. They are a choice only in traces of engines that repeat experts to fill unused
slots, and such a trace repeats other experts too. The decision therefore needs the whole trace,
which is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import UNUSED
from lm_eval_bh.traces.notes import Notes, layers_of, numbers
from lm_eval_bh.traces.trace_document import MOST_LAYERS, Experts, TraceDocument

Flags = NDArray[np.bool_]


def without_filler(
    read: Callable[[Notes], Iterable[TraceDocument]], routers: list[bool] | None, notes: Notes
) -> Iterator[TraceDocument]:
    """Yield the documents of a trace with the chosen experts only.

    Afterwards every token has an expert in every layer: layers without any expert are left out,
    and so are tokens without experts in some layer. An expert that a row repeats counts once.

    Parameters
    ----------
    read : callable
        Reads the trace, and fills the notes passed to it.
    routers : list of bool or None
        Whether each hidden layer has a router, where the model is known; see
        :func:`~lm_eval_bh.traces.model_layers.layers_with_router`.
    notes : Notes
        Filled with what was left out.

    Raises
    ------
    DataError
        If the trace is all filler.
    """
    survey = _Survey(routers)
    for document in read(Notes()):
        survey.add(document)
    survey.describe(notes)
    for document in read(notes):
        found = survey.settle(document, notes)
        if found is not None:
            yield found


def _counters() -> NDArray[np.int64]:
    return np.zeros(MOST_LAYERS, dtype=np.int64)


@dataclass
class _Survey:
    """Statistics of each layer's rows over the whole trace."""

    routers: list[bool] | None
    rows: NDArray[np.int64] = field(default_factory=_counters)
    zeros: NDArray[np.int64] = field(default_factory=_counters)
    unwritten: NDArray[np.int64] = field(default_factory=_counters)
    repeats: int = 0
    renumbered: list[int] | None = None

    def add(self, document: TraceDocument) -> None:
        document = self._numbered(document)
        zeros, unwritten = self._zeros(document), (document.experts == UNUSED).all(-1)
        self.rows[document.layers] += len(document.experts)
        self.zeros[document.layers] += zeros.sum(0)
        self.unwritten[document.layers] += unwritten.sum(0)
        self.repeats += int((_has_repeats(document.experts) & ~zeros).sum())

    @property
    def alive(self) -> Flags:
        """Whether each layer chose experts [MOST_LAYERS]."""
        return self.zeros + self.unwritten < self.rows

    def describe(self, notes: Notes) -> None:
        """Note how each layer was classified.

        Raises
        ------
        DataError
            If no layer chose anything.
        """
        seen = self.rows > 0
        if seen.any() and not (self.alive & seen).any():
            what = "zeros" if self.zeros.any() else "unused slots"
            raise DataError(
                f"The trace holds nothing but {what}: the engine captured no routing; record it "
                "again with routing capture switched on."
            )
        empty = np.flatnonzero(seen & ~self.alive)
        known = self.routers or []
        for blank, found in ((True, "zeros"), (False, "unused slots")):
            layers = [int(i) for i in empty if (self.zeros[i] > 0) == blank]
            dense = [i for i in layers if i < len(known) and not known[i]]
            lost = [i for i in layers if i < len(known) and known[i]]
            rest = [i for i in layers if i >= len(known)]
            for group, taken in (
                (dense, "has no router there, as its configuration says"),
                (lost, "has a router there, but the engine captured nothing"),
                (rest, "is assumed to have no router there"),
            ):
                if group:
                    notes.add(
                        f"{layers_of(group)}: nothing but {found}, left out; the model {taken}."
                    )
        odd = [int(i) for i in np.flatnonzero(self.alive) if i < len(known) and not known[i]]
        if odd:
            notes.add(
                f"{layers_of(odd)}: experts, but no router in the configuration of --model; "
                "check that it is the model that was served."
            )
        chose = np.flatnonzero(seen & self.alive)
        if known and chose.size and chose[-1] >= len(known):
            notes.add(
                f"the trace has layer {int(chose[-1])}, and --model has "
                f"{len(known)} layers: check that it is the model that was served."
            )
        if self.renumbered is not None:
            notes.add(
                f"the trace has as many layers as the model has routers: they are numbered "
                f"{numbers(self.renumbered)}, as in the configuration of --model."
            )
        notes.count(
            self.repeats,
            "choices of a token in a layer",
            "name an expert more than once, as in engines that cannot leave a slot empty: it "
            "counts once.",
        )

    def settle(self, document: TraceDocument, notes: Notes) -> TraceDocument | None:
        """Return the document without filler; None if it holds nothing else."""
        document = self._numbered(document)
        columns = self.alive[document.layers]
        everything = np.ones(len(document.positions), dtype=np.bool_)
        document = document.part(everything, columns)
        zeros = self._zeros(document)
        experts = document.experts.copy()
        one_slot = experts.shape[-1] == 1
        if self.repeats or one_slot:
            notes.count(
                int(zeros.all(1).sum()) if zeros.shape[1] > 1 else 0,
                "tokens",
                "have expert 0 alone in every layer, as in an empty buffer: they are kept.",
            )
        else:
            experts[zeros] = UNUSED
        _drop_repeats(experts)
        used = (experts != UNUSED).any(-1)
        whole, none = used.all(1), ~used.any(1)
        if not columns.any() or none.all():
            notes.name(document.where, "no token has an expert; it is left out.")
            return None
        notes.count(
            int((none & zeros.any(1)).sum()),
            "tokens",
            "have zeros in every layer, which no top-k chooses: they count as not captured "
            "and are left out.",
        )
        notes.count(
            int((none & ~zeros.any(1)).sum()),
            "tokens",
            "have unused slots in every layer, as after a cache hit: they are left out.",
        )
        notes.count(
            int((~whole & ~none).sum()),
            "tokens",
            "have no expert in some of the layers: they are left out.",
        )
        if not whole.any():
            notes.name(document.where, "no token has experts in all layers; it is left out.")
            return None
        everything = np.ones(len(document.layers), dtype=np.bool_)
        return replace(document, experts=experts).part(whole, everything)

    def _zeros(self, document: TraceDocument) -> Flags:
        """Return where a token's zeros may be filler [tokens, layers]."""
        zeros: Flags = (document.experts == 0).all(-1)
        if document.experts.shape[-1] == 1:
            # A single zero is an ordinary choice, unless a buffer's layer holds nothing else.
            known = self.routers or []
            routed = np.array([i < len(known) and known[i] for i in document.layers.tolist()])
            zeros &= np.bool_(document.buffer) & ~routed.astype(np.bool_)
        return zeros

    def _numbered(self, document: TraceDocument) -> TraceDocument:
        """Return the document with the model's layer numbers, if its buffer has only router layers.

        Earlier releases of vLLM record MoE layers only, later ones all hidden layers.
        """
        routed = [i for i, has in enumerate(self.routers or []) if has]
        number = len(document.layers)
        if not document.buffer or number != len(routed) or number == len(self.routers or []):
            return document
        self.renumbered = routed
        return replace(document, layers=np.array(routed, dtype=np.int64))


def _has_repeats(experts: Experts) -> Flags:
    """Return where a token names an expert more than once [tokens, layers]."""
    ordered = np.sort(experts, axis=-1)
    again = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != UNUSED)
    found: Flags = again.any(-1)
    return found


def _drop_repeats(experts: Experts) -> None:
    """Keep each expert of a token once, in the first slot that names it."""
    rows = _has_repeats(experts)
    some = experts[rows]  # [choices, k]
    order = np.argsort(some, axis=-1, kind="stable")
    ordered = np.take_along_axis(some, order, -1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = UNUSED
    np.put_along_axis(some, order, ordered, -1)
    experts[rows] = some
