"""What a search has measured, written as soon as it is, so that an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.files import write_text
from lm_eval_bh.policies.document_losses import Floats
from lm_eval_bh.routing.solution import Solution

FILE = "tune.json"
FORMAT_VERSION = 1


@dataclass
class Row:
    """One policy on one text.

    Attributes
    ----------
    name : str
        Its family, see :class:`~lm_eval_bh.policies.tuning.candidates.Family`.
    config : dict
        Its RoutingConfig.
    mean_experts : float or None
        Over tokens and layers of the text.
    losses : list of float
        Of the documents, in nats.
    solved : dict or None
        The :class:`~lm_eval_bh.routing.target.Solution`.
    failed : str or None
        Why nothing was measured.
    """

    name: str
    config: dict[str, Any]
    mean_experts: float | None = None
    losses: list[float] = field(default_factory=list)
    solved: dict[str, Any] | None = None
    failed: str | None = None

    @property
    def sums(self) -> Floats:
        """The losses, float64 ``[documents]``."""
        return np.array(self.losses)

    @property
    def solution(self) -> Solution | None:
        """What was solved."""
        return None if self.solved is None else Solution.of(self.solved)


class Journal:
    """The rows of a search in its folder.

    Parameters
    ----------
    folder : Path
        Of the search.
    settings : mapping
        What the rows depend on: model, texts, sizes, target.

    Raises
    ------
    ParameterError
        If the folder holds a search with other settings.
    DataError
        If its file is damaged.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / FILE
        self.settings = dict(settings)
        self.rows: dict[str, Row] = {}
        self.sensitivities: list[list[float]] | None = None
        if self.path.exists():
            self._read()

    def get(self, text: str, config: Mapping[str, Any]) -> Row | None:
        """Return what was measured of a configuration on a text, if it was."""
        return self.rows.get(_key(text, config))

    def add(self, text: str, config: Mapping[str, Any], row: Row) -> Row:
        """Keep a row, on disk too."""
        self.rows[_key(text, config)] = row
        self.write()
        return row

    def write(self) -> None:
        """Write everything that was measured."""
        content = {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "sensitivities": self.sensitivities,
            "rows": {key: asdict(row) for key, row in self.rows.items()},
        }
        write_text(self.path, json.dumps(content, allow_nan=False) + "\n")

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            version, settings = content["format_version"], content["settings"]
            rows = {key: Row(**row) for key, row in content["rows"].items()}
            self.sensitivities = content["sensitivities"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{self.path} is damaged ({type(error).__name__}): remove it to start over, or "
                "name another folder."
            ) from error
        if version != FORMAT_VERSION:
            raise DataError(
                f"{self.path} has format version {version}, and this release reads "
                f"{FORMAT_VERSION}: name another folder."
            )
        differing = {
            name: (settings.get(name), value)
            for name, value in self.settings.items()
            if settings.get(name) != value
        }
        if differing:
            name, (found, given) = next(iter(differing.items()))
            raise ParameterError(
                f"{self.path.parent} holds a search with other settings ({name} {found}, not "
                f"{given}): name another folder."
            )
        self.rows = rows


def _key(text: str, config: Mapping[str, Any]) -> str:
    return f"{text} {json.dumps(config, sort_keys=True)}"
