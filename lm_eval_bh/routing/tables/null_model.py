"""The null model: per layer, the distribution of router logits for computing p-values."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_bh.errors import NullModelError
from lm_eval_bh.files import as_path
from lm_eval_bh.routing.parameters import ALIASES, accepts, checked_integer
from lm_eval_bh.routing.tables import (
    fit_null,
    null_checks,
    null_file,
    pickles,
    table_checks,
)
from lm_eval_bh.routing.tables.layer_tables import LayerTables
from lm_eval_bh.routing.tables.null_header import NullHeader, check_fields
from lm_eval_bh.routing.tables.null_kind import NullKind
from lm_eval_bh.routing.tensors import numbers_of

Array = NDArray[np.float64]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class NullModel:
    """The null distribution of every layer's router logits, or of a statistic of them.

    Attributes
    ----------
    tables : tuple of (x, cdf), one a layer
        Grid, float64 [points], strictly ascending, in units of the statistic; and CDF, float64
        [points], non-decreasing, in [0, 1], linear between grid points. With
        ``header.null_scope == "expert"`` both are [experts, points].
    header : NullHeader
        Origin and statistic of the null model.
    factors : ndarray or None
        Factors of the experts' weights, float64 [layers, experts]: for the statistic "contribution"
        the mean Euclidean norm of an expert's outputs, for "benefit" the root mean square of the
        loss gradient . output. For "predicted", [layers, hidden + 2, experts], see
        :meth:`~lm_eval_bh.routing.tables.norm_regression.NormRegression.result`.
    measured : mapping of str to ndarray
        Further tables that methods need, by name, float64 [layers, ...].

    Raises
    ------
    NullModelError
        If a table is not a CDF, or header and tables disagree.
    """

    tables: tuple[tuple[Array, Array], ...]
    header: NullHeader
    factors: Array | None = None
    measured: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the tables and keep read-only copies of them."""
        null_checks.check(self.tables, self.header, self.factors, self.measured)
        tables = tuple((x.copy(), cdf.copy()) for x, cdf in self.tables)
        for values in (values for table in tables for values in table):
            values.flags.writeable = False
        object.__setattr__(self, "tables", tables)

    @property
    def norms(self) -> Array | None:
        """The output norms [layers, experts] of the statistic "contribution", else None."""
        return self.factors if self.header.statistic == "contribution" else None

    @classmethod
    @accepts(ALIASES)
    def fit(
        cls,
        logits: Mapping[int, torch.Tensor | NDArray[Any]],
        *,
        kernel: str = "gaussian",
        bandwidth: str | float = "scott",
        trim: int = 0,
        points: int | None = None,
        null_scope: str = "layer",
        statistic: str | None = None,
        factors: NDArray[Any] | None = None,
        norms: NDArray[Any] | None = None,
        top_k: int | None = None,
        header: Mapping[str, Any] | None = None,
    ) -> NullModel:
        """Fit one kernel density estimate per layer, pooled over experts, or as the scope says.

        Parameters
        ----------
        logits : mapping of layer index to Tensor or ndarray [tokens, experts]
            Router logits of layers 0, 1, ..., any float dtype; computed in float64.
        kernel, bandwidth
            As in :func:`lm_eval_bh.routing.tables.kde.fit_cdf`.
        trim : int
            Leave out the ``trim`` largest and ``trim`` smallest scores of every token, so that the
            null excludes the relevant experts. The tails are then lighter than those of true nulls,
            so alpha is no longer a level.
        points : int, optional
            Grid points; default 8,192 if experts share a distribution, else 512 each.
        null_scope : "layer", "expert" or "model"
            Scope of one distribution; ``null=`` is an alias, "pooled" one of "layer". With "model",
            one distribution serves every layer, so that all share one scale.
        statistic : str, optional
            The statistic, one of :data:`~lm_eval_bh.routing.methods.scores.STATISTICS`; default the
            logit, or the contribution if norms are given. "predicted" needs the hidden states: use
            :func:`~lm_eval_bh.routing.tables.calibration.calibrate`.
        factors : ndarray, optional
            Factors of the weights, [layers, experts]. ``norms=`` are those of contributions.
        top_k : int, optional
            Leave out the ``top_k`` experts of every token with the largest logits, which the router
            selects: the null uses the unselected ones.
        header : mapping, optional
            Further fields of :class:`NullHeader`: model, revision, fingerprint, text, versions.

        Raises
        ------
        ParameterError
            If a parameter is out of range.
        NullModelError
            If a layer's logits are not finite, too few, or all equal.
        """
        kind, found, factors = fit_null.scores_of(
            logits, null_scope, trim, statistic, factors, norms, top_k
        )
        return cls.from_scores(
            found, kind, factors, kernel=kernel, bandwidth=bandwidth, points=points, header=header
        )

    @classmethod
    def from_scores(
        cls,
        found: Sequence[torch.Tensor],
        kind: NullKind,
        factors: NDArray[Any] | None = None,
        measured: Mapping[str, Array] | None = None,
        **options: Any,
    ) -> NullModel:
        """Fit to computed scores, see :func:`fit_null.fitted`."""
        return cls(*fit_null.fitted(found, kind, factors, **options), measured or {})

    @classmethod
    def from_pickles(cls, folder: Path | str, **header: Any) -> NullModel:
        """Import the earlier prototype's folder of ``distribution_model_layer_<i>.pkl``.

        Parameters
        ----------
        folder : path
            One pickle per layer, ``{'x': float[n], 'cdf': float[n]}``; nothing in it is executed.
        **header
            Known fields of :class:`NullHeader`, for example ``model=``.

        Raises
        ------
        NullModelError
            If the folder or a table is missing, damaged, or holds anything but numpy arrays.
        """
        own = ("format_version", "num_layers", "points", "null_scope")
        check_fields(header, settable=[f.name for f in fields(NullHeader) if f.name not in own])
        tables = pickles.read_folder(folder)
        lengths = {len(x) for x, _ in tables}
        points = lengths.pop() if len(lengths) == 1 else None
        found = cls(tuple(tables), NullHeader(num_layers=len(tables), points=points, **header))
        return found._checked(folder)

    def save(self, path: Path | str) -> None:
        """Write the null model as one safetensors file, completely or not at all.

        Raises
        ------
        NullModelError
            If the file cannot be written.
        """
        null_file.write(as_path(path), self.tables, self.header, self.factors, self.measured)

    @classmethod
    def load(cls, path: Path | str) -> NullModel:
        """Read a saved null model; nothing in the file is executed.

        Raises
        ------
        NullModelError
            If the file is missing, damaged, foreign, inconsistent, or of a later format version.
        """
        parts = null_file.read(as_path(path))
        try:
            found = cls(*parts)
        except NullModelError as error:
            raise NullModelError(f"The null model {path} is damaged: {error}") from error
        return found._checked(path)

    def _checked(self, path: Path | str) -> NullModel:
        """Return the null model if it is usable, with a warning if it is doubtful."""
        if reason := table_checks.flat(self.tables):
            raise NullModelError(f"The null model {path} cannot be used: {reason}; calibrate one.")
        if doubt := table_checks.doubt(self.tables, self.header.tokens):
            logger.warning("The null model %s %s: calibrate one on more text.", path, doubt)
        return self

    def digest(self) -> str:
        """Return a SHA-256, in hex, of the tables on which decisions depend."""
        digest = hashlib.sha256()
        for x, cdf in self.tables:
            digest.update(x.tobytes())
            digest.update(cdf.tobytes())
        if self.factors is not None:
            digest.update(self.factors.tobytes())
        for name in sorted(self.measured):
            digest.update(name.encode() + self.measured[name].tobytes())
        return digest.hexdigest()

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.tables)

    def cdf(self, layer: int) -> tuple[Array, Array]:
        """Return the grid x and the CDF of one layer, both float64 [points] or [experts, points].

        Raises
        ------
        ParameterError
            If there is no such layer.
        """
        last = self.num_layers - 1
        must = f"one of the null model's layers 0 to {last}"
        return self.tables[checked_integer("layer", layer, must, 0, last)]

    def layer(self, layer: int) -> LayerTables:
        """Return the tables of one layer, to which a method is fitted.

        Raises :class:`ParameterError` if there is no such layer.
        """
        x, cdf = self.cdf(layer)
        factors = None if self.factors is None else self.factors[layer]
        return LayerTables(x, cdf, factors, self.measured)

    def scores(
        self,
        layer: int,
        router_logits: torch.Tensor,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the null model's statistic of router logits.

        The logits [..., experts] themselves; or log(softmax weight * factor) of the same shape, in
        float32, or float64 where these are. The statistic "predicted" needs the hidden states.
        """
        factors = None if self.factors is None else self.layer(layer).factors
        return fit_null.statistic_of(router_logits, self.header.statistic, factors, hidden_states)

    @torch.no_grad()
    def p_values(
        self,
        layer: int,
        router_logits: torch.Tensor,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return p = 1 - F(z), the share of the null distribution above each expert's statistic.

        Parameters
        ----------
        layer : int
            Index of the MoE layer.
        router_logits : Tensor [any shape], any float dtype
            NaN gives NaN. Statistics other than the logit, and one distribution per expert, need
            [..., experts].
        hidden_states : Tensor [..., hidden], optional
            See :meth:`scores`.

        Returns
        -------
        Tensor, float64, same shape and device
            float64, since bfloat16 could not resolve p-values at small levels.
        """
        router_logits = numbers_of(router_logits, "router_logits")
        return self.p_values_of(layer, self.scores(layer, router_logits, hidden_states))

    def p_values_of(self, layer: int, scores: torch.Tensor) -> torch.Tensor:
        """Return the p-values of a layer's scores, see :meth:`LayerTables.p_values`."""
        return self.layer(layer).p_values(scores)

    def thresholds(self, layer: int, critical_values: NDArray[np.float64]) -> Array:
        """Return the smallest logits whose p-values do not exceed the critical values.

        For every finite z, ``z >= threshold`` and ``p_values(z) <= critical_value`` are exactly the
        same decision: see :func:`~lm_eval_bh.routing.tables.thresholds.thresholds`.
        """
        found: Array = self.layer(layer).thresholds(np.asarray(critical_values, dtype=np.float64))
        return found
