"""The three texts of a search: to calibrate and solve on, to choose on, and to confirm on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_eval_bh.errors import DataError
from lm_eval_bh.policies.pretrained import paragraphs
from lm_eval_bh.routing.tables.texts import wikitext_texts

SHARES = (0.6, 0.2)  # of a given text: to calibrate, to choose; the rest confirms
LEAST_DOCUMENTS = 10  # of a part: an interval over fewer says little


@dataclass(frozen=True)
class Splits:
    """Documents of each part; no document is in two.

    Attributes
    ----------
    name : str
        Of the text.
    calibration, validation, confirmation : sequence of str
        What null models and levels are fitted on, what the winner is chosen on, and what it is
        compared on, once.
    """

    name: str
    calibration: Sequence[str]
    validation: Sequence[str]
    confirmation: Sequence[str]

    @classmethod
    def of_wikitext(cls) -> Splits:
        """Return WikiText-2's own three splits."""
        parts = [wikitext_texts(split) for split in ("train", "validation", "test")]
        return cls("WikiText-2", *parts)

    @classmethod
    def of_file(cls, path: Path) -> Splits:
        """Cut the paragraphs of a text file into three parts, in their order.

        Neighbours stay together: paragraphs of one article in two parts would not be unseen.

        Raises
        ------
        DataError
            If the file cannot be read, or has too few paragraphs.
        """
        found = paragraphs(path)
        first = int(SHARES[0] * len(found))
        second = first + int(SHARES[1] * len(found))
        parts = found[:first], found[first:second], found[second:]
        if min(map(len, parts)) < LEAST_DOCUMENTS:
            least = int(LEAST_DOCUMENTS / min(*SHARES, 1 - sum(SHARES)))
            raise DataError(
                f"The text {str(path)!r} has {len(found)} paragraphs, too few to calibrate, choose "
                f"and confirm on: use one with at least {least}, parted by empty lines."
            )
        return cls(path.name, *parts)
