"""Checks in a separate process that the stock lm_eval finds the model and the tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from lm_eval_bh.doctor.finding import PROBLEM, Finding
from lm_eval_bh.harness.plugin.registration import MODEL_NAME
from lm_eval_bh.resources import shipped

SECONDS = 120
# Like lm_eval's command line; nothing here imports this package.
ASK = f"""
import json
import lm_eval.models
from lm_eval.api import registry
if hasattr(registry, "load_plugins"):
    registry.load_plugins()
from lm_eval.tasks import TaskManager
print(json.dumps({{
    "model": {MODEL_NAME!r} in registry.model_registry,
    "tasks": hasattr(TaskManager, "lm_eval_bh"),
}}))
"""
REINSTALL = "reinstall lm-eval-bh, or run lm-eval-bh lm-eval, which takes the same arguments"


def check_harness() -> Iterator[Finding]:
    """Yield whether a new process of lm-eval knows ``hf-bh``, and the tasks of this package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:  # so that no checkout is found
        try:
            done = subprocess.run(
                [sys.executable, "-c", ASK],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=True,
            )
            found = json.loads(done.stdout.splitlines()[-1])
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
            yield Finding(
                "lm_eval", f"cannot be imported: {reason}", PROBLEM, "pip install --upgrade lm-eval"
            )
            return
        except (subprocess.TimeoutExpired, OSError, ValueError, IndexError) as error:
            yield Finding("lm_eval", f"did not answer: {error}", PROBLEM, "run lm_eval ls models")
            return
    if found["model"]:
        yield Finding("lm_eval", f"finds the model {MODEL_NAME}")
    else:
        yield Finding("lm_eval", f"does not find the model {MODEL_NAME}", PROBLEM, REINSTALL)
    names = sorted(path.stem for path in shipped("tasks").glob("bh_*.yaml"))
    if found["tasks"] and names:
        yield Finding("tasks", f"found: {', '.join(names)}")
    else:
        yield Finding("tasks", "lm_eval does not find those of this package", PROBLEM, REINSTALL)
