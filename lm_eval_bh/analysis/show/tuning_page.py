"""What a search of policies tried, and what won: a figure, a table and one page that holds both."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval_bh.analysis.show.pareto_figure import Point, draw_pareto
from lm_eval_bh.files import replacing, write_text

PAGE, FIGURE = "tune.html", "tune.png"
SHOWN = 5  # adaptive families in the figure, beside the controls; the table has all


def write_tuning_page(account: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the page and the figure of a search.

    Parameters
    ----------
    account : mapping
        From :func:`lm_eval_bh.policies.tuning.run.tune`, as plain values.
    folder : Path
        Where to write ``tune.html`` and ``tune.png``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    figure = _figure(account)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(drawn.getvalue()).decode("ascii")
    with replacing(folder / FIGURE) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
    loader = PackageLoader("lm_eval_bh.analysis.show", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("tune.html.j2").render(
        account=account,
        goal=goal_of(account),
        verdict=verdict_of(account),
        controls=[(name, *_texts(d)) for name, d in account["confirmation"]["controls"].items()],
        native=_texts(account["confirmation"]["native"]),
        tried=tried_rows(account),
        failed=[(row["name"], row["failed"]) for row in account["tried"] if row["failed"]],
        parameters=_parameters(account["winner"]),
        figure=f"data:image/svg+xml;base64,{encoded}",
        css=Markup(loader.get_source(environment, "report.css")[0]),
        version=version("lm-eval-bh"),
    )
    return [write_text(folder / PAGE, page), folder / FIGURE]


def goal_of(account: Mapping[str, Any]) -> str:
    """Return the goal of the search, in words."""
    if account["target_experts"] is not None:
        return f"a mean of {account['target_experts']:g} experts per token"
    return (
        f"the fewest experts that cost at most {100 * account['max_loss']:g} % of perplexity "
        f"against static top-{account['native_top_k']}"
    )


def verdict_of(account: Mapping[str, Any]) -> str:
    """Return in a sentence or two what unseen text says of the winner."""
    name, found = account["winner"]["name"], account["confirmation"]
    native = found["native"]
    text = f"{account['documents']['confirmation']} unseen documents of {account['text']}"
    loses = (
        f"It takes {found['mean_experts']:.2f} experts per token, and its perplexity differs from "
        f"static top-{account['native_top_k']}'s by {_signed(100 * native['relative'])} % "
        f"({_signed(100 * native['relative_low'])} to {_signed(100 * native['relative_high'])})."
    )
    worse = [n for n, control in found["controls"].items() if control["high"] >= 0]
    if not worse:
        first = f"{name} is better than every control at the same mean on {text}."
    else:
        first = f"{name} is not significantly better than {' and '.join(worse)} on {text}."
    if account["max_loss"] is not None:
        within = native["relative_high"] <= account["max_loss"]
        met = "met" if within else "not met"
        loses += f" The target, at most {100 * account['max_loss']:g} %, is {met} there."
    return f"{first} {loses}"


def tried_rows(account: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return (name, mean, perplexity, difference, interval) of what was tried, the best first."""
    rows = [row for row in account["tried"] if row["difference"] is not None]
    rows.sort(key=lambda row: row["difference"]["relative"])
    return [(row["name"], f"{row['mean_experts']:.2f}", *_texts(row["difference"])) for row in rows]


def _texts(difference: Mapping[str, float]) -> tuple[str, str, str]:
    return (
        f"{difference['perplexity']:.2f}",
        _signed(difference["difference"]),
        f"{_signed(difference['low'])} to {_signed(difference['high'])}",
    )


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _parameters(winner: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [(name, str(value)) for name, value in winner["config"].items() if value is not None]
    if winner["solved"]:
        alphas = winner["solved"]["alphas"]
        found.append(("alpha, solved", ", ".join(f"{value:.4g}" for value in alphas.values())))
    return found


def _figure(account: Mapping[str, Any]) -> Any:
    winner = account["winner"]["name"]
    rows = [row for row in account["tried"] if row["difference"] is not None]
    rows.sort(key=lambda row: row["difference"]["relative"])
    points: dict[str, list[Point]] = {winner: []}
    for row in rows:
        difference = row["difference"]
        point = Point(
            row["mean_experts"],
            difference["perplexity"],
            difference["difference"],
            difference["low"],
            difference["high"],
        )
        control = not row["adaptive"] and row["name"] != "topk"
        if row["name"] in points or control or len(points) < SHOWN:
            points.setdefault(row["name"], []).append(point)
    title = f"{account['model']}: {goal_of(account)} (validation text of {account['text']})"
    static = {float(k): value for k, value in account["static"].items()}
    return draw_pareto(static, points, title=title, best=winner)
