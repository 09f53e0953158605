"""Parses command lines without running them."""

from __future__ import annotations

import shlex
from typing import Any

import typer.main

from lm_eval_bh.cli.app import app


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """Return a line's command, and the values of its options and arguments."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("lm-eval-bh", shlex.split(line))
    while words := [*getattr(context, "_protected_args", []), *context.args]:
        name, command, rest = command.resolve_command(context, words)
        context = command.make_context(name, rest, parent=context)
    return context.command_path, dict(context.params)


def commands() -> dict[str, Any]:
    """Return every command and subcommand by its path, except lm-eval, which lm_eval parses."""
    found: dict[str, Any] = {}

    def add(path: str, command: Any) -> None:
        found[path] = command
        for name, inner in getattr(command, "commands", {}).items():
            add(f"{path} {name}".strip(), inner)

    add("", typer.main.get_command(app))
    del found["lm-eval"]
    return found
