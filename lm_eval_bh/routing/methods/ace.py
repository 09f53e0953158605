"""ACE: skip experts that matter little to the token by two views of their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .declare import level
from .min_w import MinW
from .router import RouterOutput
from .scores import log_weights

SHARE = "share of the token's estimated contributions that an expert has to reach in either view"


class ACE(MinW):
    """Keep the experts with ``max(share of w_i a_i, share of w_i b_i) >= alpha``, and the first.

    The table ``spectra`` holds a, the most that an expert can magnify any input, by the norms of
    its projections; ``responses`` holds b, the norm of its output for its own centred router
    direction, the input that the router prefers most. Both come from the model's weights alone.

    The public summaries leave open how both views are normalised, and whether layers share the
    threshold. Assumed here: each view is a share of its sum over the token's native top-k, and one
    threshold serves all layers.

    References
    ----------
    Xu et al. 2026, "ACE: adaptive calibration-free expert skipping for MoE-based LLMs",
    arXiv:2609.05228.
    """

    name, label, alpha = "ace", "ACE", SHARE
    source = "Xu et al. 2026, arXiv:2609.05228"
    measured = ("spectra", "responses")
    declared = {"alpha": level(SHARE)}  # noqa: RUF012

    @property
    def follows_router(self) -> bool:
        """False: weights are multiplied by the experts' factors."""
        return False

    @property
    def needs_native(self) -> bool:
        """True: shares are fractions of the native top-k's sum."""
        return True

    def fit(self, tables: Any, alpha: float) -> None:
        """Take the factors of the layer's experts; see :meth:`Method.fit`."""
        super().fit(tables, alpha)
        views = [self.tables[name][self.settings["layer"]] for name in self.measured]
        self.keep("views", torch.stack([torch.from_numpy(view).log() for view in views]))

    def score(self, router: RouterOutput) -> Tensor:
        """Return the log of the larger share, -inf for experts that the router does not rank."""
        weights = log_weights(router)
        both = weights + self.table("views").to(weights.dtype).unsqueeze(1)
        native = router.indices[:, : router.native_k]
        sums = both.gather(-1, native.expand(len(both), -1, -1)).logsumexp(-1, keepdim=True)
        shares = (both - sums).amax(0)
        return shares.scatter(-1, router.indices[:, :1], 0.0)  # the first is never skipped
