"""The three texts of a search: to calibrate and solve on, to choose on, and to confirm on."""

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

SHARES = (0.6, 0.2)  # of a given text: to calibrate, to choose; the rest confirms
LEAST_DOCUMENTS = 10  # of a part: an interval over fewer says little
LEAST_LINE = 60  # characters of a line that two texts do not share by chance


@dataclass(frozen=True)
class Splits:
    """Documents of each part; no document is in two, nor twice in one.

    Attributes
    ----------
    name : str
        Of the text.
    calibration, validation, confirmation : sequence of str
        What null models and levels are fitted on, what the winner is chosen on, and what it is
        compared on, once.
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
        """A SHA-256, in hex, of all documents."""
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
        """Cut the paragraphs of a text file into three parts, in their order.

        Neighbours stay together: paragraphs of one article in two parts would not be unseen. Of
        equal paragraphs the first is taken.

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
            several = f" that differ, and {repeats} that repeat one of them" if repeats else ""
            raise DataError(
                f"The text {str(path)!r} has {len(found)} paragraphs{several}, too few to "
                f"calibrate, choose and confirm on: use one with at least {least} that differ, "
                "parted by empty lines."
            )
        return cls(path.name, *parts, _left_out(repeats))

    def confirmed_on(self, path: Path) -> Splits:
        """Return the same texts to calibrate and choose on, and another file to confirm on.

        What was calibrated or chosen on is found by content: a paragraph is left out if one of its
        lines of some length stands there too, whatever the file, spaces and capitals.

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
                f"The text {str(path)!r} has {len(kept)} paragraphs that are unseen, and "
                f"{len(found) - len(kept)} of which {self.name} holds a part, which was calibrated "
                f"on: use a text with at least {LEAST_DOCUMENTS} others."
            )
        notes = _left_out(repeats)
        if len(kept) < len(found):
            notes += (
                f"{len(found) - len(kept)} paragraphs of {path.name} stand in the calibration text "
                f"of {self.name} in part or whole, and were left out.",
            )
        return dataclasses.replace(
            self, name=f"{path.name} after {self.name}", confirmation=kept, notes=self.notes + notes
        )


def _lines(text: str) -> set[str]:
    """Return a text and its lines that are long enough to be nobody else's, as they compare."""
    whole, *lines = (" ".join(part.split()).casefold() for part in (text, *text.splitlines()))
    return {whole, *(line for line in lines if len(line) >= LEAST_LINE)}


def _left_out(repeats: int) -> tuple[str, ...]:
    if not repeats:
        return ()
    return (
        f"{repeats} paragraphs repeat an earlier one and were left out: a text that was calibrated "
        "on is not unseen, and the same text twice is no second document.",
    )
