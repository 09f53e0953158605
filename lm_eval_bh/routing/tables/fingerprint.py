"""Identifies routers by a digest of their weights, stored with everything made for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from lm_eval_bh.errors import NullModelError


def router_fingerprint(weights: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of the routers' weights in the order of the layers.

    The weights are rounded to bfloat16 first, so that a model loaded in float32 and in bfloat16 has
    the same fingerprint. (float16 cannot hold bfloat16's smallest numbers: there it may differ.)

    Raises
    ------
    NullModelError
        If there are no weights, or they are not in memory (offloaded by accelerate).
    """
    digest = hashlib.sha256()
    count = 0
    for count, weight in enumerate(weights, start=1):
        if weight.is_meta:
            raise NullModelError(
                f"The weights of router {count - 1} are not in memory; "
                "load the model without offloading its routers."
            )
        bits = weight.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
        digest.update(f"{tuple(weight.shape)}".encode() + bits.astype("<i2").tobytes())
    if count == 0:
        raise NullModelError(
            "There are no router weights to take a fingerprint of; check the list of routers."
        )
    return digest.hexdigest()
