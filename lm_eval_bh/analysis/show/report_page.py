"""The report: measurements and a recommendation, as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import io
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lm_eval_bh.analysis.compare.paired import compare
from lm_eval_bh.analysis.compare.recommendation import recommend
from lm_eval_bh.analysis.show.health_figure import draw_distances
from lm_eval_bh.analysis.show.lm_eval_command import lm_eval_command
from lm_eval_bh.analysis.show.report_tables import (
    comparison_table,
    health_table,
    layer_table,
    results_table,
    speed_table,
    verdict_table,
)
from lm_eval_bh.analysis.table.speed_phase import conditions
from lm_eval_bh.files import replacing, write_text
from lm_eval_bh.schema import read_json

if TYPE_CHECKING:
    from lm_eval_bh.analysis.read.loaded import Loaded

REPORT = "bh_routing_report"
FIGURE = "visualizations/bh_comprehensive_comparison"
HEALTH = "visualizations/null_model_health"

# Characters that Markdown reads as markup; underscores within words are safe.
_MARKUP = re.compile(r"([\\`*\[\]<>|&~])")


def write_report(
    loaded: Loaded,
    folder: Path | str,
    *,
    margin: float = 0.01,
    accuracy_margin: float = 0.01,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> list[Path]:
    """Write ``bh_routing_report.md`` and ``.html``, and their nine panels.

    The HTML page is a single file that loads nothing; only sorting and filtering need scripts.

    Parameters
    ----------
    loaded : Loaded
        From :func:`~lm_eval_bh.analysis.table.experiments.load_experiments`.
    folder : Path or str
        Output folder.
    margin, accuracy_margin, confidence, resamples, seed
        See :func:`~lm_eval_bh.analysis.compare.paired.compare` and
        :func:`~lm_eval_bh.analysis.compare.recommendation.recommend`.

    Returns
    -------
    list of Path
        The Markdown file and the HTML file.

    Raises
    ------
    ParameterError
        If an argument is out of range.
    """
    comparisons = compare(
        loaded,
        margin=margin,
        accuracy_margin=accuracy_margin,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    recommendations = recommend(loaded.frame, comparisons, margin=margin, confidence=confidence)
    contents = {file: read_json(Path(file)) for file in loaded.frame["file"].unique()}
    folder = Path(folder)
    report = {
        "summary": _summary(loaded.frame),
        "recommendations": [(found, verdict_table(found)) for found in recommendations],
        "results": results_table(loaded.frame),
        "comparisons": comparison_table(comparisons),
        "speeds": speed_table(loaded.speeds),
        "conditions": [conditions(one) for one in loaded.speeds],
        "layers": layer_table(loaded),
        "figures": _figures(loaded, folder),
        "nulls": _nulls(contents, folder),
        # Anchors match the rows of the results.
        "commands": [
            (
                f"run-{number}",
                f"{row['strategy']}, {row['task']}",
                lm_eval_command(contents[row["file"]], row["task"]),
            )
            for number, (_, row) in enumerate(loaded.frame.iterrows(), start=1)
        ],
        # Last, since reading above may have added some.
        "problems": [sentence for _, sentence in loaded.problems],
        "notes": [sentence for _, sentence in loaded.notes],
        "settings": {
            "margin": f"{100 * margin:g} %",
            "accuracy_margin": f"{accuracy_margin:g}",
            "confidence": f"{100 * confidence:g} %",
            "resamples": f"{resamples:,}",
            "seed": str(seed),
        },
    }
    return [_write(report, folder / f"{REPORT}.{suffix}") for suffix in ("md", "html")]


def _write(report: dict[str, Any], path: Path) -> Path:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("lm_eval_bh.analysis.show", "templates")
    environment = Environment(
        loader=loader,
        autoescape=path.suffix == ".html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"markdown": escape_markdown, "fenced": fenced}

    def asset(name: str) -> str:
        return Markup(loader.get_source(environment, name)[0])

    template = environment.get_template(f"report{path.suffix}.j2")
    content = template.render(report=report, version=version("lm-eval-bh"), asset=asset)
    return write_text(path, content)


def escape_markdown(text: str) -> str:
    r"""Return text escaped for Markdown, also within a table.

    Examples
    --------
    >>> print(escape_markdown("a|b <c>"))
    a\|b \<c\>
    """
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split()))


def fenced(text: str) -> str:
    """Return text as a block of code, fenced by more backticks than it has in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{text}\n{fence}"


