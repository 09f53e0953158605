"""Registers the model ``hf-bh`` and this package's tasks with any release of lm-eval.

Models: lm-eval 0.4.13 knows only its own models, so a placeholder goes into its registry; later
releases read the entry points of the group ``lm_eval.models`` (they have ``load_plugins``). Tasks:
no release reads them from packages, so every ``TaskManager`` gets one more folder.

:func:`register` is called by ``import lm_eval_bh`` and, through the sibling module ``startup``,
by the import of lm-eval itself, so that its own command line finds everything.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lm_eval_bh.errors import DataError
from lm_eval_bh.resources import shipped

MODEL_NAME = "hf-bh"
MODEL_CLASS = "lm_eval_bh.harness.model:BHLM"

logger = logging.getLogger(__name__)


def register() -> None:
    """Register with the loaded parts of lm-eval, and with the others when they load.

    It does not import lm-eval, and may be called any number of times.
    """
    if "lm_eval.models" in sys.modules:
        _register_model(sys.modules["lm_eval.api.registry"])
    if "lm_eval.tasks.manager" in sys.modules:
        _register_tasks(sys.modules["lm_eval.tasks.manager"])


def _register_model(registry: ModuleType) -> None:
    if hasattr(registry, "load_plugins") or MODEL_NAME in registry.model_registry:
        return
    # A string, which lm-eval resolves on use: the class would import torch and transformers.
    registry.model_registry.register(MODEL_NAME, target=MODEL_CLASS)


def _register_tasks(manager: ModuleType) -> None:
    # A module still being imported has no TaskManager yet: the finder calls again later.
    task_manager = getattr(manager, "TaskManager", None)
    if task_manager is None or hasattr(task_manager, "lm_eval_bh"):
        return
    init = task_manager.__init__
    signature = inspect.signature(init)
    if not {"include_path", "include_defaults"} <= signature.parameters.keys():
        return

    @functools.wraps(init)
    def init_with_tasks(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        asked = call.arguments["include_path"]
        # Without the defaults, a caller only gets the requested folders.
        if call.arguments["include_defaults"]:
            call.arguments["include_path"] = _with_our_tasks(asked)
        init(*call.args, **call.kwargs)
        self.include_path = asked

    task_manager.__init__ = init_with_tasks
    task_manager.lm_eval_bh = True


def _with_our_tasks(asked: Any) -> Any:
    """Put our folder before the user's, whose tasks win, unless it is already included."""
    paths = asked if isinstance(asked, (list, tuple)) else [asked] if asked else []
    try:
        ours = shipped("tasks")
    except DataError as error:
        logger.warning("%s", error)  # lm-eval works without us
        return asked
    if any(ours.resolve().is_relative_to(Path(path).resolve()) for path in paths):
        return asked
    return [ours, *paths]
