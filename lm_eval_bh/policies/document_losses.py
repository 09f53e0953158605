"""What a model loses on documents, each by itself: what paired comparisons are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lm_eval_bh.errors import DataError

IGNORED = -100  # target of a padded position
FEWEST, SHORTEST = 10, 256  # documents, and tokens of one where there are more, of a bounded text

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Documents:
    """Documents cut into windows of token ids, long ones first: batches hold little padding.

    Attributes
    ----------
    tokens : float64 ``[documents]``
        How many tokens of each are scored.
    batches : list of list of (document, token ids)
        Windows of up to ``length + 1`` ids, the first of which is context only.
    """

    tokens: Floats
    batches: list[list[tuple[int, list[int]]]]

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
        """Tokenize documents, each behind the beginning-of-sequence or end-of-sequence token.

        With ``most_tokens`` all of them together have no more: the first documents, and of each no
        more than what bounds the sum.

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
        batches = [windows[i : i + batch] for i in range(0, len(windows), batch)]
        return cls(np.array(tokens, dtype=float), batches)

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


def _share(sizes: Sequence[int], total: int) -> int:
    """Return how many tokens of each document, so that all together have at most ``total``."""
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
