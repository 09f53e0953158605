"""``lm_eval_bh.view``: the page of a text as an object for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_bh.analysis.show.view_page import (
    ViewRouted,
    ViewRun,
    ViewText,
    distinct_line,
    pieces,
    view_page,
)
from lm_eval_bh.analysis.table.strategy_names import strategy_label
from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.files import as_path, write_text
from lm_eval_bh.routing.config import RoutingConfig, rule_info
from lm_eval_bh.routing.patching.integration import BHRoutingIntegration
from lm_eval_bh.routing.routers import transformers_model
from lm_eval_bh.viewing.routed_text import route_texts

HEIGHT = 720  # pixels of the frame in a notebook


@dataclass(frozen=True)
class View:
    """A page that shows the routing of texts.

    Attributes
    ----------
    title : str
        Title of the page.
    texts, runs : list
        The page's content, see :mod:`~lm_eval_bh.analysis.show.view_page`.
    """

    title: str
    texts: list[ViewText] = field(repr=False)
    runs: list[ViewRun] = field(repr=False)

    @property
    def html(self) -> str:
        """The complete page."""
        return view_page(self.title, self.texts, self.runs)

    def save(self, path: Path | str) -> Path:
        """Write the page, completely or not at all, and return its path."""
        return write_text(as_path(path), self.html)

    def _repr_html_(self) -> str:
        page = html.escape(self.html)
        return (
            f'<iframe title="{html.escape(self.title)}" sandbox="allow-scripts" '
            f'style="width: 100%; height: {HEIGHT}px; border: 0" srcdoc="{page}"></iframe>'
        )


def view(
    integration: BHRoutingIntegration,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    against: RoutingConfig | None = None,
    tokens: int = 256,
) -> View:
    """Show which experts serve each token of a text, layer by layer.

    Parameters
    ----------
    integration : BHRoutingIntegration
        The integration, patched or not; it is left as it was.
    tokenizer : transformers tokenizer
        The model's.
    text : str or sequence of str
        One text, or several to choose from.
    against : RoutingConfig, optional
        Another configuration, shown beside the integration's own.
    tokens : int
        Maximum number of tokens per text.

    Returns
    -------
    View
        Displayed in notebooks; :meth:`View.save` writes the page.

    Raises
    ------
    ParameterError
        If a parameter is out of range, or the configurations route different layers.
    DataError
        If a text is empty.

    Examples
    --------
    >>> lm_eval_bh.view(routing, tokenizer, "The tide is high.").save("tide.html")
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 2:
        raise ParameterError(f"tokens must be a whole number from 2: found {tokens!r}.")
    if against is not None and not isinstance(against, RoutingConfig):
        raise ParameterError(f"against must be a RoutingConfig: found {against!r:.60}.")
    given = [text] if isinstance(text, str) else list(text)
    if not given or not all(isinstance(one, str) for one in given):
        raise ParameterError("text must be a string, or a sequence of strings that is not empty.")
    texts = tokenized(tokenizer, [tokenizer.encode(one)[:tokens] for one in given])
    runs = [routed(integration, texts)]
    if against is not None:
        with _configured(integration, against):
            runs.append(routed(integration, texts))
    made = View(f"Routing of {runs[0]['model']}", texts, runs)
    made.html  # noqa: B018  # raises errors here, not when a notebook shows it
    return made


def tokenized(tokenizer: Any, ids: Sequence[Sequence[int]]) -> list[ViewText]:
    """Return texts for the page from their token ids.

    Raises
    ------
    DataError
        If a text has no tokens.
    """
    if not all(ids):
        raise DataError("A text has no tokens: give one that is not empty.")
    return [
        {
            "title": f"document {number}" if len(ids) > 1 else "the text",
            "tokens": pieces(tokenizer.decode, of_text),
            "ids": list(of_text),
        }
        for number, of_text in enumerate(ids, start=1)
    ]


def routed(
    integration: BHRoutingIntegration, texts: Sequence[ViewText], name: str | None = None
) -> ViewRun:
    """Return a configuration's decisions on texts; ``name`` is the model's, if known.

    As many texts as are decoded together run side by side.
    """
    own = transformers_model(integration.model)
    config = integration.config
    rows = min(config.decode_batch or 1, len(texts))
    ids = [[int(i or 0) for i in text["ids"]] for text in texts]
    steps = [ids[start : start + rows] for start in range(0, len(ids), rows)]
    with nullcontext() if integration.patched else integration:
        found = [route_texts(integration, some) for some in steps]
    read = [len(experts) for some in found for experts in _experts_of_steps(some)]
    told = config.method.joint or config.decode_batch is not None
    return {
        "label": strategy_label(integration.describe(), rule_info(config.rule)),
        "model": name or Path(own.name_or_path or type(own).__name__).name,
        "experts": integration.num_experts,
        "max_k": config.max_k,
        "distinct": distinct_line(sum(read) / len(read), rows) if told else None,
        "texts": [text for some in found for text in some],
    }


def _experts_of_steps(texts: Sequence[ViewRouted]) -> Iterable[set[int]]:
    """Return the different experts of each layer and step of texts that ran side by side."""
    found: dict[tuple[int, int], set[int]] = {}
    for text in texts:
        for layer in text["layers"]:
            for position, (count, rows) in enumerate(
                zip(layer["counts"], layer["rows"], strict=True)
            ):
                experts = found.setdefault((layer["layer"], position), set())
                experts.update(row[0] for row in rows[:count])
    return found.values()


@contextmanager
def _configured(integration: BHRoutingIntegration, config: RoutingConfig) -> Any:
    before = integration.config
    integration.configure(config)
    try:
        yield
    finally:
        integration.configure(before)
