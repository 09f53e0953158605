"""The table of a league, as CSV, Markdown and one page with a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_bh.analysis.show.figure_page import figure_page
from lm_eval_bh.analysis.show.pareto_figure import DISTINCT, EXPERTS, Point, draw_pareto
from lm_eval_bh.files import write_text

FILE, TABLE, FIGURE = "league.json", "league.csv", "league.png"
PAGE, MARKDOWN = "league.html", "league.md"
DRAWN = 8  # methods in the figure: those with the smallest losses
BEST = 10  # rows before the fold
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes
    ----------
    name : str
        Name in the CSV.
    title : str
        Title for people.
    value : callable
        From a row of ``league.json`` to its number; only for rows that did not fail.
    shown : callable
        From a row to its text; None shows the column only in the CSV.
    """

    name: str
    title: str
    value: Callable[[Row], Any]
    shown: Callable[[Row], str] | None = None


def _of(*path: str) -> Callable[[Row], Any]:
    def value(row: Row) -> Any:
        for name in path:
            row = row[name]
        return row

    return value


def _oea(name: str) -> Callable[[Row], Any]:
    return lambda row: row["from_oea"] and row["from_oea"][name]


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign and a typographic minus."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _interval(part: str, names: tuple[str, str, str], scale: float = 100) -> Callable[[Row], str]:
    def shown(row: Row) -> str:
        found, low, high = (signed(scale * row[part][name]) for name in names)
        return f"{found} ({low} to {high})"

    return shown


_RELATIVE = ("relative", "relative_low", "relative_high")
_ABSOLUTE = ("difference", "low", "high")
COLUMNS = (
    Column("mean_experts", "experts", _of("mean_experts"), lambda r: f"{r['mean_experts']:.2f}"),
    Column(
        "distinct_experts",
        "distinct experts",
        _of("distinct_experts"),
        lambda r: f"{r['distinct_experts']:.2f}",
    ),
    Column("perplexity", "perplexity", _of("from_native", "perplexity")),
    Column("loss", "loss (%)", _of("from_native", "relative"), _interval("from_native", _RELATIVE)),
    *(Column(f"loss_{end}", "", _of("from_native", f"relative_{end}")) for end in _ABSOLUTE[1:]),
    Column(
        "from_static",
        "perplexity minus static top-k's",
        _of("from_static", "difference"),
        _interval("from_static", _ABSOLUTE, 1),
    ),
    *(Column(f"from_static_{name}", "", _of("from_static", name)) for name in _ABSOLUTE[1:]),
    *(Column(f"from_static_{name}", "", _of("from_static", name)) for name in _RELATIVE),
    Column(
        "from_oea",
        "perplexity minus OEA's",
        _oea("difference"),
        _interval("from_oea", _ABSOLUTE, 1),
    ),
    *(Column(f"from_oea_{n}", "", _oea(n)) for n in (*_ABSOLUTE[1:], *_RELATIVE)),
    Column("kl", "KL (nats)", _of("fidelity", "kl"), lambda r: f"{r['fidelity']['kl']:.4f}"),
    *(Column(f"kl_from_static_{n}", "", _of("kl_from_static", n)) for n in _ABSOLUTE),
    Column(
        "kl_worst_tenth",
        "KL, worst tenth",
        _of("fidelity", "worst"),
        lambda r: f"{r['fidelity']['worst']:.4f}",
    ),
    Column(
        "first_choices_changed",
        "first choices changed (%)",
        _of("fidelity", "changed"),
        lambda r: f"{100 * r['fidelity']['changed']:.1f}",
    ),
    Column(
        "table_bytes",
        "tables (KiB)",
        _of("table_bytes"),
        lambda r: f"{r['table_bytes'] / 1024:.1f}",
    ),
    Column(
        "calibration_seconds",
        "calibration (s)",
        _of("calibration_seconds"),
        lambda r: f"{r['calibration_seconds']:.0f}",
    ),
    Column(
        "decision_seconds", "decision (µs)", _of("decision"), lambda r: f"{1e6 * r['decision']:.2f}"
    ),
)
# Columns for a terminal, with their titles there.
IN_A_TERMINAL = {
    "method": "method",
    "experts": "experts",
    "distinct experts": "distinct",
    "loss (%)": "loss (%)",
    "perplexity minus static top-k's": "minus static",
    "perplexity minus OEA's": "minus OEA",
    "KL (nats)": "KL",
}


def titles_of(league: Mapping[str, Any]) -> list[str]:
    """Return the titles of the table for people."""
    hidden = set() if by_step(league) else {"from_oea"}
    hidden |= {"distinct_experts"} if league["decode_batch"] is None else set()
    return [
        "method",
        *(c.title for c in COLUMNS if c.shown is not None and c.name not in hidden),
    ]


def by_step(league: Mapping[str, Any]) -> bool:
    """Return whether methods were compared at equal distinct experts."""
    return bool(league["cost"] == "distinct_experts")


def a_mean(league: Mapping[str, Any], target: float) -> str:
    """Return a target in words, to follow "at"."""
    return f"a mean of {target:g} {'distinct experts' if by_step(league) else 'experts'}"


