"""Experiments as tables, with access to their documents and logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from lm_eval_bh.analysis.read.documents import read_documents
from lm_eval_bh.analysis.read.groups import Group
from lm_eval_bh.analysis.read.results_file import Notices, Run
from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import InternalRouting, SpeedFile, read_internal_routing


@dataclass
class Loaded:
    """Experiments as tables.

    Attributes
    ----------
    frame : DataFrame
        One row per experiment (run and task), with the columns of
        :data:`~lm_eval_bh.analysis.table.columns.COLUMNS`; null where not measured.
    layers : DataFrame
        One row per experiment and routed layer, with the columns ``LAYER_COLUMNS``: mean and
        standard deviation of the experts per token; ``usage`` and ``histogram`` are lists of int.
    problems : list of (Path, str)
        Files left out because they are damaged or incomplete, with a remedy.
    notes : list of (Path, str)
        Remarks on files that were read.
    groups : list of Group
        A single group, unless incomparable files were kept in separate groups.
    speeds : list of SpeedFile
        The speed phases of these models.
    """

    frame: pd.DataFrame
    layers: pd.DataFrame
    problems: Notices
    notes: Notices
    groups: list[Group]
    speeds: list[SpeedFile] = field(default_factory=list)
    _runs: dict[str, Run] = field(default_factory=dict, repr=False)
    _documents: dict[tuple[str, str], pd.DataFrame | None] = field(default_factory=dict, repr=False)

    def _repr_html_(self) -> str:
        known = self.frame.dropna(axis="columns", how="all").drop(columns=["file"], errors="ignore")
        table = known.to_html(index=False, max_rows=60, na_rep="", float_format="{:.4g}".format)
        left_out = f"<p>Files left out: {len(self.problems)}.</p>" if self.problems else ""
        return f"{table}{left_out}"

    def documents(self, run_id: str, task: str) -> pd.DataFrame | None:
        """Return lm-eval's samples of an experiment, one row per document, or None.

        Returns
        -------
            Indexed by ``doc_id``, with the columns ``hash`` (document, prompt and target),
            ``output`` (the responses as JSON) and, if the task has them, ``loglikelihood``
            (nats) with ``words``, ``bytes``, ``targets`` and ``tokens`` (scored; only with a
            routing log), ``acc``, ``acc_norm``, ``exact_match``. None without ``--log_samples``.
        """
        key = run_id, task
        if key not in self._documents:
            self._documents[key] = None
            path = self._runs[run_id].samples_file(task)
            if path is not None:
                try:
                    self._documents[key] = read_documents(path, self._runs[run_id].documents(task))
                except DataError as error:
                    self.leave_out(path, error)
        return self._documents[key]

    def internal_routing(self, run_id: str, task: str) -> InternalRouting | None:
        """Return an experiment's internal routing log; None if there is none, or it is damaged."""
        path = self.internal_routing_file(run_id, task)
        if path is None:
            return None
        try:
            log = read_internal_routing(path)
            if log["run_id"] != run_id:
                raise DataError(
                    f"{path} is the log of another run, {log['run_id']}: "
                    "restore the right one, or run the evaluation again."
                )
            return log
        except DataError as error:
            self.leave_out(path, error)
            return None

    def leave_out(self, path: Path, error: DataError) -> None:
        """Add a file to the problems, once."""
        if (path, str(error)) not in self.problems:
            self.problems.append((path, str(error)))

    def internal_routing_file(self, run_id: str, task: str) -> Path | None:
        """Return the path of an experiment's internal routing log, or None."""
        return self._runs[run_id].internal_routing_file(task)

    def log_folder(self, run_id: str) -> Path | None:
        """Return the finished log folder of a run, which may contain token logs, or None."""
        return self._runs[run_id].log_folder