def _summary(frame: pd.DataFrame) -> list[str]:
    if not len(frame):
        return ["No experiment could be read."]
    models, tasks = sorted(frame["model"].unique()), sorted(frame["task"].unique())
    found = [
        f"{len(frame)} experiments: {frame['configuration'].nunique()} configurations of "
        f"{', '.join(models)} on {', '.join(tasks)}."
    ]
    if frame["group"].nunique() > 1:
        found.append(
            f"They fall into {frame['group'].nunique()} groups that cannot be compared with each "
            "other."
        )
    adaptive = frame[frame["adaptive"] & (frame["mode"] != "analyze")]
    perplexity = [row.get(row["matched_metric"]) for _, row in adaptive.iterrows()]
    for what, ours, better in (
        ("perplexity", pd.Series(perplexity, adaptive.index, dtype=float), "lower"),
        ("accuracy", adaptive["accuracy"], "higher"),
    ):
        ahead = (ours - adaptive[f"matched_{what}"]).dropna()
        number = int((ahead < 0 if better == "lower" else ahead > 0).sum())
        if len(ahead):
            found.append(
                f"{len(ahead)} adaptive experiments have a static top-k at the same mean number of "
                f"experts to compare with; {number} of them have the {better} {what}."
            )
    alone = int((adaptive["matched_by"].isna()).sum())
    if alone:
        found.append(
            f"{alone} adaptive experiments have no static top-k at the same mean number of "
            "experts to compare with: run rule=topk with a smaller and a larger max_k."
        )
    return found


def _figures(loaded: Loaded, folder: Path) -> list[dict[str, str]]:
    """Draw each group, as PNG for the folder and as SVG for the page."""
    from lm_eval_bh.analysis.show.plots import create_comprehensive_visualization

    found = []
    for number, rows in loaded.frame.groupby("group"):
        name = FIGURE if loaded.frame["group"].nunique() == 1 else f"{FIGURE}_group{number}"
        layers = loaded.layers[loaded.layers["group"] == number]
        figure = create_comprehensive_visualization(rows, folder / f"{name}.png", layers=layers)
        found.append(_embedded(figure, f"{name}.png"))
    return found


def _embedded(figure: Any, name: str) -> dict[str, str]:
    """Return the name of a drawing's file, and the drawing as SVG in a data URI for the page."""
    import matplotlib

    drawn = io.BytesIO()
    # No time and no random names, so that equal runs give equal pages.
    with matplotlib.rc_context({"svg.hashsalt": REPORT}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(drawn.getvalue()).decode("ascii")
    return {"file": name, "source": f"data:image/svg+xml;base64,{encoded}"}


def _nulls(contents: dict[str, dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Describe every null model in use once, and draw its health."""
    found: dict[str, dict[str, Any]] = {}
    for content in contents.values():
        header = (content["config"].get("bh") or {}).get("null_model") or {}
        facts = [
            (name.replace("_", " "), _fact(value))
            for name, value in header.items()
            if value is not None and name != "health"
        ]
        if not facts or str(facts) in found:
            continue
        health, figure = header.get("health"), None
        if health:
            drawn = 1 + sum(one["health"] is not None for one in found.values())
            name = f"{HEALTH}{'' if drawn == 1 else drawn}.png"
            shown = draw_distances(health)
            with replacing(folder / name) as temporary:
                shown.savefig(temporary, format="png", dpi=200)
            figure = _embedded(shown, name)
        found[str(facts)] = {
            "facts": facts,
            "health": health_table(health) if health else None,
            "figure": figure,
            "command": _calibration(header),
        }
    return list(found.values())


def _calibration(header: dict[str, Any]) -> str:
    """Return the command that calibrates the same null model to another file and checks it."""
    words = ["lm-eval-bh", "calibrate", "--model", header.get("model") or "MODEL"]
    for option in ("tokens", "kernel", "trim", "statistic"):
        if header.get(option) is not None:
            words += [f"--{option}", header[option]]
    if scope := header.get("null"):
        words += ["--null-scope", "layer" if scope == "pooled" else scope]
    return shlex.join(map(str, [*words, "--output", "checked.safetensors"]))


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value)
    return str(value)
