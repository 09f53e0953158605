"""A page with one figure, embedded as SVG and written beside it as PNG."""

from __future__ import annotations

import base64
import io
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lm_eval_bh.files import replacing


def figure_page(template: str, figure: Figure, picture: Path, **values: Any) -> str:
    """Write a figure as PNG, and return the page of a template that shows it.

    Parameters
    ----------
    template : str
        Name of a file in ``templates``.
    figure : Figure
        The figure.
    picture : Path
        The PNG file.
    **values
        Values of the template, besides ``figure``, ``css`` and ``version``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(drawn.getvalue()).decode("ascii")
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
    loader = PackageLoader("lm_eval_bh.analysis.show", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(
        figure=f"data:image/svg+xml;base64,{encoded}",
        css=Markup(loader.get_source(environment, "report.css")[0]),
        version=version("lm-eval-bh"),
        **values,
    )
