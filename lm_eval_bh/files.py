"""Writes files completely or not at all, and checks beforehand that they can be written."""

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
    """Return a path given as text or as a Path.

    Raises
    ------
    ParameterError
        If it is anything else.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise ParameterError(f"A path must be text or a Path: found {value!r:.60}.")
    return Path(value)


def figure_format(path: Path | str) -> str:
    """Return the format of a figure by its file name: png, pdf or svg.

    Raises
    ------
    ParameterError
        If the name has another ending.
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

    The folder is made if missing. After an exception the temporary file is removed and ``path`` is
    unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        as_new(temporary)  # mkstemp makes files readable only by their owner
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def unwritable(folder: Path) -> str | None:
    """Make a folder, and return why no file can be created in it, or None if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror or error}"


def as_new(path: Path) -> None:
    """Give a file the default permissions of new files."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_text(path: Path, content: str) -> Path:
    """Write UTF-8 text with Unix line ends, completely or not at all; return the path."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="\n")
    return path


@contextmanager
def replacing_all(paths: Iterable[Path]) -> Iterator[list[Path]]:
    """Yield a temporary path for each of ``paths``; all are renamed, or none after an error.

    Nothing is renamed before everything is written, so that files that belong together change
    together.
    """
    with ExitStack() as files:
        yield [files.enter_context(replacing(path)) for path in paths]


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, renamed to it if the block succeeds.

    An existing folder at ``path`` is then removed. After an exception the temporary folder is
    removed and ``path`` is unchanged.
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
    """Check in advance that a file, or files in a folder, can be written.

    Nothing is left behind: no file and no new folder.

    Parameters
    ----------
    path : Path
        Path for :func:`replacing`, or with ``folder`` the folder to write into.
    option : str
        Command-line option of the path, for the message.

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
