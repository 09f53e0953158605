"""Evaluations in this process: lm-eval's own evaluator, our tasks, the shipped model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from two_processes import launch  # noqa: F401  a fixture

from lm_eval_bh.resources import shipped


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., dict[str, Any]]:
    """Return a function that runs lm-eval on tasks of ours, without indexing its 14,000 own."""
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)

    def run(model: str, model_args: str, tasks: list[Any], **options: Any) -> dict[str, Any]:
        options = {"batch_size": 8, "bootstrap_iters": 0, "device": "cpu"} | options
        return lm_eval.simple_evaluate(
            model=model, model_args=model_args, tasks=tasks, task_manager=manager, **options
        )

    return run
