"""The three texts of a search: for calibration, for choices, and for confirmation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_eval_bh.errors import DataError
from lm_eval_bh.policies.paragraphs import read_paragraphs, unseen
from lm_eval_bh.routing.tables.texts import wikitext_texts

SHARES = (0.6, 0.2)  # of a given text: calibration, validation; the rest is for confirmation
LEAST_DOCUMENTS = 10  # per part: an interval over fewer says little
LEAST_LINE = 60  # characters of a line that two texts hardly share by chance


@dataclass(frozen=True)
class Splits:
    """The documents of each part, without repetitions within or between parts.

    Attributes
    ----------
    name : str
        Name of the text.
    calibration, validation, confirmation : sequence of str
        Texts to fit null models and levels on, to choose the winner on, and to compare the winner
        on, once.
    notes : tuple of str
        What was left out.
    """

    name: str
    calibration: Sequence[str]
    validation: Sequence[str]
    confirmation: Sequence[str]
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of all documents."""
        parts = [list(part) for part in (self.calibration, self.validation, self.confirmation)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @classmethod
    def of_wikitext(cls) -> Splits:
        """Return WikiText-2's own three splits."""
        (train, validation, test), repeats = unseen(
            *map(wikitext_texts, ("train", "validation", "test"))
        )
        return cls("WikiText-2", train, validation, test, _left_out(repeats))

    @classmethod
    def of_file(cls, path: Path) -> Splits:
        """Cut the paragraphs of a text file into three consecutive parts.

        Neighbours stay together, since paragraphs of one article in two parts would not be unseen.
        Only the first of equal paragraphs is used.

        Raises
        ------
        DataError
            If the file cannot be read, or has too few paragraphs.
        """
        [found], repeats = unseen(read_paragraphs(path))
        first = int(SHARES[0] * len(found))
        second = first + int(SHARES[1] * len(found))
        parts = found[:first], found[first:second], found[second:]
        if min(map(len, parts)) < LEAST_DOCUMENTS:
            least = int(LEAST_DOCUMENTS / min(*SHARES, 1 - sum(SHARES)))
            several = f" that differ, and {repeats} that repeat others" if repeats else ""
            raise DataError(
                f"The text {str(path)!r} has {len(found)} paragraphs{several}, too few to "
                f"calibrate, choose and confirm on: use one with at least {least} that differ, "
                "separated by empty lines."
            )
        return cls(path.name, *parts, _left_out(repeats))

    def confirmed_on(self, path: Path) -> Splits:
        """Return the same texts with another file for confirmation.

        Overlap with the other parts is found by content: a paragraph is left out if one of its
        longer lines occurs there too, regardless of file, spaces and capitals.

        Raises
        ------
        DataError
            If the file cannot be read, or too little of it is unseen.
        """
        seen = {line for text in (*self.calibration, *self.validation) for line in _lines(text)}
        [found], repeats = unseen(read_paragraphs(path))
        kept = [text for text in found if seen.isdisjoint(_lines(text))]
        if len(kept) < LEAST_DOCUMENTS:
            raise DataError(
                f"The text {str(path)!r} has {len(kept)} unseen paragraphs; "
                f"{len(found) - len(kept)} others share lines with {self.name}, the calibration "
                f"text: use a text with at least {LEAST_DOCUMENTS} unseen ones."
            )
        notes = _left_out(repeats)
        if len(kept) < len(found):
            notes += (
                f"{len(found) - len(kept)} paragraphs of {path.name} occur wholly or partly in the "
                f"calibration text of {self.name}, and were left out.",
            )
        return dataclasses.replace(
            self, name=f"{path.name} after {self.name}", confirmation=kept, notes=self.notes + notes
        )


def _lines(text: str) -> set[str]:
    """Return a text and its longer lines, normalised for comparison."""
    whole, *lines = (" ".join(part.split()).casefold() for part in (text, *text.splitlines()))
    return {whole, *(line for line in lines if len(line) >= LEAST_LINE)}


def _left_out(repeats: int) -> tuple[str, ...]:
    if not repeats:
        return ()
    return (
        f"{repeats} paragraphs repeat earlier ones and were left out: text used for calibration is "
        "not unseen, and a repeated text is not a second document.",
    )
