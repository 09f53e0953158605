"""Writes files so that a reader never meets half of one, and checks before the work that it can."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lm_eval_bh.errors import DataError, ParameterError

FIGURES = ("png", "pdf", "svg")
TEMPORARY = ".tmp"


def as_path(value: Any) -> Path:
    """Return a path that was given as text or as a Path.

    Raises
    ------
    ParameterError
        If it is anything else.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise ParameterError(f"A path must be text or a Path: found {value!r:.60}.")
    return Path(value)


def figure_format(path: Path | str) -> str:
    """Return the format that a figure's file name asks for: png, pdf or svg.

    Raises
    ------
    ParameterError
        If it asks for any other.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FIGURES:
        raise ParameterError(
            f"{path} does not end in the name of a figure format: "
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
    handle, name = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        as_new(temporary)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def unwritable(folder: Path) -> str | None:
    """Make a folder, and say in a few words why no file can be made in it; None if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror or error}"


def as_new(path: Path) -> None:
    """Give a file the permissions of any new file."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_text(path: Path, content: str) -> Path:
    """Write a text as UTF-8 with Unix line ends, whole or not at all, and return its path."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="\n")
    return path


@contextmanager
def replacing_all(paths: Iterable[Path]) -> Iterator[list[Path]]:
    """Yield a temporary path for each of ``paths``: all are renamed, or, after an exception, none.

    Nothing is renamed before everything is written, so that files that belong together change
    together.
    """
    with ExitStack() as files:
        yield [files.enter_context(replacing(path)) for path in paths]


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, renamed to it if the block succeeds.

    A folder that ``path`` was before is removed then. After an exception the temporary folder is
    gone and ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(TEMPORARY, f".{path.name}.", path.parent) as home:
        new, old = Path(home) / "new", Path(home) / "old"
        new.mkdir()
        yield new
        if path.exists():
            path.replace(old)
        new.replace(path)


def check_output(path: Path, option: str, *, folder: bool = False) -> None:
    """Find out before the work whether a file, or files in a folder, can be written.

    Nothing is left behind: no file, and no folder that was missing.

    Parameters
    ----------
    path : Path
        What :func:`replacing` will be given, or with ``folder`` the folder to write into.
    option : str
        What it was given with; the message names it.

    Raises
    ------
    DataError
        If writing would fail.
    """
    file = path / "file" if folder else path
    try:
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        nearest = next(parent for parent in file.parents if parent.exists())
        with tempfile.NamedTemporaryFile(prefix=f".{file.name}.", suffix=TEMPORARY, dir=nearest):
            pass
    except OSError as error:
        what = "a folder" if folder else "a file in a folder"
        raise DataError(
            f"{option} cannot be written: {path} ({error.strerror or error}); "
            f"name {what} that you can write to."
        ) from error
