"""Names that options and commands had in earlier releases: they still work, and say the new one.

An option has one name, the first of its declaration; the long names behind it are former ones, as
in ``typer.Option("--model", "--pretrained")``. Neither help nor completion shows former names.
"""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

from lm_eval_bh.cli.printing import PROGRAM, warn

# Commands of release 0.2, and where what they did is now.
FORMER_COMMANDS: dict[str, tuple[str, ...]] = {
    "plot": ("report", "--figure"),
    "patterns": ("report", "--patterns"),
    "analyze": ("tune", "--preview"),
    "export": ("policy", "export"),
    "verify": ("policy", "verify"),
    "path": ("doctor", "path"),
}


class Command(TyperCommand):
    """A command whose options may have former names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = _unwrapped(self.help)
        self.former = _take_former_names(self.params)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line, with former names of options in the place of the new ones."""
        return super().parse_args(ctx, _renamed(args, self.former))


class Commands(TyperGroup):
    """A command with subcommands; the one at the root knows the former names of commands."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.help = _unwrapped(self.help)
        self.former = _take_former_names(self.params)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line, with former names in the place of the new ones."""
        if ctx.parent is None and args and args[0] in FORMER_COMMANDS:
            now = FORMER_COMMANDS[args[0]]
            warn(f"note: {PROGRAM} {args[0]} is now called {PROGRAM} {' '.join(now)}.")
            args = [*now, *args[1:]]
        inside = next((n for n, word in enumerate(args) if word in self.commands), len(args))
        own = _renamed(args[:inside], self.former)
        return super().parse_args(ctx, [*own, *args[inside:]])


def _unwrapped(text: str | None) -> str | None:
    """Return a docstring with one line per paragraph, which the terminal wraps."""
    return text and re.sub(r"(?<!\n)\n(?!\n) *", " ", text)


def _take_former_names(params: list[Any]) -> dict[str, str]:
    """Take the former names out of the declarations; return the new name of each."""
    former: dict[str, str] = {}
    for option in params:
        if option.param_type_name == "option":
            name, *others = [word for word in option.opts if word.startswith("--")]
            former |= dict.fromkeys(others, name)
            option.opts = [word for word in option.opts if word not in others]
    return former


def _renamed(args: list[str], former: dict[str, str]) -> list[str]:
    """Return the arguments with the new names of options; a line says what each is called now."""
    words: list[str] = []
    for number, word in enumerate(args):
        if word == "--":
            return [*words, *args[number:]]
        name, *value = word.split("=", 1)
        if name in former:
            warn(f"note: {name} is now called {former[name]}.")
            word = "=".join([former[name], *value])
        words.append(word)
    return words
