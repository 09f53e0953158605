"""Small HTML tables about routing for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from torch import Tensor

from lm_eval_bh.routing.routers import transformers_model

SHOWN = 12  # tokens shown of a selection


def html_table(names: Sequence[str], rows: Iterable[Sequence[Any]], caption: str) -> str:
    """Return an HTML table with escaped content."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def selection_html(indices: Tensor, weights: Tensor, counts: Tensor) -> str:
    """Return the first tokens of a selection, each with its experts and their weights."""
    rows = [
        (
            token,
            count,
            ", ".join(f"{e} ({w:.3f})" for e, w in list(zip(of, by, strict=True))[:count]),
        )
        for token, (of, by, count) in enumerate(
            zip(
                indices[:SHOWN].tolist(),
                weights[:SHOWN].tolist(),
                counts[:SHOWN].tolist(),
                strict=True,
            )
        )
    ]
    number = len(counts)
    mean = f", {float(counts.double().mean()):.2f} experts per token" if number else ""
    first = f"; the first {SHOWN}" if number > SHOWN else ""
    return html_table(
        ("token", "number", "experts (weights)"), rows, f"{number} tokens{mean}{first}"
    )


def integration_html(integration: Any) -> str:
    """Return the settings of a ``BHRoutingIntegration``, with its statistics."""
    stats = {} if integration.counters is None else integration.get_routing_stats()
    known = {name: f"{value:.3g}" for name, value in stats.items() if value is not None}
    settings = integration.describe() | {"patched": integration.patched} | known
    rows = [(name, value) for name, value in settings.items() if value is not None]
    model = type(transformers_model(integration.model)).__name__
    return html_table(("", "value"), rows, f"Routing of {model}, {len(integration.routers)} layers")
