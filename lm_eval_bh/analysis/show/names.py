"""Literal names in figures: matplotlib would read $...$ as mathematics and use one font."""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

BOX = "\N{WHITE SQUARE}"  # for characters that no font has
# matplotlib's own labels of a logarithmic axis.
_POWER = re.compile(r"\$\\mathdefault\{[-\N{MINUS SIGN}0-9.^{} ]*(\\times)?[-0-9.^{} ]*\}\$")


def show_names(figure: Figure) -> None:
    """Make every text of a figure literal, before the layout.

    Dollar signs stay dollar signs. Characters that the figure's font lacks, such as Chinese ones,
    come from another font of this machine; if no font has them, the figure shows boxes, with one
    warning.
    """
    from matplotlib.text import Text

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if (boxed := [_boxed(label) for label in labels]) != labels:
            axis.set_ticks(axis.get_majorticklocs(), boxed)  # otherwise drawing replaces them
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        written = text.get_text()
        if "$" in written and not _POWER.fullmatch(written):
            text.set_parse_math(False)
        if lacking := _lacking(written):
            text.set_text(_boxed(written))
            text.set_fontfamily([*text.get_fontfamily(), *_fonts_with(lacking)[0]])


def _lacking(written: str) -> frozenset[str]:
    """Return the characters of a text that the figure's font lacks."""
    unknown = {c for c in written if not (c.isascii() and c.isprintable())} - {"\n"}
    return frozenset(c for c in unknown if not (c.isprintable() and _has(_own(), c)))


def _boxed(written: str) -> str:
    """Return a text with a box for each character that no font has, and warn once."""
    nowhere = _fonts_with(lacking)[1] if (lacking := _lacking(written)) else frozenset()
    if nowhere:
        _say_once("".join(sorted(nowhere)))
    return "".join(BOX if c in nowhere else c for c in written)


@cache
def _fonts_with(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return fonts of this machine that cover characters, and those that none has."""
    from matplotlib.font_manager import fontManager

    families: list[str] = []
    left = {c for c in characters if c.isprintable()}
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        if not left:
            break
        if entry.style != "normal" or entry.name in families:
            continue
        if found := {c for c in left if _has(entry.fname, c)}:
            families.append(entry.name)
            left -= found
    return tuple(families), frozenset(left | {c for c in characters if not c.isprintable()})


def _has(path: str, character: str) -> bool:
    face = _face(path)
    return face is not None and bool(face.get_char_index(ord(character)))


@cache
def _face(path: str) -> Any:
    """Return a font with outlines, or None: bitmaps such as colour emoji cannot be drawn."""
    from matplotlib.ft2font import FT2Font

    if not Path(path).is_file():  # the list of fonts is kept between runs
        return None
    try:
        face = FT2Font(path)
    except RuntimeError:  # FreeType cannot read it
        return None
    return face if face.scalable else None


@cache
def _own() -> str:
    """Return the file of the figures' font."""
    from matplotlib.font_manager import FontProperties, findfont

    return str(findfont(FontProperties(family=["sans-serif"])))


@cache
def _say_once(characters: str) -> None:
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in characters)
    logger.warning(
        "No font of this machine has the characters %s in a name, so the figure shows boxes: "
        "install one that has them, such as Noto Sans CJK.",
        shown[:60],
    )
