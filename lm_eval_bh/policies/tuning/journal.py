"""The measurements of a search, written immediately, so that it can be resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from lm_eval_bh.errors import BHError, DataError, ParameterError
from lm_eval_bh.files import write_text
from lm_eval_bh.policies.document_losses import Floats
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.solution import Solution
from lm_eval_bh.validation import mismatch, shown

FILE = "tune.json"
FORMAT_VERSION = 4  # 1 bound rows to a text's name, 2 had only losses, 3 no steps


class _Solved(TypedDict):
    target_experts: float | None
    budget: str
    alphas: dict[str, float]
    mean_experts: float
    layer_means: dict[str, float]
    tokens: int
    text: str
    level: float | None


class _Row(TypedDict):
    name: str
    config: dict[str, Any]
    mean_experts: float | None
    losses: list[float]
    solved: _Solved | None
    failed: str | None
    divergences: list[float]
    changed: list[float]
    seconds: float | None
    decision: float | None
    table_bytes: int | None
    distinct_experts: float | None


class _File(TypedDict):
    settings: dict[str, Any]
    sensitivities: list[list[float]] | None
    nulls: dict[str, str]
    seconds: dict[str, float]
    rows: dict[str, _Row]


@dataclass
class Row:
    """The measurement of one policy on one text.

    Attributes
    ----------
    name : str
        Name of its family, see :class:`~lm_eval_bh.policies.tuning.candidates.Family`.
    config : dict
        Its RoutingConfig.
    mean_experts : float or None
        Mean over tokens and layers of the text.
    losses : list of float
        Losses of the documents, in nats.
    solved : dict or None
        The :class:`~lm_eval_bh.routing.target.Solution`.
    failed : str or None
        The reason, if nothing was measured.
    divergences, changed : list of float
        Per document, see :class:`~lm_eval_bh.policies.fidelity.Outcome`; in faithful rows.
    seconds, decision : float or None
        Time of solving without calibration, and of a decision per token and layer.
    table_bytes : int or None
        Bytes of the method's tables in all layers.
    distinct_experts : float or None
        Mean over layers and steps of the text, if rows are decoded together.
    """

    name: str
    config: dict[str, Any]
    mean_experts: float | None = None
    losses: list[float] = field(default_factory=list)
    solved: dict[str, Any] | None = None
    failed: str | None = None
    divergences: list[float] = field(default_factory=list)
    changed: list[float] = field(default_factory=list)
    seconds: float | None = None
    decision: float | None = None
    table_bytes: int | None = None
    distinct_experts: float | None = None

    @property
    def sums(self) -> Floats:
        """The losses, float64 ``[documents]``."""
        return np.array(self.losses)

    @property
    def solution(self) -> Solution | None:
        """The solution, if there is one."""
        return None if self.solved is None else Solution.of(self.solved)


class Journal:
    """The rows of a search in its folder.

    Parameters
    ----------
    folder : Path
        Folder of the search.
    settings : mapping
        Everything that rows depend on, by content: model, texts, sizes, target.
    documents : mapping of str to int
        Number of documents per text, and thus of losses per row.
    shape : (int, int)
        Layers of the model, and its own top-k: the shape of sensitivities.
    file : str
        File name in the folder.

    Attributes
    ----------
    nulls : dict of str to str
        Digests of the calibrated null models, by file name.
    seconds : dict of str to float
        Seconds of these calibrations, by file name.

    Raises
    ------
    ParameterError
        If the folder holds a search with other settings.
    DataError
        If the file is damaged.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        documents: Mapping[str, int],
        shape: tuple[int, int],
        file: str = FILE,
    ) -> None:
        self.path = folder / file
        self.settings = dict(settings)
        self.nulls: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._documents, self._shape = documents, shape
        self.rows: dict[str, Row] = {}
        self.sensitivities: list[list[float]] | None = None
        if self.path.exists():
            self._read()

    def get(self, text: str, config: Mapping[str, Any]) -> Row | None:
        """Return the measurement of a configuration on a text, if there is one."""
        return self.rows.get(_key(text, config))

    def add(self, text: str, config: Mapping[str, Any], row: Row) -> Row:
        """Keep a row, also on disk."""
        self.rows[_key(text, config)] = row
        self.write()
        return row

    def write(self) -> None:
        """Write all measurements."""
        content = {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "sensitivities": self.sensitivities,
            "nulls": self.nulls,
            "seconds": self.seconds,
            "rows": {key: asdict(row) for key, row in self.rows.items()},
        }
        write_text(self.path, json.dumps(content, allow_nan=False) + "\n")

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(str(error) or type(error).__name__) from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if type(version) is int and version != FORMAT_VERSION:
            raise DataError(
                f"{self.path} has format version {version}, and this release reads "
                f"{FORMAT_VERSION}: name another folder."
            )
        reason = mismatch(content, _File, "the file")
        if version is None or reason:
            raise self._damaged(reason or "the file lacks format_version")
        settings = content["settings"]
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise ParameterError(
                    f"{self.path.parent} holds a search with other settings ({name} "
                    f"{shown(settings.get(name))}, not {shown(value)}): name another folder."
                )
        for key, row in content["rows"].items():
            if reason := self._wrong(key, row):
                raise self._damaged(f"row {shown(key)}: {reason}")
        if reason := self._wrong_sensitivities(content["sensitivities"]):
            raise self._damaged(reason)
        self.rows = {key: Row(**row) for key, row in content["rows"].items()}
        self.sensitivities, self.nulls = content["sensitivities"], content["nulls"]
        self.seconds = content["seconds"]

    def _damaged(self, reason: str) -> DataError:
        return DataError(
            f"{self.path} is damaged ({' '.join(reason.split()).rstrip('.')}): remove it to start "
            "over, or name another folder."
        )

    def _wrong(self, key: str, row: _Row) -> str | None:
        """Return what is wrong with a row whose fields have the right types, or None."""
        if unknown := sorted(row.keys() - Row.__dataclass_fields__.keys()):
            return f"it has an unknown field, {unknown[0]}"
        text = key.partition(" ")[0]
        if text not in self._documents or key != _key(text, row["config"]):
            return "its key does not match its text and configuration"
        try:
            config = RoutingConfig.named(row["config"])
            if config.as_dict() != row["config"]:
                return "its configuration lacks or adds parameters"
            solution = None if row["solved"] is None else Solution.of(row["solved"])
        except (BHError, ValueError, TypeError, KeyError, AttributeError) as error:
            return str(error)
        if row["failed"] is not None:
            return None
        if len(row["losses"]) != self._documents[text]:
            return f"it has {len(row['losses'])} losses for {self._documents[text]} documents"
        for name in ("divergences", "changed"):
            if len(row[name]) not in (0, len(row["losses"])):
                return f"it has {len(row[name])} {name} for {len(row['losses'])} documents"
        numbers = [*row["losses"], math.nan if row["mean_experts"] is None else row["mean_experts"]]
        numbers += [*row["divergences"], *row["changed"], row["seconds"] or 0, row["decision"] or 0]
        numbers.append(row["distinct_experts"] or 0)
        if solution is not None:
            layers = [*solution.alphas, *solution.layer_means]
            if not solution.alphas or not all(0 <= layer < self._shape[0] for layer in layers):
                return "its solution has other layers"
            numbers += [*solution.alphas.values(), *solution.layer_means.values()]
            numbers.append(solution.mean_experts)
        elif config.solves:
            return "it lacks its solution"
        return _not_finite(numbers)

    def _wrong_sensitivities(self, found: list[list[float]] | None) -> str | None:
        if found is None:
            return None
        layers, native = self._shape
        if len(found) != layers or any(len(row) != native for row in found):
            return f"sensitivities must have {layers} layers and {native} numbers of experts"
        return _not_finite(value for row in found for value in row)


def _not_finite(numbers: Iterable[float]) -> str | None:
    wrong = next((number for number in numbers if not math.isfinite(number)), None)
    return None if wrong is None else f"a number must be finite, not {wrong}"


def _key(text: str, config: Mapping[str, Any]) -> str:
    return f"{text} {json.dumps(config, sort_keys=True)}"
