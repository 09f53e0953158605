"""The page that shows routing token by token: one file that loads nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

from lm_eval_bh.errors import ParameterError
from lm_eval_bh.files import write_text

# An expert, its weight, its score, and the threshold; None if unknown.
Row = tuple[int, float | None, float | None, float | None]
DIGITS = 4  # significant digits on the page


BROKEN = "\N{REPLACEMENT CHARACTER}"  # decoded part of a character
LONGEST = 16  # maximum tokens of one character, or of several that share tokens


class ViewText(TypedDict):
    """A text: its name, and its tokens as text and as ids (None if unknown)."""

    title: str
    tokens: list[str]
    ids: list[int | None]


class ViewLayer(TypedDict):
    """A layer's decisions on a text.

    ``score`` and ``limit`` name the last two columns of the rows, or are None. For each token,
    ``counts`` has the number of experts, and ``rows`` one row per expert, the best first, and
    possibly one more: the first expert that was left out.
    """

    layer: int
    score: str | None
    limit: str | None
    counts: list[int]
    rows: list[list[Row]]


class ViewRouted(TypedDict):
    """A text under a configuration: its layers, and each token's loss in nats, if known."""

    loss: list[float | None]
    layers: list[ViewLayer]


class ViewRun(TypedDict):
    """A configuration, and its decisions on each text, in order.

    ``distinct`` says what a step read, if it is known which rows were decoded together.
    """

    label: str
    model: str
    experts: int
    max_k: int
    distinct: str | None
    texts: list[ViewRouted]


def pieces(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """Return the text of each token; a character of several tokens belongs to the first.

    Parameters
    ----------
    decode : callable
        Returns the text of token ids.
    ids : sequence of int
        Token ids of a text. An incomplete last character stays a replacement character.
    """
    found: list[str] = []
    place = 0
    while place < len(ids):
        text, length = decode([ids[place]]), 1
        if text.endswith(BROKEN):
            for longer in range(2, min(LONGEST, len(ids) - place) + 1):
                whole = decode(list(ids[place : place + longer]))
                if not whole.endswith(BROKEN):
                    text, length = whole, longer
                    break
        found += [text, *[""] * (length - 1)]
        place += length
    return found


def short(value: float | None) -> float | None:
    """Return a number rounded for the page; None if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def distinct_line(mean: float, rows: int | None) -> str:
    """Return how many different experts a layer and step of some rows reads, in words."""
    of = "" if rows is None else f" of {rows} row{'s' * (rows != 1)}"
    return f"{mean:.1f} distinct experts per layer and step{of}"


def check_same_layers(runs: Sequence[ViewRun]) -> None:
    """Raise :class:`ParameterError` if the configurations route different layers."""
    layers = [[layer["layer"] for layer in run["texts"][0]["layers"]] for run in runs]
    if any(some != layers[0] for some in layers):
        raise ParameterError(
            "The two configurations route different layers, so they cannot be shown side by side: "
            "give both the same layers=."
        )


def view_page(title: str, texts: Sequence[ViewText], runs: Sequence[ViewRun]) -> str:
    """Return the page as HTML.

    Parameters
    ----------
    title : str
        Title of the page.
    texts : sequence of ViewText
        Texts, at least one.
    runs : sequence of ViewRun
        One run, or two to show side by side: A and B.

    Raises
    ------
    ParameterError
        If runs route different layers.
    """
    check_same_layers(runs)
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("lm_eval_bh.analysis.show", "templates")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

    def asset(name: str) -> str:
        return Markup(loader.get_source(environment, name)[0])

    text = json.dumps({"texts": texts, "runs": runs}, allow_nan=False, separators=(",", ":"))
    data = Markup(text.replace("<", "\\u003c"))  # so that nothing in it can end the script
    return environment.get_template("view.html.j2").render(
        page={"title": title, "texts": texts, "runs": runs},
        data=data,
        version=version("lm-eval-bh"),
        asset=asset,
    )


def write_view(path: Path, title: str, texts: Sequence[ViewText], runs: Sequence[ViewRun]) -> Path:
    """Write the page, completely or not at all, and return its path."""
    return write_text(path, view_page(title, texts, runs))
