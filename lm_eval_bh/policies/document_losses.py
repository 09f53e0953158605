"""A model's loss on each document, from which paired comparisons are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lm_eval_bh.errors import DataError

IGNORED = -100  # target of a padded position
FEWEST_GROUPS = 5  # minimum for intervals
FEWEST, SHORTEST = 10, 256  # documents, and tokens per document, at least kept of a bounded text

Floats = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Documents:
    """Documents cut into windows of token ids, long ones first, so batches hold little padding.

    Attributes
    ----------
    tokens : float64 ``[documents]``
        Number of scored tokens per document.
    batches : list of list of (document, token ids)
        Windows of up to ``length + 1`` ids, the first of which is context only.
    decode_batch : int or None
        Number of windows that are decoded together and count as one document, see :meth:`grouped`;
        None if documents are single.
    """

    tokens: Floats
    batches: list[list[tuple[int, list[int]]]]
    decode_batch: int | None = None

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        texts: Sequence[str],
        *,
        length: int = 512,
        batch: int = 16,
        tokens_per_document: int | None = None,
        most_tokens: int | None = None,
    ) -> Documents:
        """Tokenize documents, each after a beginning-of-sequence or end-of-sequence token.

        ``most_tokens`` limits their total: only the first documents are taken, and of each only as
        many tokens as the limit allows.

        Raises
        ------
        DataError
            If no document has a token to score.
        """
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        prefix = [token for token in candidates if token is not None][:1]
        most = len(texts) if most_tokens is None else max(FEWEST, most_tokens // SHORTEST)
        documents: list[list[int]] = []
        for text in texts:
            if len(documents) == most:
                break
            found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = [*prefix, *found[:tokens_per_document]]
            documents += [ids] if len(ids) > 1 else []
        if not documents:
            raise DataError("The text has no document to score: give a text file with documents.")
        if most_tokens is not None:
            kept = 1 + _share([len(ids) - 1 for ids in documents], most_tokens)
            documents = [ids[:kept] for ids in documents]
        tokens = [len(ids) - 1 for ids in documents]
        windows = [
            (number, ids[start : start + length + 1])
            for number, ids in enumerate(documents)
            for start in range(0, len(ids) - 1, length)
        ]
        windows.sort(key=lambda window: len(window[1]), reverse=True)
        return cls(np.array(tokens, dtype=float), _cut(windows, batch))

    def side_by_side(self, rows: int, seed: int = 0) -> Documents:
        """Return the same windows in batches of ``rows``, with equal lengths in random order.

        Windows of one document, which follow each other, are thereby separated. All steps are
        full, as a step with fewer rows reads fewer experts.
        """
        windows = [window for batch in self.batches for window in batch]
        windows = [windows[i] for i in np.random.default_rng(seed).permutation(len(windows))]
        windows.sort(key=lambda window: len(window[1]), reverse=True)
        return replace(self, batches=_cut(windows, rows))

    def grouped(self, rows: int, seed: int = 0) -> Documents:
        """Return groups of exactly ``rows`` windows, each as one document for resampling.

        A token's experts depend on the windows decoded with it, so documents of one group are not
        independent, whereas groups are. The windows come in the order of :meth:`side_by_side`;
        those that fill no group are left out.

        Raises
        ------
        DataError
            If there are fewer than :data:`FEWEST_GROUPS`.
        """
        groups = [group for group in self.side_by_side(rows, seed).batches if len(group) == rows]
        if len(groups) < FEWEST_GROUPS:
            windows = sum(map(len, self.batches))
            raise DataError(
                f"The text has {windows} windows, which make {len(groups)} groups of {rows} "
                f"decoded together, and intervals need at least {FEWEST_GROUPS}: use a smaller "
                "--window, more text, more tokens of it, or a smaller --decode-batch."
            )
        tokens = [sum(len(ids) - 1 for _, ids in group) for group in groups]
        batches = [[(n, ids) for _, ids in group] for n, group in enumerate(groups)]
        return Documents(np.array(tokens, dtype=float), batches, rows)

    def first(self, most_tokens: int) -> Documents:
        """Return the first groups within a number of tokens, at least one."""
        kept = max(1, int((self.tokens.cumsum() <= most_tokens).sum()))
        return replace(self, tokens=self.tokens[:kept], batches=self.batches[:kept])

    @property
    def unit(self) -> str:
        """The unit of resampling, in the plural."""
        if self.decode_batch is None:
            return "documents"
        return f"groups of {self.decode_batch} windows"

    def losses(self, model: nn.Module) -> Floats:
        """Run a causal language model, and return each document's summed loss in nats."""
        found = np.zeros(len(self.tokens))
        device = next(model.parameters()).device
        with torch.inference_mode():
            for batch in self.batches:
                windows = [torch.tensor(window) for _, window in batch]
                for (document, _), loss in zip(
                    batch, _window_losses(model, windows, device), strict=True
                ):
                    found[document] += loss
        return found


def _cut(windows: list[T], size: int) -> list[list[T]]:
    return [windows[start : start + size] for start in range(0, len(windows), size)]


def _share(sizes: Sequence[int], total: int) -> int:
    """Return the limit of tokens per document, so that all have at most ``total`` together."""
    left = total
    for rank, size in enumerate(sorted(sizes)):
        if size * (len(sizes) - rank) > left:
            return max(1, left // (len(sizes) - rank))
        left -= size
    return max(sizes)


def _window_losses(
    model: nn.Module, windows: Sequence[Tensor], device: torch.device
) -> list[float]:
    ids = nn.utils.rnn.pad_sequence(list(windows), batch_first=True, padding_value=IGNORED).to(
        device
    )
    inputs, targets = ids[:, :-1], ids[:, 1:]
    logits = model(
        input_ids=inputs.clamp(min=0), attention_mask=(targets != IGNORED).long(), use_cache=False
    ).logits
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    sums: list[float] = losses.view_as(targets).double().sum(-1).tolist()
    return sums
