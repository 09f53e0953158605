"""Names figures' formats, and writes files so that a reader never meets half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lm_eval_bh.errors import ParameterError

FIGURES = ("png", "pdf", "svg")


def figure_format(path: Path | str) -> str:
    """Return the format that a figure's file name asks for: png, pdf or svg.

    Raises
    ------
    ParameterError
        If it asks for another one.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FIGURES:
        raise ParameterError(
            f"{path} is of no format that figures are written in: "
            f"name a file that ends in {', '.join(FIGURES)}."
        )
    return suffix


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, renamed to it if the block succeeds.

    The folder is made if it is missing. After an exception the temporary file is gone and whatever
    ``path`` held before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> Path:
    """Write a text as UTF-8 with Unix line ends, whole or not at all, and return its path."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="\n")
    return path
