"""The names of tasks: ours at once, lm-eval's own after it has indexed them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.resources import shipped


@cache
def task_manager(defaults: bool = False) -> Any:
    """Return lm-eval's ``TaskManager`` over our tasks, with ``defaults`` over its own 14,000 too.

    Indexing those takes 12 seconds or more, ours some milliseconds.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(shipped("tasks")), include_defaults=defaults)


def manager_of(names: Sequence[str]) -> Any:
    """Return the ``TaskManager`` that knows all of the names: ours wherever it is enough."""
    ours = task_manager()
    strangers = [name for name in names if name not in ours.task_index]
    return task_manager(defaults=True) if strangers else ours


def expand_tasks(names: Sequence[str]) -> list[str]:
    """Replace tags by their tasks, without loading any data.

    Raises
    ------
    ParameterError
        If a name is unknown, or a group, whose tasks are to be named one by one.
    """
    ours = task_manager()
    for name in names:
        if name.startswith("bh_") and name not in ours.task_index:  # no need for lm-eval's index
            raise _unknown(name, ours)
    manager = manager_of(names)
    found: list[str] = []
    for name in names:
        if name not in manager.task_index:
            raise _unknown(name, manager)
        if name in manager.all_groups:
            raise ParameterError(f"{name!r} is a group of tasks: name the tasks one by one.")
        found += sorted(manager.task_index[name].tags) if name in manager.all_tags else [name]
    return list(dict.fromkeys(found))


def _unknown(name: str, manager: Any) -> ParameterError:
    hint = did_you_mean(name, manager.all_tasks)
    hint = hint or f" (ours are {', '.join(task_manager().all_tasks)})"
    return ParameterError(f"The task {name!r} is unknown{hint}: `lm_eval ls tasks` lists all.")
