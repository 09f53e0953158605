"""Finds results that a sweep has finished and that were lost since."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lm_eval_bh.analysis.read.results_file import Notices
from lm_eval_bh.errors import DataError
from lm_eval_bh.experiment_names import is_file_name
from lm_eval_bh.schema import INTERNAL_ROUTING, read_summary


def lost_files(sweeps: Iterable[Path]) -> Notices:
    """Return the results and samples that summaries list but that do not exist.

    Parameters
    ----------
    sweeps : iterable of Path
        Folders of sweeps.

    Returns
    -------
    list of (Path, str)
        Each with a remedy, including summaries that cannot be read.
    """
    found: Notices = []
    for sweep in sweeps:
        for file in sorted((sweep / "logs").glob("*.json")):
            if file.name.endswith(INTERNAL_ROUTING):
                continue
            try:
                summary = read_summary(file)
            except DataError as error:
                found.append((file, str(error)))
                continue
            for name in summary.get("files", {}):
                path = sweep / name
                wanted = path.name.startswith(("results_", "samples_"))
                if wanted and all(map(is_file_name, name.split("/"))) and not path.is_file():
                    sentence = (
                        f"{path} is gone, though the sweep had finished {summary['config']}: "
                        "run the sweep again."
                    )
                    found.append((path, sentence))
    return found
