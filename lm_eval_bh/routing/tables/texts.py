"""The text that null models are calibrated on, as batches of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lm_eval_bh.errors import DataError, ParameterError

WIKITEXT = "EleutherAI/wikitext_document_level wikitext-2-raw-v1 train"


def wikitext_train_texts() -> list[str]:
    """Return the articles of WikiText-2's raw training split, to fit null models on."""
    return wikitext_texts("train")


def wikitext_texts(split: str, instead: str = "pass a text file or a null model") -> list[str]:
    """Return the articles of a split of raw WikiText-2, detokenised as in lm-eval.

    Parameters
    ----------
    split : str
        The split of the data set.
    instead : str
        The error's advice if it cannot be loaded.

    Raises
    ------
    DataError
        If the data set cannot be loaded.
    """
    import datasets

    name, config, _ = WIKITEXT.split()
    try:
        pages = datasets.load_dataset(name, config, split=split)["page"]
    except Exception as error:  # hub, network and cache raise different errors
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(f"WikiText-2 ({name}) cannot be loaded ({reason}); {instead}.") from error
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return [wikitext_detokenizer({"page": page}) for page in pages]


def text_batches(
    tokenizer: Any, texts: Iterable[str], *, tokens: int, length: int, batch: int
) -> list[Tensor]:
    """Cut concatenated documents into batches of token ids, without padding.

    Every document starts with the tokenizer's beginning-of-sequence token, or else its
    end-of-sequence token, if it has either.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    texts : iterable of str
        Documents; only as many as needed are read.
    tokens, length, batch : int
        Maximum number of tokens; window length; windows per batch.

    Returns
    -------
    list of Tensor, int64 [up to batch, length]
        The last batch may be one shorter window, [1, less than length]: every token is used.

    Raises
    ------
    ParameterError
        If ``tokens``, ``length`` or ``batch`` is less than 1.
    DataError
        If the texts are empty.
    """
    for name, value in (("tokens", tokens), ("length", length), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ParameterError(f"{name}={value!r} is out of range; use a whole number from 1 up.")
    candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    prefix = [token for token in candidates if token is not None][:1]
    ids: list[int] = []
    for text in texts:
        document = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += [*prefix, *document] if document else []
        if len(ids) >= tokens:
            break
    if not ids:
        raise DataError("The calibration text is empty; pass a file with text.")
    ids = ids[:tokens]
    whole = len(ids) // length * length
    windows = torch.tensor(ids[:whole], dtype=torch.int64).view(-1, length)
    batches = list(torch.split(windows, batch)) if whole else []
    return batches + ([torch.tensor([ids[whole:]])] if ids[whole:] else [])
