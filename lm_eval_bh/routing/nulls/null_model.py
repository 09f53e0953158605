"""The null model: per layer, the distribution of router logits that p-values are taken from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_bh.errors import NullModelError, ParameterError
from lm_eval_bh.routing.nulls import null_file, pickles, survival
from lm_eval_bh.routing.nulls.fitting import fit_tables, points_of
from lm_eval_bh.routing.nulls.null_header import NullHeader, check_fields, library_versions
from lm_eval_bh.routing.nulls.null_kind import NullKind
from lm_eval_bh.routing.parameters import ALIASES, accepts
from lm_eval_bh.routing.scores.statistic import scores

Array = NDArray[np.float64]


def _fault(x: NDArray[Any], cdf: NDArray[Any]) -> str | None:
    """Say in half a sentence why (x, cdf) is not a CDF on a grid, or return None if it is."""
    if x.ndim not in (1, 2) or x.shape != cdf.shape or x.shape[-1] < 2:
        return f"x and cdf have shapes {x.shape} and {cdf.shape}, not both [2 or more points]"
    if x.dtype != np.float64 or cdf.dtype != np.float64:
        return f"x and cdf are {x.dtype} and {cdf.dtype}, not float64"
    if not (np.isfinite(x).all() and np.isfinite(cdf).all()):
        return "x or cdf is not finite"
    if (x[..., -1] / 2 - x[..., 0] / 2 >= np.finfo(np.float64).max / 2).any():
        return "x is too wide for float64"
    if not (x[..., 1:] > x[..., :-1]).all():
        return "x is not strictly ascending"
    if not ((cdf[..., 1:] >= cdf[..., :-1]).all() and cdf.min() >= 0 and cdf.max() <= 1):
        return "cdf does not rise within [0, 1]"
    return None


@dataclass(frozen=True, eq=False)
class NullModel:
    """The null distribution of every layer's router logits, or of a statistic made of them.

    Attributes
    ----------
    tables : tuple of (x, cdf), one a layer
        Grid, float64 [points], strictly ascending, in units of the statistic; and CDF, float64
        [points], non-decreasing, in [0, 1]. The CDF is linear between grid points. With
        ``header.null_scope == "expert"`` both are [experts, points].
    header : NullHeader
        Where it comes from, and what statistic it is the distribution of.
    norms : ndarray or None
        For the statistic "contribution", float64 [layers, experts]: the mean Euclidean norm of what
        each expert gives out for the tokens routed to it.

    Raises
    ------
    NullModelError
        If a table is no CDF, or header and tables disagree.
    """

    tables: tuple[tuple[Array, Array], ...]
    header: NullHeader
    norms: Array | None = None

    def __post_init__(self) -> None:
        """Check the tables and keep read-only copies of them."""
        self._check_norms()
        if len(self.tables) != self.header.num_layers or not self.tables:
            raise NullModelError(
                f"A null model of {self.header.num_layers} layers cannot have {len(self.tables)} "
                "tables; give one a layer."
            )
        for layer, (x, cdf) in enumerate(self.tables):
            fault = _fault(x, cdf)
            if fault is None and self.header.points not in (None, x.shape[-1]):
                fault = f"it has {x.shape[-1]} points where the header says {self.header.points}"
            if fault is None and (x.ndim == 2) != (self.header.null_scope == "expert"):
                fault = f"its shape {x.shape} is not one of null_scope={self.header.null_scope}"
            if fault:
                raise NullModelError(
                    f"The null model's table of layer {layer} is no CDF: {fault}; calibrate again."
                )
        tables = tuple((x.copy(), cdf.copy()) for x, cdf in self.tables)
        for values in (values for table in tables for values in table):
            values.flags.writeable = False
        object.__setattr__(self, "tables", tables)

    def _check_norms(self) -> None:
        header, norms = self.header, self.norms
        if (norms is not None) != (header.statistic == "contribution"):
            raise NullModelError(
                f"A null model of the statistic {header.statistic!r} comes "
                f"{'with' if norms is None else 'without'} output norms; calibrate again."
            )
        if norms is not None and not (
            norms.ndim == 2
            and norms.shape[0] == header.num_layers
            and header.num_experts in (None, norms.shape[1])
            and bool(np.isfinite(norms).all() and (norms > 0).all())
        ):
            raise NullModelError(
                f"The output norms of shape {norms.shape} are not positive numbers "
                f"[{header.num_layers} layers, {header.num_experts} experts]; calibrate again."
            )

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
        norms: NDArray[Any] | None = None,
        header: Mapping[str, Any] | None = None,
    ) -> NullModel:
        """Fit one kernel density estimate a layer, pooled over its experts; or as the scope says.

        Parameters
        ----------
        logits : mapping of layer index to Tensor or ndarray [tokens, experts]
            Router logits of layers 0, 1, ..., any float dtype; computed in float64.
        kernel, bandwidth
            As in :func:`lm_eval_bh.routing.nulls.kde.fit_cdf`.
        trim : int
            Leave out the ``trim`` largest and ``trim`` smallest logits (or contributions) of every
            token, so that the null is made of the experts that were not called for. The tails are
            then lighter than those of true nulls, so that alpha is no level any more.
        points : int, optional
            Grid points; default 8,192 where experts share a distribution, else 512 each.
        null_scope : "layer", "expert" or "model"
            What one distribution is fitted to; ``null=`` is an alias, "pooled" one of "layer". That
            of the model serves every layer, so that all share one scale.
        norms : ndarray, optional
            Output norms [layers, experts], see
            :func:`~lm_eval_bh.routing.scores.contribution.measuring_norms`: it is then the
            contribution, log(softmax weight * norm), instead of the logit.
        header : mapping, optional
            Further fields of :class:`NullHeader`: model, revision, fingerprint, text, versions.

        Raises
        ------
        ParameterError
            If a parameter is out of range.
        NullModelError
            If a layer's logits are not finite, too few, or all equal.
        """
        known = dict(header or {})
        check_fields(known, settable=("model", "revision", "fingerprint", "text", "versions"))
        if not logits or sorted(logits) != list(range(len(logits))):
            raise ParameterError(
                f"A null model needs the logits of layers 0, 1, ...; found {sorted(logits)}."
            )
        kind = NullKind("logit" if norms is None else "contribution", null_scope, trim).made()
        null_scope, points = str(kind.null_scope), points_of(null_scope, points)
        scored = [
            scores(torch.as_tensor(logits[layer]), _log_factors(norms, layer))
            for layer in range(len(logits))
        ]
        tables, widths = fit_tables(scored, null_scope, trim, kernel, bandwidth, points)
        shapes = {tuple(logits[layer].shape) for layer in logits}
        experts, tokens = {s[1] for s in shapes}, {s[0] for s in shapes}
        if len(experts) > 1:
            raise ParameterError(
                f"A null model needs as many experts in every layer; found {sorted(experts)}."
            )
        known["versions"] = library_versions() | known.get("versions", {})
        known |= {"num_layers": len(tables), "num_experts": experts.pop()}
        known["tokens"] = tokens.pop() if len(tokens) == 1 else None
        known |= {"kernel": kernel, "bandwidth": widths, "trim": trim, "points": points}
        known |= {"statistic": kind.statistic, "null_scope": null_scope}
        return cls(tuple(tables), NullHeader(**known), norms)

    @classmethod
    def from_pickles(cls, folder: Path | str, **header: Any) -> NullModel:
        """Import the earlier prototype's folder of ``distribution_model_layer_<i>.pkl``.

        Parameters
        ----------
        folder : path
            One pickle a layer, ``{'x': float[n], 'cdf': float[n]}``; nothing in it is executed.
        **header
            What is known of it: fields of :class:`NullHeader`, for example ``model=``.

        Raises
        ------
        NullModelError
            If the folder or a table is missing, damaged, or asks for anything but numpy arrays.
        """
        own = ("format_version", "num_layers", "points", "null_scope")
        check_fields(header, settable=[f.name for f in fields(NullHeader) if f.name not in own])
        tables = pickles.read_folder(folder)
        for layer, (x, cdf) in enumerate(tables):
            if fault := _fault(x, cdf):
                path = Path(folder) / pickles.FILE_NAME.format(layer)
                raise NullModelError(
                    f"The table {path} is no CDF: {fault}; copy it again from a source you trust."
                )
        lengths = {len(x) for x, _ in tables}
        points = lengths.pop() if len(lengths) == 1 else None
        return cls(tuple(tables), NullHeader(num_layers=len(tables), points=points, **header))

    def save(self, path: Path | str) -> None:
        """Write the null model as one safetensors file; ``path`` never holds half of it.

        Raises
        ------
        NullModelError
            If it cannot be written.
        """
        null_file.write(path, self.tables, self.header, self.norms)

    @classmethod
    def load(cls, path: Path | str) -> NullModel:
        """Read what :meth:`save` wrote; nothing in the file is executed.

        Raises
        ------
        NullModelError
            If the file is missing, damaged, foreign, inconsistent, or of a later format version.
        """
        tables, header, norms = null_file.read(Path(path))
        try:
            return cls(tables, header, norms)
        except NullModelError as error:
            raise NullModelError(f"The null model {path} is damaged: {error}") from error

    def digest(self) -> str:
        """Return a SHA-256 of the tables, in hex: what decisions depend on."""
        digest = hashlib.sha256()
        for x, cdf in self.tables:
            digest.update(x.tobytes())
            digest.update(cdf.tobytes())
        if self.norms is not None:
            digest.update(self.norms.tobytes())
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
        if (
            isinstance(layer, bool)
            or not isinstance(layer, int)
            or not 0 <= layer < self.num_layers
        ):
            raise ParameterError(
                f"layer={layer!r} is out of range; "
                f"this null model has layers 0 to {self.num_layers - 1}."
            )
        return self.tables[layer]

    def scores(self, layer: int, router_logits: torch.Tensor) -> torch.Tensor:
        """Return what is tested, as this null model has it: the logits or the contributions.

        Parameters
        ----------
        layer : int
            Index of the MoE layer.
        router_logits : Tensor [..., experts], any float dtype

        Returns
        -------
        Tensor, same shape and device
            The logits themselves; or log(softmax weight * output norm) in float32, or float64 where
            the logits are.
        """
        return scores(router_logits, _log_factors(self.norms, layer))

    @torch.no_grad()
    def p_values(self, layer: int, router_logits: torch.Tensor) -> torch.Tensor:
        """Return p = 1 - F(z), the share of the null distribution above each expert's statistic.

        Parameters
        ----------
        layer : int
            Index of the MoE layer.
        router_logits : Tensor [any shape], any float dtype
            NaN gives NaN. Contributions, and a distribution for each expert, need [..., experts].

        Returns
        -------
        Tensor, float64, same shape and device
            In bfloat16 a p-value could not go below 0.0078, where small levels are decided.
        """
        x, cdf = (torch.tensor(values, device=router_logits.device) for values in self.cdf(layer))
        z = self.scores(layer, router_logits).double()
        if self.header.null_scope != "expert":
            return survival.survival(x, cdf, z.flatten()).view(z.shape)
        by_expert = z.reshape(-1, z.shape[-1]).T
        return survival.survival(x, cdf, by_expert).T.reshape(z.shape)

    def thresholds(self, layer: int, critical_values: NDArray[np.float64]) -> Array:
        """Return the smallest logits whose p-values do not exceed the critical values.

        For every finite z, ``z >= threshold`` and ``p_values(z) <= critical_value`` are the same
        decision, exactly: the threshold is found by bisection over the float64 numbers themselves.

        Parameters
        ----------
        layer : int
            Index of the MoE layer.
        critical_values : ndarray, float64 [n]
            Levels to compare p-values with.

        Returns
        -------
        ndarray, float64 [n]
            -inf where every logit qualifies, +inf where none does.

        Raises
        ------
        ParameterError
            If there is no such layer or a critical value is NaN.
        """
        x, cdf = self.cdf(layer)
        if x.ndim == 2:
            raise ParameterError(
                "One threshold a critical value cannot stand for a distribution of each expert; "
                "compare p_values()."
            )
        return survival.thresholds(x, cdf, np.asarray(critical_values, dtype=np.float64))

    def mismatch(self, wanted: NullKind) -> str | None:
        """Say in half a sentence why it cannot serve, or None if it can."""
        own = self.header
        if own.statistic != wanted.statistic:
            norms = ", without output norms" if self.norms is None else ""
            return f"is of statistic={own.statistic}{norms}, not statistic={wanted.statistic}"
        if wanted.null_scope not in (None, own.null_scope):
            return f"is of null_scope={own.null_scope}, not null_scope={wanted.null_scope}"
        if wanted.trim not in (None, own.trim or 0):
            return f"was fitted with trim={own.trim or 0}, not trim={wanted.trim}"
        return None

    def check(
        self, fingerprint: str | None, num_layers: int, num_experts: int | None, model_name: str
    ) -> None:
        """Raise a :class:`NullModelError` that names both models if the routers are others.

        What is None on either side (imported tables know little) is not compared.
        """
        own = self.header
        differences = [
            f"{what} {mine} there and {theirs} here"
            for what, mine, theirs in (
                ("layers:", own.num_layers, num_layers),
                ("experts:", own.num_experts, num_experts),
                (
                    "router fingerprint:",
                    (own.fingerprint or "")[:12] or None,
                    (fingerprint or "")[:12] or None,
                ),
            )
            if mine is not None and theirs is not None and mine != theirs
        ]
        if differences:
            raise NullModelError(
                f"The null model was fitted on {own.model or 'an unnamed model'}, "
                f"which is not {model_name} ({'; '.join(differences)}); "
                f"calibrate one for {model_name}."
            )


def _log_factors(norms: Array | None, layer: int) -> torch.Tensor | None:
    """Return the logs of a layer's output norms, float64 [experts]."""
    return None if norms is None else torch.from_numpy(np.log(norms[layer]))
