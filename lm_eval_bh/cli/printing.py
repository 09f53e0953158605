"""Everything that the command prints: text and tables as they are, never read as markup.

A model may be called ``x/[/b]`` and a file ``a[red]b``: names reach the terminal unchanged. What a
terminal would obey, such as an escape sequence in a file's name, is shown in its escaped form.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

PROGRAM = "lm-eval-bh"


def prepare_streams() -> None:
    """Let stdout and stderr show names that their encoding lacks, rather than fail on them.

    Where nobody watches, the libraries that load models draw no progress bars either. A line that
    is written into a file or a pipe is there at once.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace", line_buffering=True)


def say(text: object) -> None:
    """Print one line on stdout."""
    typer.echo(_visible(text))


def warn(text: object) -> None:
    """Print one line on stderr."""
    typer.echo(_visible(text), err=True)


def fail(sentence: object) -> None:
    """Print the sentence that a command ends with."""
    warn(f"{PROGRAM}: error: {sentence}")


def show(table: Table) -> None:
    """Print a table on stdout, as wide as the terminal."""
    from rich.console import Console

    Console(markup=False, emoji=False, highlight=False).print(table)


def say_written(paths: Iterable[Path]) -> None:
    """Say which files there are now."""
    for path in paths:
        say(f"Written to {path}")


def _visible(text: object) -> str:
    """Return a text as one line that holds nothing but printable characters."""
    line = " ".join(str(text).splitlines())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