def shown_rows(league: Mapping[str, Any], target: float) -> list[tuple[str, ...]]:
    """Return the cells of the rows at a mean, the best first."""
    rows = [row for row in league["rows"] if row["target"] == target and row["failed"] is None]
    shown = {column.title: column.shown for column in COLUMNS}
    cells = [shown[title] for title in titles_of(league)[1:]]
    return [(row["name"], *(cell(row) for cell in cells if cell is not None)) for row in rows]


def short_rows(league: Mapping[str, Any], target: float) -> list[dict[str, str]]:
    """Return the cells for a terminal, by short titles."""
    titles = titles_of(league)
    hidden = {"experts", "KL (nats)"} if by_step(league) else set()
    wanted = {t: s for t, s in IN_A_TERMINAL.items() if t in titles and t not in hidden}
    found = []
    for row in shown_rows(league, target):
        cells = dict(zip(titles, row, strict=True))
        cells["loss (%)"] = cells["loss (%)"].partition(" ")[0]
        found.append({short: cells[title] for title, short in wanted.items()})
    return found


def failures(league: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the failed methods with their means, and the reasons."""
    return [
        (f"{row['name']}, mean {row['target']:g}", " ".join(row["failed"].split()))
        for row in league["rows"]
        if row["failed"] is not None
    ]


def summary_of(league: Mapping[str, Any], target: float) -> str:
    """Return a short summary of the best method at a mean, by loss and by fidelity."""
    rows = [row for row in league["rows"] if row["target"] == target and row["failed"] is None]
    if not rows:
        return f"At {a_mean(league, target)} nothing could be measured."
    best = rows[0]
    found, control = best["from_native"], best["from_static"]
    nearest = min(rows, key=lambda row: row["fidelity"]["kl"])
    text = (
        f"At {a_mean(league, target)} {best['name']} loses least: "
        f"{signed(100 * found['relative'])} % of perplexity ({signed(100 * found['relative_low'])} "
        f"to {signed(100 * found['relative_high'])}), and its perplexity is "
        f"{signed(control['difference'])} ({signed(control['low'])} to {signed(control['high'])}) "
        "from static top-k's at its mean."
    )
    if nearest is not best:
        text += (
            f" By fidelity {nearest['name']} is first: {nearest['fidelity']['kl']:.4f} nats per "
            f"token from the model's own distributions, against {best['fidelity']['kl']:.4f}."
        )
    return text


def write_league(league: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the CSV, the figure, the page and the Markdown of a league into its folder.

    Parameters
    ----------
    league : mapping
        The content of ``league.json``.
    folder : Path
        Output folder.
    """
    page = figure_page(
        "league.html.j2",
        _figure(league),
        folder / FIGURE,
        league=league,
        titles=titles_of(league),
        parts=[
            (a_mean(league, target), summary_of(league, target), shown_rows(league, target))
            for target in league["targets"]
        ],
        one="document" if league["unit"] == "documents" else "group",
        best=BEST,
        failed=failures(league),
    )
    return [
        write_text(folder / TABLE, _csv(league)),
        folder / FIGURE,
        write_text(folder / PAGE, page),
        write_text(folder / MARKDOWN, _markdown(league)),
    ]


def _csv(league: Mapping[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["target", "method", *(column.name for column in COLUMNS), "failed", "source"])
    for row in league["rows"]:
        done = row["failed"] is None
        cells = [_number(column.value(row)) if done else None for column in COLUMNS]
        writer.writerow([row["target"], row["name"], *cells, row["failed"], row["source"]])
    return text.getvalue()


def _number(value: Any) -> Any:
    return f"{value:.8g}" if isinstance(value, float) else value


def _markdown(league: Mapping[str, Any]) -> str:
    parts = [f"![Perplexity over the mean number of experts]({FIGURE})"]
    titles = titles_of(league)
    for target in league["targets"]:
        rows = shown_rows(league, target)
        parts.append(summary_of(league, target))
        parts.append(_markdown_table(titles, rows[:BEST]))
        if len(rows) > BEST:
            rest = f"<summary>The other {len(rows) - BEST} rows</summary>"
            table = _markdown_table(titles, rows[BEST:])
            parts.append(f'<details markdown="1">{rest}\n\n{table}\n\n</details>')
    failed = [f"- {name}: {reason}" for name, reason in failures(league)]
    if failed:
        parts.append(
            '<details markdown="1"><summary>Methods that failed</summary>\n\n'
            + "\n".join(failed)
            + "\n\n</details>"
        )
    return "\n\n".join(parts) + "\n"


def _markdown_table(titles: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [titles, ("---", *("---:" for _ in titles[1:])), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(league: Mapping[str, Any]) -> Any:
    points: dict[str, list[Point]] = {}
    for row in league["rows"]:
        if row["failed"] is None and row["name"] != "topk":
            found = row["from_static"]
            place = found["perplexity"], found["difference"], found["low"], found["high"]
            points.setdefault(row["name"], []).append(Point(row[league["cost"]], *place))
    least = {name: min(p.difference for p in found) for name, found in points.items()}
    best = sorted(points, key=least.__getitem__)[:DRAWN]
    title = f"{league['model']['name']}: methods beside static top-k, {league['text']['name']}"
    static = {float(k): value for k, value in league["static_perplexities"].items()}
    return draw_pareto(
        static,
        {name: points[name] for name in best},
        title=title,
        best=best[0] if best else None,
        cost=DISTINCT if by_step(league) else EXPERTS,
    )
