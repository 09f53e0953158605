"""Runs the script of an engine in its own environment, and checks the file it returns."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from lm_eval_bh.errors import ModelError
from lm_eval_bh.validation import mismatch, shown

# Only the last bytes of a failing engine's messages are read.
MOST_SAID = 65_536  # bytes


class EngineScores(TypedDict):
    """Result of :mod:`~lm_eval_bh.export.engine_scores`, for documents in the given order."""

    log_probs: list[list[float | None]]  # of every token except a document's first
    counts: list[list[int]] | None  # experts per token, one list per call of a router
    seconds: float
    generated: list[int]
    engine: str


def run_script(command: Sequence[str], folder: Path, seconds: float) -> tuple[int, str]:
    """Run a command, and return its exit code and the last line of its error output.

    Parameters
    ----------
    command : sequence of str
        The program and its arguments.
    folder : Path
        Folder for its messages: a pipe would wait for helpers that outlive the program.
    seconds : float
        Time after which the program and its helpers are killed.

    Raises
    ------
    OSError
        If the program cannot be started.
    subprocess.TimeoutExpired
        If it takes longer.
    """
    messages = folder / "messages.txt"
    with messages.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,  # so that its helpers can be killed too
        )
    try:
        code = process.wait(seconds)
    except BaseException:  # also Ctrl-C, which does not reach another session
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if code < 0:
        return code, f"signal {-code} ended it"
    with messages.open("rb") as file:
        file.seek(max(0, messages.stat().st_size - MOST_SAID))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return code, next((line.strip() for line in reversed(lines) if line.strip()), "no message")


def read_scores(path: Path, documents: Sequence[Sequence[int]], engine: str) -> EngineScores:
    """Read the scores that an engine wrote.

    Scores may be missing at the end of a document or within it; the comparison counts them. More
    scores than tokens would belong to other documents.

    Raises
    ------
    ModelError
        If there is no such file, or it does not match :class:`EngineScores`.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no file")
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        wrong = mismatch(found, EngineScores, "its result") or _other_shape(found, documents)
    except (OSError, ValueError, RecursionError) as error:
        wrong = f"its result cannot be read: {str(error).rstrip('.') or 'it is nested too deeply'}"
    if wrong:
        raise ModelError(
            f"The engine {engine} did not return the scores of these documents ({wrong}): "
            "run verify again, and if it fails again, report the engine's release."
        )
    return cast(EngineScores, found)


def _other_shape(found: EngineScores, documents: Sequence[Sequence[int]]) -> str | None:
    if len(found["log_probs"]) != len(documents):
        return f"scores of {len(found['log_probs'])} documents instead of {len(documents)}"
    for number, (scores, ids) in enumerate(zip(found["log_probs"], documents, strict=True)):
        if len(scores) >= len(ids):
            return f"{len(scores)} scores for {len(ids) - 1} tokens of document {number}"
    if not (math.isfinite(found["seconds"]) and found["seconds"] > 0):
        return f"its result.seconds must be more than 0, not {found['seconds']}"
    if not found["engine"].isprintable():  # it is shown in a terminal
        return f"its result.engine must be a name, not {shown(found['engine'])}"
    return None
