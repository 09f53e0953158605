"""A policy: everything that decides experts, in one file.

The file is safetensors with a JSON header, like null models: loading it executes nothing. Its
tensors are those of the null model, if the rule needs one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lm_eval_bh.errors import BHError, ParameterError, PolicyError
from lm_eval_bh.files import as_path
from lm_eval_bh.resources import shipped_policies
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.parameters import checked_integer
from lm_eval_bh.routing.sealed_file import broken_seal, write_sealed
from lm_eval_bh.routing.solution import Solution
from lm_eval_bh.routing.tables import null_file
from lm_eval_bh.routing.tables.null_model import NullModel
from lm_eval_bh.validation import mismatch

METADATA_KEY = "lm_eval_bh_policy"
FORMAT_VERSION = 1
MOST = 2**16  # limit for damaged files: layers are counted one by one


class _Header(TypedDict):
    """The origin of a policy, as a file states it."""

    fingerprint: str
    model: str | None
    revision: str | None
    provenance: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Policy:
    """How the experts of one model are selected.

    Attributes
    ----------
    config : RoutingConfig
        Rule, bounds and parameters.
    solution : Solution or None
        The rule's parameter in every layer, if solved on calibration text.
    null_model : NullModel or None
        The source of p-values and factors of weights.
    fingerprint : str
        Fingerprint of the routers that it was made for.
    num_layers, num_experts, native_top_k : int
        MoE layers of the model, experts per layer, and the model's own top-k.
    model, revision : str or None
        The model: hub name or path, and commit.
    provenance : mapping
        How the policy was found and what was measured, as plain values.
    affine : ndarray or None
        Scales and shifts of the layers' outputs, float64 ``[layers, 2, hidden]``.
    """

    config: RoutingConfig
    fingerprint: str
    num_layers: int
    num_experts: int
    native_top_k: int
    solution: Solution | None = None
    null_model: NullModel | None = None
    model: str | None = None
    revision: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    affine: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if self.config.needs_null and self.null_model is None:
            raise PolicyError("A policy whose rule needs a null model must have one.")
        if self.config.solves and self.solution is None:
            raise PolicyError("A policy whose parameter was solved must have the solution.")
        shape = None if self.affine is None else self.affine.shape[:2]
        if shape != ((self.num_layers, 2) if self.config.affine else None):
            raise PolicyError("A policy with affine=true, and no other, must have what was fitted.")
        for name in ("num_layers", "num_experts", "native_top_k"):
            count = checked_integer(
                name, getattr(self, name), f"an integer from 1 to {MOST}", 1, MOST
            )
            object.__setattr__(self, name, count)
        self.config.check_experts(self.num_experts)
        self.config.select_layers(self.num_layers)

    def check(self, fingerprint: str, model_name: str, hint: str = "") -> None:
        """Raise a :class:`PolicyError` if it was made for other routers; the hint ends its text."""
        if fingerprint != self.fingerprint:
            raise PolicyError(
                f"The policy was made for {self.model or 'an unnamed model'}, whose routers differ "
                f"from those of {model_name} (fingerprint {self.fingerprint[:12]} there and "
                f"{fingerprint[:12]} here): make one for {model_name}{hint}."
            )

    def digest(self) -> str:
        """Return a SHA-256, in hex, of everything that decides experts."""
        found = hashlib.sha256(json.dumps(self._decides(), sort_keys=True).encode())
        if self.null_model is not None:
            found.update(self.null_model.digest().encode())
        if self.affine is not None:
            found.update(self.affine.tobytes())
        return found.hexdigest()

    def save(self, path: Path | str) -> None:
        """Write the policy as one safetensors file, completely or not at all.

        Raises
        ------
        PolicyError
            If the file cannot be written.
        """
        null, path = self.null_model, as_path(path)
        tensors = {}
        if null is not None:
            parts = null.tables, null.header, null.factors, null.measured
            tensors = null_file.tensors_of(*parts)
        if self.affine is not None:
            tensors[null_file.AFFINE] = self.affine
        header = self._decides() | {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "revision": self.revision,
            "provenance": dict(self.provenance),
            "null_model": None if null is None else null.header.as_dict(),
            "digest": self.digest(),
        }
        try:
            text = json.dumps(header, sort_keys=True, allow_nan=False)
            write_sealed(tensors, path, {METADATA_KEY: text})
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise PolicyError(
                f"The policy could not be written to {path} ({error}): use another path."
            ) from error

    @classmethod
    def load(cls, path: Path | str) -> Policy:
        """Read a saved policy; nothing in the file is executed.

        Parameters
        ----------
        path : path
            Path of the file, or the name of a shipped policy, such as ``tiny-olmoe``.

        Raises
        ------
        PolicyError
            If the file is missing, damaged, foreign, or of a later format version.
        """
        path = as_path(path)
        if not path.exists() and (own := shipped_policies().get(str(path))):
            path = own
        if not path.is_file():
            raise PolicyError(f"There is no policy {path}: use the path of a policy file.")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if METADATA_KEY not in metadata:
                    raise PolicyError(f"{path} is not a policy: use a file of `lm-eval-bh policy`.")
                if fault := broken_seal(path, metadata, METADATA_KEY):
                    raise PolicyError(f"The policy {path} is damaged ({fault}): make it again.")
                header = json.loads(metadata[METADATA_KEY])
                version = header["format_version"]
                if type(version) is not int or version > FORMAT_VERSION:
                    raise PolicyError(
                        f"The policy {path} has format version {version}, and this release reads "
                        f"up to {FORMAT_VERSION}: upgrade lm-eval-bh."
                    )
                if fault := mismatch(header, _Header, "its header"):
                    raise PolicyError(f"The policy {path} is damaged ({fault}): make it again.")
                affine, null = null_file.affine_of(file), None
                if header["null_model"] is not None:
                    null = NullModel(
                        *null_file.read_tensors(file, json.dumps(header["null_model"]))
                    )
            found = cls(
                config=RoutingConfig.named(header["config"]),
                fingerprint=str(header["fingerprint"]),
                num_layers=header["num_layers"],
                num_experts=header["num_experts"],
                native_top_k=header["native_top_k"],
                solution=None if header["solved"] is None else Solution.of(header["solved"]),
                null_model=null,
                model=header["model"],
                revision=header["revision"],
                provenance=header["provenance"],
                affine=affine,
            )
            if found.digest() != header["digest"]:
                raise PolicyError(
                    f"The policy {path} is damaged (its digest differs): make it again."
                )
        except PolicyError:
            raise
        except (
            BHError,
            SafetensorError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
            AttributeError,
            OverflowError,
        ) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise PolicyError(f"The policy {path} is damaged ({reason}): make it again.") from error
        return found

    def describe(self) -> dict[str, Any]:
        """Return a summary for people, as plain values."""
        return self._decides() | {
            "model": self.model,
            "revision": self.revision,
            "digest": self.digest(),
            **{f"provenance: {name}": value for name, value in self.provenance.items()},
        }

    def _decides(self) -> dict[str, Any]:
        return {
            "config": self.config.as_dict(),
            "solved": None if self.solution is None else self.solution.as_dict(),
            "fingerprint": self.fingerprint,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "native_top_k": self.native_top_k,
        }


def described(config: RoutingConfig, solution: Solution | None) -> dict[str, Any]:
    """Return a configuration as plain values, with solved values.

    A solved alpha is in ``alpha``, or with ``budget="layer"`` the mean over the layers; ``solved``
    holds every layer's alpha, and how well the target was met.
    """
    content = config.as_dict()
    if config.method.recorded:
        return content | {"alpha": None}  # alpha is not used
    if solution is None:
        return content
    level = solution.level  # with family=all, where alphas are cut-offs
    mean = sum(solution.alphas.values()) / len(solution.alphas) if level is None else level
    return content | {"alpha": mean, "solved": solution.as_dict()}


# The evaluation chooses decode batches; a policy only states those it was made for.
BESIDE_A_POLICY = ("decode_batch", "batch_seed")


def beside_policy(policy: Policy, arguments: Mapping[str, Any]) -> Policy:
    """Return a policy with an evaluation's decode batches.

    Raises :class:`ParameterError` for an argument that the policy decides.
    """
    check_alone({n: v for n, v in arguments.items() if n not in BESIDE_A_POLICY})
    given = {n: v for n, v in arguments.items() if n in BESIDE_A_POLICY and v is not None}
    return replace(policy, config=policy.config.replaced(**given)) if given else policy


def check_alone(arguments: Mapping[str, Any]) -> None:
    """Raise a :class:`ParameterError` if arguments are given that the policy decides."""
    for name, value in arguments.items():
        if value is not None:
            raise ParameterError(
                f"{name}={value!r} contradicts policy=, which holds all routing parameters: "
                "leave it out, or the policy."
            )
