"""The speed phase of a sweep: its configurations on its tasks, with its loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_bh.harness.sweep.sweep_config import SweepConfig
from lm_eval_bh.speed.phase import (
    QUICK,
    SpeedSettings,
    asked_of,
    is_measured,
    measure,
    speed_file,
    write,
)

if TYPE_CHECKING:
    from lm_eval_bh.harness.sweep.evaluator import Evaluator

# Presets that measure speed by default.
OF_PRESET = {"quick": QUICK, "full": SpeedSettings(), "seeds": SpeedSettings()}
UNKNOWN_BATCH_SIZE = 8  # if the evaluation chooses its own


class SweepSpeed:
    """The speed phase of a sweep.

    Parameters
    ----------
    config : SweepConfig
        The settings of the sweep.
    folder : Path
        Folder of the sweep, and of the file.
    settings : SpeedSettings
        Settings of the speed phase.
    """

    def __init__(self, config: SweepConfig, folder: Path, settings: SpeedSettings) -> None:
        self.config, self.settings = config, settings
        self.file = speed_file(folder)
        known: dict[str, dict[str, Any]] = {}
        for experiment in config.experiments():
            arguments = config.model_args_of(experiment)
            known.setdefault(str(sorted(arguments.items(), key=str)), arguments)
        self.configurations = list(known.values())
        size = config.batch_size
        self.batch_size = size if isinstance(size, int) else UNKNOWN_BATCH_SIZE

    @property
    def done(self) -> bool:
        """Whether the file already holds this phase."""
        asked = asked_of(
            self.config.pretrained,
            self.config.tasks,
            self.configurations,
            self.batch_size,
            self.settings,
        )
        return is_measured(self.file, asked)

    def run(self, evaluator: Evaluator) -> None:
        """Measure with the model and the tasks of a sweep, and write the file.

        Raises
        ------
        BHError
            See :func:`~lm_eval_bh.speed.phase.measure`.
        """
        found = measure(
            evaluator.lm,
            self.config.pretrained,
            evaluator.tasks,
            self.configurations,
            batch_size=self.batch_size,
            settings=self.settings,
        )
        write(found, self.file)
