"""Whether a policy that was found loses accuracy on tasks: paired, within a stated margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = "tasks"


def compare_tasks(
    policy: Path,
    pretrained: str,
    tasks: Sequence[str],
    *,
    native: int,
    nearest: int,
    margin: float,
    limit: int | None,
    batch_size: int,
    dtype: str,
    device: str | None,
) -> list[dict[str, Any]]:
    """Run tasks with the model as it is, with static top-k near the policy's mean, and with it.

    Finished runs in the folder ``tasks`` beside the policy are kept.

    Parameters
    ----------
    policy : Path
        Its file.
    pretrained, tasks, limit, batch_size, dtype, device
        As ``lm-eval-bh sweep`` takes them.
    native, nearest : int
        The model's own top-k, and the static one that the policy is compared with too.
    margin : float
        Difference of a score that does not matter.

    Returns
    -------
    list of dict
        For each task and score of which more is better: ``task``, ``metric``, ``native``,
        ``policy``, ``difference``, ``low``, ``high`` (95 %, paired by document), ``margin``,
        ``verdict`` ("non-inferior", "inferior" or "undecided"), and ``from_topk`` (difference, low,
        high against static top-k). One with ``reason`` was not compared.
    """
    from lm_eval_bh.analysis.compare.two_runs import compare_runs
    from lm_eval_bh.harness.sweep.runner import plan, run
    from lm_eval_bh.harness.sweep.sweep_config import SweepConfig

    config = SweepConfig(
        pretrained=pretrained,
        tasks=tuple(tasks),
        baselines=tuple(dict.fromkeys((native, nearest))),
        policies=(str(policy),),
        limit=limit,
        batch_size=batch_size,
        log_routing="summary",
        model_args={} if dtype == "auto" else {"dtype": dtype},
    )
    todo = plan(config, policy.parent / FOLDER)
    run(todo, device=device)
    found: list[dict[str, Any]] = []
    for task in config.tasks:
        folders = {
            e.max_k if e.policy is None else "policy": todo.folder.run(e)
            for e in todo.experiments
            if e.task == task
        }
        tables = [
            compare_runs(folders[k], folders["policy"], accuracy_margin=margin).table
            for k in (native, nearest)
        ]
        rows = [_row(one, other, margin) for one, other in zip(*map(_rows, tables), strict=True)]
        found += [row for row in rows if row is not None] or [
            {"task": task, "reason": "it has no score of which more is better"}
        ]
    return found


def _rows(table: Any) -> list[dict[str, Any]]:
    return [dict(row) for _, row in table.iterrows()]


def _row(native: dict[str, Any], topk: dict[str, Any], margin: float) -> dict[str, Any] | None:
    if native["reason"] is not None:
        return {"task": native["task"], "reason": native["reason"]}
    if native["higher_is_better"] is not True:
        return None
    low, high = native["difference_low"], native["difference_high"]
    otherwise = "inferior" if high < -margin else "undecided"
    return {
        "task": native["task"],
        "metric": native["metric"],
        "documents": int(native["documents"]),
        "native": native["a"],
        "policy": native["b"],
        **dict(zip(("difference", "low", "high"), (native["difference"], low, high), strict=True)),
        "margin": margin,
        "verdict": "non-inferior" if low > -margin else otherwise,
        "from_topk": {
            name: _finite(topk[column])
            for name, column in (
                ("difference", "difference"),
                ("low", "difference_low"),
                ("high", "difference_high"),
            )
        },
    }


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, float) and math.isfinite(value) else None
