"""Task names: this package's immediately, lm-eval's after indexing them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval_bh.errors import ParameterError, did_you_mean
from lm_eval_bh.resources import shipped


def new_task_manager(
    *, defaults: bool, metadata: dict[str, Any] | None = None, include_path: str | None = None
) -> Any:
    """Return lm-eval's ``TaskManager`` for our tasks; with ``defaults``, its 14,000 too.

    A folder of tasks from the user is read after ours, so that its tasks win. Indexing lm-eval's
    tasks takes 12 seconds or more, ours some milliseconds. Tasks get the metadata when they load.
    """
    from lm_eval.tasks import TaskManager

    paths = [str(shipped("tasks")), *([include_path] if include_path else [])]
    return TaskManager(include_path=paths, include_defaults=defaults, metadata=metadata)


_known = cache(new_task_manager)


def are_ours(names: Sequence[str], include_path: str | None = None) -> bool:
    """Return whether all tasks are in this package or the folder, and need no index."""
    known = _known(defaults=False, include_path=include_path).task_index
    return all(name in known for name in names)


def expand_tasks(names: Sequence[str], include_path: str | None = None) -> list[str]:
    """Replace tags by their tasks, without loading any data.

    Raises
    ------
    ParameterError
        If a name is unknown, or is a group, whose tasks must be named one by one.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ParameterError(
            f"include_path={include_path!r} is not a folder: name one that holds the YAML files of "
            "tasks."
        )
    ours = _known(defaults=False, include_path=include_path)
    for name in names:
        if name.startswith("bh_") and name not in ours.task_index:  # lm-eval's index is not needed
            raise _unknown(name, ours)
    own = are_ours(names, include_path)
    manager = ours if own else _known(defaults=True, include_path=include_path)
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
