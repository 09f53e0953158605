"""Reads folders of finished experiments into one tidy table.

An experiment is one run of lm-eval on one task. Its row joins what lm-eval measured
(``results_*.json`` and, with ``--log_samples``, ``samples_<task>_*.jsonl``) with the routing
summary (``config.bh`` in the same file) and the log folder of that run id, if any.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from lm_eval_bh.analysis.read.groups import difference, group_runs
from lm_eval_bh.analysis.read.loaded import Loaded
from lm_eval_bh.analysis.read.model_arguments import model_of, one_name
from lm_eval_bh.analysis.read.run_folders import find_files, read_runs, read_speeds
from lm_eval_bh.analysis.read.sweep_losses import lost_files
from lm_eval_bh.analysis.table import joining
from lm_eval_bh.analysis.table.chance import add_chance
from lm_eval_bh.analysis.table.columns import COLUMNS, LAYER_COLUMNS, typed
from lm_eval_bh.analysis.table.matched_budget import matched_budget
from lm_eval_bh.analysis.table.perplexities import fill_perplexity
from lm_eval_bh.analysis.table.rows import check, layer_rows, row_of
from lm_eval_bh.analysis.table.speed_phase import add_speed
from lm_eval_bh.errors import DataError, ParameterError


def load_experiments(
    folders: Iterable[Path | str], *, force: bool = False, context_length: int | None = None
) -> Loaded:
    """Read all experiments in and below some folders.

    Parameters
    ----------
    folders : iterable of Path or str
        Folders of ``lm_eval --output_path`` or of a sweep, with ``--model hf-bh`` or, for
        baselines, ``--model hf``; also single results files.
    force : bool
        Keep incomparable experiments in separate groups instead of raising an error.
    context_length : int, optional
        Number of positions that a token attends to, for counting FLOPs. By default the longest
        window that the run allowed, which tends to understate the savings of fewer experts.

    Raises
    ------
    ParameterError
        If ``context_length`` is not positive.
    DataError
        If a folder does not exist, if there are no results, or, without ``force``, if files differ
        in limit, task version, task hash, model or few-shot settings.
    """
    if context_length is not None and context_length < 1:
        raise ParameterError(f"context_length must be 1 or more, not {context_length}.")
    roots = [Path(folder) for folder in folders]
    found = find_files(roots)
    if not found.results:
        raise DataError(
            f"There is no results_*.json below {', '.join(map(str, roots))}: "
            "run lm_eval with --output_path, or use the folder that it was given"
            + (f", or the file {found.notes[0][0]} itself." if found.notes else ".")
        )
    loaded = Loaded(pd.DataFrame(), pd.DataFrame(), found.problems, found.notes, [])
    runs = list(read_runs(found.results, found.logs, check, loaded.problems, loaded.notes))
    loaded.problems += lost_files(found.sweeps)
    loaded._runs = {run.run_id: run for run in runs}
    loaded.groups = group_runs(runs, loaded.documents)
    if len(loaded.groups) > 1 and not force:
        raise DataError(difference(runs, loaded.groups, loaded.documents))
    group_of = {file: group.number for group in loaded.groups for file in group.files}

    models = {model_of(run.content): run.info for run in runs if run.info is not None}
    rows, layers = [], []
    for run in runs:
        for task in run.tasks:
            common = {"run_id": run.run_id, "task": task, "group": group_of[run.file]}
            name = model_of(run.content)
            row = row_of(run, task, models.get(name), context_length)
            rows.append(row | common | {"_model": name})
            layers += [common | layer for layer in layer_rows(run.summary(task))]
    joining.add_token_perplexity(rows, loaded)
    add_chance(rows, loaded)
    joining.add_average_accuracy(rows)
    joining.add_stability(rows, loaded)
    names = {row["_model"] for row in rows}
    speeds = read_speeds(found.speeds, loaded.problems)
    loaded.speeds = [one for one in speeds if one_name(one["model"]) in names]
    add_speed(rows, loaded.speeds)
    rows.sort(key=joining.order)
    loaded.frame = typed(rows, COLUMNS)
    for name, column in matched_budget(loaded.frame).items():
        loaded.frame[name] = column.astype(COLUMNS[str(name)])
    fill_perplexity(loaded.frame)
    number = {(row["run_id"], row["task"]): i for i, row in enumerate(rows)}
    layers.sort(key=lambda layer: (number[layer["run_id"], layer["task"]], layer["layer"]))
    loaded.layers = pd.DataFrame(layers, columns=list(LAYER_COLUMNS))
    return loaded
