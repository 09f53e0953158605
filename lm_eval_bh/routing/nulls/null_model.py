"""The null model: per layer, the distribution of router logits that p-values are taken from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_bh.errors import NullModelError, ParameterError
from lm_eval_bh.routing.nulls import kde, null_file, pickles, survival
from lm_eval_bh.routing.nulls.null_header import (
    NullHeader,
    check_fields,
    check_kind,
    library_versions,
)

__all__ = ["NullHeader", "NullModel", "router_fingerprint"]

Array = NDArray[np.float64]

EXPERT_POINTS = 512


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
        ``header.null == "expert"`` both are [experts, points].
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
            if fault is None and (x.ndim == 2) != (self.header.null == "expert"):
                fault = f"its shape {x.shape} is none of null={self.header.null}"
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
    def fit(
        cls,
        logits: Mapping[int, torch.Tensor | NDArray[Any]],
        *,
        kernel: str = "gaussian",
        bandwidth: str | float = "scott",
        trim: int = 0,
        points: int | None = None,
        null: str = "pooled",
        norms: NDArray[Any] | None = None,
        header: Mapping[str, Any] | None = None,
    ) -> NullModel:
        """Fit one kernel density estimate a layer, pooled over its experts, or one an expert.

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
            Grid points; default 8,192 where the experts share a distribution, else 512 each, whose
            error of 2e-5 is far below the sampling error of one expert's logits.
        null : "pooled" or "expert"
            Whether the experts of a layer share one distribution, or each has its own.
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
        check_kind("logit" if norms is None else "contribution", null)
        if points is None:
            points = kde.POINTS if null == "pooled" else EXPERT_POINTS
        tables, widths = [], []
        for layer in range(len(logits)):
            values = statistics(logits[layer], None if norms is None else norms[layer])
            samples = _untrimmed(layer, values, trim)
            try:
                if null == "pooled":
                    pooled = samples[~np.isnan(samples)] if trim else samples.ravel()
                    widths.append(kde.bandwidth_of(pooled, bandwidth))
                    tables.append(kde.fit_cdf(pooled, kernel, widths[-1], points))
                else:
                    own, table = _fit_experts(samples, kernel, bandwidth, points)
                    widths.append(float(np.mean(own)))
                    tables.append(table)
            except NullModelError as error:
                raise NullModelError(
                    f"The router logits of layer {layer} cannot be fitted: {error}"
                ) from error
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
        known |= {"statistic": "logit" if norms is None else "contribution", "null": null}
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
        own = ("format_version", "num_layers", "points")
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

    def statistic(self, layer: int, router_logits: torch.Tensor) -> torch.Tensor:
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
        return statistics(router_logits, None if self.norms is None else self.norms[layer])

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
        z = self.statistic(layer, router_logits).double()
        if self.header.null == "pooled":
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

    def mismatch(self, statistic: str, null: str | None, trim: int | None) -> str | None:
        """Say in half a sentence why it cannot serve this statistic, or None if it can.

        What is asked as None may be anything.
        """
        own = self.header
        if own.statistic != statistic:
            norms = ", without output norms" if self.norms is None else ""
            return f"is of statistic={own.statistic}{norms}, and statistic={statistic} was asked"
        if null is not None and own.null != null:
            return f"is of null={own.null}, and null={null} was asked"
        if trim is not None and (own.trim or 0) != trim:
            return f"was fitted with trim={own.trim or 0}, and trim={trim} was asked"
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


def statistics(logits: torch.Tensor | NDArray[Any], norms: NDArray[Any] | None) -> torch.Tensor:
    """Return what is tested: the logits, or with output norms [experts] the log contributions."""
    values = torch.as_tensor(logits)
    if norms is None:
        return values
    dtype = torch.promote_types(values.dtype, torch.float32)
    log_norms = torch.from_numpy(np.log(norms)).to(values.device, dtype)
    return torch.log_softmax(values, dim=-1, dtype=dtype) + log_norms


def _fit_experts(
    samples: Array, kernel: str, bandwidth: str | float, points: int
) -> tuple[list[float], tuple[Array, Array]]:
    """Fit each column of [tokens, experts], NaN left out.

    Returns the experts' bandwidths, and x and cdf, both [experts, points].
    """
    widths, tables = [], []
    for expert, column in enumerate(samples.T):
        own = column[~np.isnan(column)]
        try:
            widths.append(kde.bandwidth_of(own, bandwidth))
            tables.append(kde.fit_cdf(own, kernel, widths[-1], points))
        except NullModelError as error:
            raise NullModelError(f"expert {expert}: {error}") from error
    return widths, (np.stack([x for x, _ in tables]), np.stack([cdf for _, cdf in tables]))


def check_trim(trim: int, experts: int) -> None:
    """Raise a :class:`ParameterError` unless so many can be left out at either end."""
    if isinstance(trim, bool) or not isinstance(trim, int) or not 0 <= 2 * trim < experts:
        raise ParameterError(
            f"trim={trim!r} is out of range; with {experts} experts use 0 to {(experts - 1) // 2}."
        )


def _untrimmed(layer: int, statistic: torch.Tensor, trim: int) -> Array:
    """Return one layer's statistics in float64, each token's ``trim`` largest and smallest NaN."""
    values = statistic.detach().cpu().double().numpy()
    if values.ndim != 2:
        raise ParameterError(
            f"The logits of layer {layer} have shape {values.shape}; give [tokens, experts]."
        )
    experts = values.shape[1]
    check_trim(trim, experts)
    if not np.isfinite(values).all():  # NaN shall stay the fault that it is
        raise NullModelError(
            f"The router logits of layer {layer} cannot be fitted: "
            f"{(~np.isfinite(values)).sum()} of {values.size} samples are NaN or infinite; "
            "look for the fault in the model."
        )
    if trim:
        order = np.argsort(values, axis=1)
        values = values.copy()
        np.put_along_axis(values, np.delete(order, np.s_[trim : experts - trim], 1), np.nan, 1)
    return values


def router_fingerprint(weights: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of the routers' weights in the order of the layers.

    The weights are rounded to bfloat16 first, so that one model loaded in float32 and in bfloat16
    has one fingerprint. (float16 cannot hold bfloat16's smallest numbers: there it may differ.)

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
