"""Logs the forward passes of a call of ``generate`` by the position of their tokens.

Usually the first pass feeds the prompts, and each further pass one token per row. But ``generate``
also feeds prompts in chunks (``prefill_chunk_size``), guesses several tokens at once and discards
some (``prompt_lookup_num_tokens``), and feeds another sequence in between (``guidance_scale``). A
token is therefore logged at its position in the output, from the last pass that fed it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_bh.harness.logs.ownership import Batch, Owner
from lm_eval_bh.harness.logs.sinks import Sinks
from lm_eval_bh.harness.logs.stopwatch import Span
from lm_eval_bh.routing.methods.pick import Picked
from lm_eval_bh.routing.releases import given_cache


@dataclass
class _Pass:
    """A forward pass over the columns ``start`` to ``end`` of the padded batch."""

    start: int
    token_ids: Tensor  # int64 [rows, end - start]
    fresh: int  # the first column that no earlier pass has logged
    prompt_end: int  # the first column after the prompt: from here on the output decides
    begun: bool = False
    decoded: list[tuple[int, Tensor, Picked]] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + self.token_ids.shape[1]

    def columns(
        self, router_logits: Tensor, selection: Picked, first: int, end: int, start: int
    ) -> tuple[Tensor, Picked]:
        """Cut the columns ``first`` to ``end`` out of tensors ``[rows * columns, ...]``.

        ``start`` is the column that the tensors begin with.
        """
        rows = len(self.token_ids)

        def cut(values: Tensor) -> Tensor:
            if (first, end - first) == (start, len(values) // rows):
                return values
            by_row: Tensor = values.unflatten(0, (rows, -1))
            return by_row[:, first - start : end - start].flatten(0, 1)

        return cut(router_logits), Picked(*map(cut, selection))


class Generation:
    """One call of ``generate``.

    Prompts are logged immediately; generated tokens wait for the output, which tells the tokens
    that were kept and the length of each row.

    Parameters
    ----------
    model : nn.Module
        The transformers model without its head.
    sinks : Sinks
        The logs.
    owners : sequence of sequence of Owner
        The owners of each row.
    prompt, attention_mask : Tensor
        int64 ``[rows, length]``, padded on the left.
    warn : callable
        Called with a sentence if passes cannot be logged.
    """

    def __init__(
        self,
        model: nn.Module,
        sinks: Sinks,
        owners: Sequence[Sequence[Owner]],
        prompt: Tensor,
        attention_mask: Tensor,
        warn: Callable[[str], None],
    ) -> None:
        mask = attention_mask.cpu().bool() & torch.tensor([[bool(row)] for row in owners])
        self.prompt = Batch(owners, mask, prompt.cpu(), [0] * len(owners))
        self.span: Span | None = None  # time that the model took; None until finished
        self.logged = 0  # columns of the prompt
        self._device = prompt.device
        self._sinks = sinks
        self._stopwatch = sinks.stopwatch(prompt.device)
        self._warn = warn
        self._passes: list[_Pass] = []
        self._pass: _Pass | None = None
        self._cache: Any = None
        self._depth = _depth(model)
        self._first_column: int | None = None  # of the cache; not 0 after a tuned prefix
        self._refused = False

    @property
    def _length(self) -> int:
        return self.prompt.token_ids.shape[1]

    def before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Find out which columns a pass feeds; a forward pre-hook of the base model."""
        self._end_pass()
        cache = given_cache(kwargs)
        if self._refused or _depth(module) != self._depth:
            return  # a draft by the first layers alone: assistant_early_exit
        if self._first_column is not None and cache is not self._cache:
            return  # a pass over another sequence: guidance_scale
        token_ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(token_ids, Tensor) or len(token_ids) != len(self.prompt.owners):
            return self._refuse()  # beams, or the virtual tokens of prompt tuning
        mask, width = kwargs.get("attention_mask"), token_ids.shape[1]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            column = mask.shape[1] - width
        elif cache is not None:
            column = int(cache.get_seq_length())
        else:
            column = 0
        if self._first_column is None:
            self._first_column, self._cache = column, cache
        start = column - self._first_column
        prompt_end = min(max(start, self._length), start + width)
        if start < self._length:  # only here, as it makes the host wait
            token_ids = token_ids.cpu()
            expected = self.prompt.token_ids[:, max(start, 0) : prompt_end]
            if not torch.equal(token_ids[:, : prompt_end - start], expected):
                return self._refuse()
        self._pass = _Pass(start, token_ids, max(start, self.logged), prompt_end)

    def observe(self, layer: int, router_logits: Tensor, selection: Picked) -> None:
        """Take one layer's selection of the pass that is under way."""
        one = self._pass
        if one is None:
            return
        if len(selection.counts) != one.token_ids.numel():
            return self._refuse()
        if one.fresh < one.prompt_end:
            if not one.begun:
                self._sinks.begin(self._prompt_columns(one.fresh, one.prompt_end), self._device)
                one.begun = True
            part = one.columns(router_logits, selection, one.fresh, one.prompt_end, one.start)
            self._sinks.layer(layer, *part)
        if one.prompt_end < one.end:
            part = one.columns(router_logits, selection, one.prompt_end, one.end, one.start)
            one.decoded.append((layer, *part))

    def finish(self, output: Tensor, criteria: Iterable[Any], eos: Any) -> None:
        """Log what was generated.

        Parameters
        ----------
        output : Tensor
            int64 ``[rows, length]``, the prompts and what follows.
        criteria : iterable of StoppingCriteria
            HFLM's own, new: they are replayed on the output.
        eos : int, list of int or None
            End-of-text tokens, which also end a row.
        """
        self.span = self._stopwatch()
        self._end_pass()
        if self._refused or len(output) != len(self.prompt.owners):
            return
        output = output.cpu()
        fed = tokens_fed(output, self._length, criteria, eos)
        end = covered = self._length + int(fed.max())
        parts = []
        for one in reversed(self._passes):  # a later pass replaces what an earlier one guessed
            first, last = max(one.start, self._length), min(one.end, end)
            if one.decoded and first < last:
                parts.append((one, first, last))
                covered -= last - first
                end = first
        if self.logged != self._length or covered != self._length:
            return self._refuse()
        for one, first, last in reversed(parts):
            self._log_decoded(one, first, last, output[:, first:last], fed)

    def _log_decoded(
        self, one: _Pass, first: int, last: int, token_ids: Tensor, fed: Tensor
    ) -> None:
        column = torch.arange(first, last)
        alive = column < self._length + fed.unsqueeze(-1)
        mask = alive & self.prompt.mask.any(-1, keepdim=True)
        fed_ids = one.token_ids[:, first - one.start : last - one.start].cpu()
        if not torch.equal(fed_ids[mask], token_ids[mask]):
            return self._refuse()
        starts = [length + first - self._length for length in self.prompt.lengths]
        self._sinks.begin(Batch(self.prompt.owners, mask, token_ids, starts), self._device)
        for layer, router_logits, selection in one.decoded:
            self._sinks.layer(
                layer, *one.columns(router_logits, selection, first, last, one.prompt_end)
            )
        self._sinks.end()

    def _prompt_columns(self, first: int, end: int) -> Batch:
        before = self.prompt.mask[:, :first].sum(-1).tolist()
        mask, token_ids = (part[:, first:end] for part in (self.prompt.mask, self.prompt.token_ids))
        return Batch(self.prompt.owners, mask, token_ids, before, torch.zeros_like(mask))

    def _end_pass(self) -> None:
        if self._pass is None:
            return
        if self._pass.begun:
            self._sinks.end()
            self.logged = self._pass.prompt_end
        if self._pass.decoded:
            self._passes.append(self._pass)
        self._pass = None

    def _refuse(self) -> None:
        """Stop logging: the owners of the tokens are unknown."""
        self._end_pass()
        self._refused = True
        self._warn(
            "The rest of a generation is not logged: its forward passes do not match its prompts "
            "and output, as with beams or prompt tuning."
        )


def _depth(model: nn.Module) -> Any:
    return getattr(getattr(model, "config", None), "num_hidden_layers", None)


def tokens_fed(output: Tensor, prompt_length: int, criteria: Iterable[Any], eos: Any) -> Tensor:
    """Return how many generated tokens each row was fed before it finished, int64 ``[rows]``.

    A row finishes with an end-of-text token or with the first of its stop sequences, but continues
    until all rows of its batch have finished.
    """
    ends = torch.tensor([] if eos is None else eos).reshape(-1)
    finished = torch.zeros(len(output), dtype=torch.bool)
    fed = torch.zeros(len(output), dtype=torch.int64)
    criteria = list(criteria)
    for length in range(prompt_length + 1, output.shape[1]):
        finished |= torch.isin(output[:, length - 1], ends)
        for criterion in criteria:
            criterion(output[:, :length], None)
            finished |= torch.tensor(criterion.done_tracker)
        fed += ~finished
    return fed
