"""Notes on what an import skipped, aligned or took for filler, as sentences to act on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

NAMED = 5  # names listed in a sentence; further ones are counted


@dataclass
class _Subject:
    names: list[str] = field(default_factory=list)
    number: int = 0


class Notes:
    """Sentences, each kept once, with the names or the number of things that it is about."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], _Subject] = {}

    def add(self, sentence: str) -> None:
        """Note a sentence."""
        self._of.setdefault(("", sentence), _Subject())

    def name(self, what: str, sentence: str) -> None:
        """Note a sentence about something that has a name, such as a response of a file."""
        found = self._of.setdefault(("", sentence), _Subject())
        found.number += 1
        if len(found.names) < NAMED:
            found.names.append(what)

    def count(self, number: int, what: str, sentence: str) -> None:
        """Note a sentence about a number of things, such as tokens of a file, unless it is zero."""
        if number:
            self._of.setdefault((what, sentence), _Subject()).number += number

    def __iter__(self) -> Iterator[str]:
        """Return the sentences in order of first appearance."""
        for (what, sentence), found in self._of.items():
            if what:
                yield f"{found.number} {what} {sentence}"
            elif found.names:
                more = found.number - len(found.names)
                names = ", ".join(found.names) + (f" and {more} more" if more else "")
                yield f"{names}: {sentence}"
            else:
                yield sentence


def numbers(values: list[int]) -> str:
    """Write numbers for a sentence, as in ``0, 3 to 7``."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], value]
        else:
            runs.append([value])
    return ", ".join(" to ".join(map(str, run)) for run in runs)


def layers_of(values: list[int]) -> str:
    """Write layer numbers for a sentence, as in ``layer 0`` or ``layers 0, 3 to 7``."""
    return f"layer{'s' if len(values) > 1 else ''} {numbers(values)}"
