"""The folder of a run's routing logs, which is complete once it has a manifest."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval_bh.errors import DataError
from lm_eval_bh.files import replacing
from lm_eval_bh.schema import MANIFEST, SCHEMA_VERSION, TOKENS


class LogFolder:
    """The folder ``<log_dir>/<run id>``.

    Every process writes its own parts; the first one writes the manifest at the end.

    Parameters
    ----------
    log_dir : Path
        Made if it is missing, by :meth:`create`.
    run_id : str
        Run id, the same on every process.
    rank : int
        Rank of this process.
    """

    def __init__(self, log_dir: Path, run_id: str, rank: int) -> None:
        self.path = log_dir / run_id
        self.rank = rank

    def create(self) -> None:
        """Make the folder, unless it exists."""
        with explaining(self.path):
            (self.path / TOKENS).mkdir(parents=True, exist_ok=True)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, completely or not at all."""
        self.write(name, lambda path: path.write_text(json.dumps(content) + "\n", encoding="utf-8"))

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Let ``write`` fill a temporary file, then rename it."""
        self.create()
        with explaining(self.path), replacing(self.path / name) as temporary:
            write(temporary)

    def finish(self, run_id: str, files: list[str], token_rows: int) -> None:
        """Write the manifest, which marks the logs as complete."""
        self.write_json(
            MANIFEST,
            {
                "schema_version": SCHEMA_VERSION,
                "run_id": run_id,
                "files": files,
                "token_rows": token_rows,
            },
        )


def check_writable(log_dir: Path) -> None:
    """Raise :class:`DataError` if logs cannot be written to a folder; make it if missing."""
    with explaining(log_dir):
        log_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=log_dir):
            pass


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn a failure to write into an error that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = (
            "free some space or log less with log_routing=summary; finished files are intact"
            if full
            else "give a log_dir that can be written to"
        )
        raise DataError(
            f"The routing log in {path} cannot be written ({error.strerror or error}): {advice}."
        ) from error
