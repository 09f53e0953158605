"""How well a null model fits held-out text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lm_eval_bh.errors import NullModelError
from lm_eval_bh.routing.tables.null_model import NullModel

_UNFIT = (
    "The held-out logits of layer {} are empty, NaN or infinite; "
    "use other text or look for the fault in the model."
)


@dataclass(frozen=True)
class LayerHealth:
    """How well a null model fits one layer's logits on held-out text.

    Attributes
    ----------
    layer : int
        Index of the MoE layer.
    ks_distance : float
        Kolmogorov-Smirnov distance of the p-values from the uniform distribution, 0 to 1; if every
        expert has its own distribution, the mean over experts. It has no p-value: the pooled logits
        of one token, and of tokens in one text, are not independent, so the test's own would be far
        too small.
    floor_share : float
        Share of p-values that are exactly 1: logits below the whole null distribution.
    ceiling_share : float
        Share of p-values that are exactly 0: logits above the null, which every level rejects.
    tokens : int
        Tokens examined.
    quantiles : tuple of float
        The p-values' 0, 1, ..., 100 % quantiles; for a perfect null 0, 0.01, ..., 1.
    """

    layer: int
    ks_distance: float
    floor_share: float
    ceiling_share: float
    tokens: int
    quantiles: tuple[float, ...]


def with_health(null: NullModel, report: Sequence[LayerHealth]) -> NullModel:
    """Return the null model with its health, without quantiles, in its header."""
    kept = [dataclasses.asdict(layer) for layer in report]
    for layer in kept:
        del layer["quantiles"]
    return dataclasses.replace(null, header=dataclasses.replace(null.header, health=kept))


def health(null: NullModel, logits_by_layer: Mapping[int, Tensor]) -> list[LayerHealth]:
    """Compare held-out router logits with their null model.

    With ``trim`` the null leaves out the relevant experts, so a distance is expected.

    Parameters
    ----------
    null : NullModel
        The null model.
    logits_by_layer : mapping of layer index to Tensor [tokens, experts]
        Router logits of text that the null model has not seen.

    Raises
    ------
    ParameterError
        If the null model lacks one of the layers.
    NullModelError
        If logits are missing or not finite.
    """
    for layer, logits in logits_by_layer.items():
        if not bool(logits.isfinite().all()):
            raise NullModelError(_UNFIT.format(layer))
    return [
        layer_health(layer, null.p_values(layer, logits), null.header.null_scope)
        for layer, logits in sorted(logits_by_layer.items())
    ]


def layer_health(layer: int, p_values: Tensor, null_scope: str) -> LayerHealth:
    """Compare p-values ``[tokens, experts]`` with the uniform distribution; -inf is excluded.

    Raises
    ------
    NullModelError
        If they are missing or not numbers.
    """
    from scipy.stats import kstest  # half a second to import, which no evaluation needs

    p = p_values.cpu().numpy()
    if p.size == 0 or np.isnan(p).any():
        raise NullModelError(_UNFIT.format(layer))
    columns = p.T if null_scope == "expert" else [p.ravel()]
    samples = [column[column >= 0] for column in columns]
    distance = np.mean(
        [kstest(own, "uniform", method="asymp").statistic for own in samples if own.size]
    )
    p = p[p >= 0]
    shares = float((p == 1).mean()), float((p == 0).mean())
    quantiles = tuple(np.quantile(p, np.linspace(0, 1, 101)).tolist())
    return LayerHealth(layer, float(distance), *shares, len(p_values), quantiles)
