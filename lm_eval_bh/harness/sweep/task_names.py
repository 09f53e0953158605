"""The names of tasks: ours at once, lm-eval's own after it has indexed them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.resources import shipped


def new_task_manager(*, defaults: bool, metadata: dict[str, Any] | None = None) -> Any:
    """Return lm-eval's ``TaskManager`` over our tasks, with ``defaults`` over its own 14,000 too.

    Indexing those takes 12 seconds or more, ours some milliseconds. Tasks are told the metadata
    when they load.
    """
    from lm_eval.tasks import TaskManager

    ours = str(shipped("tasks"))
    return TaskManager(include_path=ours, include_defaults=defaults, metadata=metadata)


_known = cache(new_task_manager)


def are_ours(names: Sequence[str]) -> bool:
    """Whether all tasks are of this package, so that lm-eval's own need no index."""
    return all(name in _known(defaults=False).task_index for name in names)


def expand_tasks(names: Sequence[str]) -> list[str]:
    """Replace tags by their tasks, without loading any data.

    Raises
    ------
    ParameterError
        If a name is unknown, or a group, whose tasks are to be named one by one.
    """
    ours = _known(defaults=False)
    for name in names:
        if name.startswith("bh_") and name not in ours.task_index:  # no need for lm-eval's index
            raise _unknown(name, ours)
    manager = ours if are_ours(names) else _known(defaults=True)
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
    hint = hint or f" (ours are {', '.join(_known(defaults=False).all_tasks)})"
    return ParameterError(f"The task {name!r} is unknown{hint}: `lm_eval ls tasks` lists all.")
