"""Runs the script of an engine in its own environment, and believes no file before checking it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from lm_eval_bh.errors import ModelError
from lm_eval_bh.validation import mismatch, shown

# The last lines of what a failing engine says are read, however much it says.
MOST_SAID = 65_536  # bytes


class EngineScores(TypedDict):
    """What :mod:`~lm_eval_bh.export.engine_scores` writes, for documents in the order given."""

    log_probs: list[list[float | None]]  # of every token but a document's first
    counts: list[list[int]] | None  # experts of each token, a list for each router's call
    seconds: float
    generated: list[int]
    engine: str


def run_script(command: Sequence[str], folder: Path, seconds: float) -> tuple[int, str]:
    """Run a command to its end, and return its exit code and the last line that it complained with.

    Parameters
    ----------
    command : sequence of str
        The program first.
    folder : Path
        Where its messages are kept: a pipe would wait for helpers that outlive the program.
    seconds : float
        After these the program is killed with all helpers that it has started.

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
            start_new_session=True,  # so that its helpers can be killed with it
        )
    try:
        code = process.wait(seconds)
    except BaseException:  # Ctrl-C too, which does not reach another session
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
    """Read what an engine wrote.

    Scores may be missing, at the end of a document or within; they are counted where they are
    compared. More than there are tokens would belong to other documents.

    Raises
    ------
    ModelError
        If there is no such file, or it is not what :class:`EngineScores` describes.
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
            "run verify again, and where it stays so report which release of the engine this is."
        )
    scores: EngineScores = found
    return scores


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
