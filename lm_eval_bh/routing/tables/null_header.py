"""The header of a null model, and how it is written and read."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval_bh.errors import NullModelError, ParameterError, did_you_mean
from lm_eval_bh.routing.methods.scores import OF, STATISTICS
from lm_eval_bh.routing.methods.step_up import ORIGINS
from lm_eval_bh.routing.tables.null_kind import NullKind

FORMAT_VERSION = 1
COPY_AGAIN = "copy it again or calibrate one"
# Names of the scope in files and results of the first release, which stay.
_SCOPE_IN_FILES = {"layer": "pooled", "expert": "expert", "model": "model"}


@dataclasses.dataclass(frozen=True)
class NullHeader:
    """The origin of a null model. Unknown fields are None.

    Attributes
    ----------
    num_layers : int
        Number of MoE layers.
    format_version : int
        Version of the file format.
    model, revision : str or None
        The model whose routers it was fitted on: hub name or path, and commit.
    num_experts : int or None
        Router logits per token and layer.
    fingerprint : str or None
        :func:`lm_eval_bh.routing.tables.null_model.router_fingerprint` of those routers.
    text : str or None
        The text it was fitted on.
    tokens : int or None
        Number of tokens of that text.
    kernel : str or None
        Kernel of the density estimate.
    bandwidth : list of float or None
        Bandwidth of every layer, in units of the statistic; the mean over experts if each has its
        own distribution.
    trim : int or None
        How many of each token's largest, and of its smallest, logits were left out.
    points : int or None
        Grid points per distribution, if all have the same number.
    statistic : str
        The statistic, see :data:`lm_eval_bh.routing.methods.scores.STATISTICS`.
    null_scope : "layer", "expert" or "model"
        Scope of one distribution. In files the key is ``null``, and "layer" is "pooled".
    null_from : "all" or "unselected"
        Whether all experts were used, or only those that the router does not select.
    of : "auto", "own" or "score"
        Which weight the statistic starts from.
    tables : list of str
        Names of further tables.
    health : list of dict or None
        Fit of every layer on held-out text, see
        :class:`lm_eval_bh.routing.tables.null_health.LayerHealth`.
    versions : dict of str to str
        Versions of the libraries used.
    """

    num_layers: int
    format_version: int = FORMAT_VERSION
    model: str | None = None
    revision: str | None = None
    num_experts: int | None = None
    fingerprint: str | None = None
    text: str | None = None
    tokens: int | None = None
    kernel: str | None = None
    bandwidth: list[float] | None = None
    trim: int | None = None
    points: int | None = None
    statistic: str = "logit"
    null_scope: str = "layer"
    null_from: str = "all"
    of: str = "auto"
    tables: list[str] = dataclasses.field(default_factory=list)
    health: list[dict[str, float]] | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bandwidth is not None and len(self.bandwidth) != self.num_layers:
            raise NullModelError(
                f"its header has {len(self.bandwidth)} bandwidths for {self.num_layers} layers; "
                "give one per layer"
            )

    @property
    def kind(self) -> NullKind:
        """The kind of null model."""
        return NullKind(
            self.statistic,
            self.null_scope,
            self.trim or 0,
            self.null_from,
            self.of,
            tuple(self.tables),
        )

    def to_json(self) -> str:
        """Return the header as a line of JSON."""
        return json.dumps(self.as_dict(), sort_keys=True, allow_nan=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the header as files and results hold it."""
        content = dataclasses.asdict(self)
        content["null"] = _SCOPE_IN_FILES[content.pop("null_scope")]
        for name, usual in (("null_from", "all"), ("of", "auto"), ("tables", [])):
            if content[name] == usual:  # omitted, as in the first release, which can read it
                del content[name]
        return content

    @classmethod
    def from_json(cls, text: str) -> NullHeader:
        """Read a header from :meth:`to_json`.

        Raises
        ------
        NullModelError
            If it is anything else; the message is half a sentence for the caller to begin.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise NullModelError(f"its header is not JSON ({error}); {COPY_AGAIN}") from error
        version: Any = fields.get("format_version") if isinstance(fields, dict) else None
        if not _is_count(version, 1):
            raise NullModelError(f"its header has no format version; {COPY_AGAIN}")
        if version > FORMAT_VERSION:
            raise NullModelError(
                f"it has format version {version}, but this release reads only up to "
                f"{FORMAT_VERSION}; upgrade lm-eval-bh"
            )
        for name in fields | _VALID:
            if not (name in _VALID and _is_valid(name, fields.get(name))):
                value = str(fields.get(name))[:60]
                raise NullModelError(f"its header has {name[:60]}={value!r}; {COPY_AGAIN}")
        known = {name: value for name, value in fields.items() if value is not None}
        if "null" in known:
            known["null_scope"] = {v: k for k, v in _SCOPE_IN_FILES.items()}[known.pop("null")]
        return cls(**known)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_health(value: Any) -> bool:
    names = {"layer", "ks_distance", "floor_share", "ceiling_share", "tokens"}
    return isinstance(value, list) and all(
        isinstance(layer, dict)
        and layer.keys() == names
        and all(isinstance(number, (int, float)) for number in layer.values())
        for layer in value
    )


_NEEDED = ("num_layers", "format_version", "versions")
_VALID: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "revision", "fingerprint", "text", "kernel"), _is_text),
    **dict.fromkeys(("tokens", "trim"), _is_count),
    **dict.fromkeys(
        ("num_layers", "format_version", "num_experts", "points"), lambda v: _is_count(v, 1)
    ),
    "statistic": lambda v: v in STATISTICS,
    "null": lambda v: v in _SCOPE_IN_FILES.values(),
    "null_from": lambda v: v in ORIGINS,
    "of": lambda v: v in OF,
    "tables": lambda v: isinstance(v, list) and all(map(_is_text, v)),
    "bandwidth": lambda v: (
        isinstance(v, list) and all(isinstance(h, float) and 0 < h < math.inf for h in v)
    ),
    "health": _is_health,
    "versions": lambda v: isinstance(v, dict) and all(map(_is_text, v.values())),
}


def _is_valid(name: str, value: Any) -> bool:
    return _VALID[name](value) or (value is None and name not in _NEEDED)


def check_fields(fields: dict[str, Any], settable: Sequence[str]) -> None:
    """Raise a :class:`ParameterError` unless all fields are ``settable`` and their values valid."""
    for name, value in fields.items():
        if name not in settable:
            raise ParameterError(
                f"The null model's header has no field {name!r} to set"
                f"{did_you_mean(name, settable)}; it has {', '.join(settable)}."
            )
        if not _is_valid(name, value):
            raise ParameterError(
                f"The null model's header cannot hold {name}={value!r}; leave it out or correct it."
            )


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that shape a null model."""
    versions = {}
    for name in ("lm-eval-bh", "torch", "transformers", "numpy", "scipy"):
        try:
            versions[name.replace("-", "_")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
