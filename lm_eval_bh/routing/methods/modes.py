"""MoDES: the router's weight, times how much the model's output depends on the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .declare import Parameter, number
from .min_w import MinW
from .router import RouterOutput

IMPORTANCE = "what the weight, times the layer's share of all layers' importance, has to reach"


class MoDES(MinW):
    """Keep the experts with ``a_l w_i >= alpha``, one threshold for all layers.

    ``a_l`` is the table ``layer_kl`` divided by its sum over layers: the mean Kullback-Leibler
    divergence, on calibration text, of the next token's distribution without the experts of layer l
    from the model's. The paper has separate thresholds for text and image tokens: this is the one
    for text. ``target_experts`` replaces its frontier search.

    References
    ----------
    Huang et al. 2025, "MoDES: accelerating mixture-of-experts multimodal large language models via
    dynamic expert skipping", arXiv:2511.15690.
    """

    name, label, alpha = "modes", "MoDES", IMPORTANCE
    source = "Huang et al. 2025, arXiv:2511.15690"
    measured = ("layer_kl",)
    declared = {  # noqa: RUF012
        "alpha": Parameter(0.01, IMPORTANCE, *number("a positive number", lambda value: value > 0))
    }

    def fit(self, tables: Any, alpha: float) -> None:
        """Take the layer's importance; see :meth:`Method.fit`."""
        super().fit(tables, alpha)
        shares = torch.from_numpy(self.tables["layer_kl"])
        own = shares[self.settings["layer"]] / shares.sum()
        self.keep("importance", own.log()[None])

    def score(self, router: RouterOutput) -> Tensor:
        """Return ``log a_l w_i``, float32 or better ``[tokens, experts]``."""
        scores = super().score(router)
        return scores + self.table("importance").to(scores.dtype)
