"""Writes the patterns: tables as CSV, pictures as PNG, a summary as Markdown."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from lm_eval_bh.analysis.patterns.complexity import OF_TOKEN
from lm_eval_bh.analysis.patterns.findings import TABLES, Patterns, find_patterns
from lm_eval_bh.analysis.patterns.pictures import (
    clusters_picture,
    complexity_picture,
    specialisation_picture,
)
from lm_eval_bh.analysis.read.loaded import Loaded
from lm_eval_bh.analysis.show.names import show_names
from lm_eval_bh.analysis.table.missing import is_missing
from lm_eval_bh.files import replacing, write_text

FOLDER = "patterns"
PICTURES = {
    "complexity": complexity_picture,
    "specialisation": specialisation_picture,
    "clusters": clusters_picture,
}
LEVEL = 0.05  # level of the p-values in sentences

CAVEATS = """\
- A document has one loss, that of its request. In a multiple-choice task the loss covers the ending
  but the experts serve the whole text; the report reads each document's first request, because all
  requests repeat its text.
- A token's loss is that of predicting it from the previous tokens, and its experts are those that
  serve it. Each layer has its own correlation, with losses in steps of 0.02 nats. Tokens of one
  document are not independent, so these intervals are too narrow and p-values too small.
- Correlations are Spearman's; tokens are correlated as types (each token id once, if it occurs at
  least five times). A correlation is not a cause: long documents, common words and easy texts tend
  to coincide.
- Information is corrected for chance, and p-values for the number of experts (Benjamini-Hochberg).
  For tasks, chance means documents shuffled among tasks. For token classes it means independent
  tokens, but tokens of one document are dependent: treat small values with care.
- Clusters group documents by how often each expert serves their tokens, without looking at their
  tasks. A silhouette up to 0.25 means no substantial structure.
"""


def write_patterns(
    loaded: Loaded, folder: Path | str, *, tokenizer: Path | None = None, seed: int = 0
) -> list[Path]:
    """Write the patterns in the routing logs into the folder ``patterns``.

    Six tables, each over all configurations (``complexity.csv``, ``classes.csv``, ``tokens.csv``,
    ``specialisation.csv``, ``documents.csv``, ``clusters.csv``), three pictures per configuration,
    and ``patterns.md``, which explains them.

    Parameters
    ----------
    loaded, tokenizer, seed
        See :func:`~lm_eval_bh.analysis.patterns.findings.find_patterns`.
    folder : Path or str
        Folder in which the folder is made.

    Returns
    -------
    list of Path
        The files; none if all logs are damaged.

    Raises
    ------
    DataError
        If no run has a log, or the tokenizer cannot be read.
    """
    folder = Path(folder) / FOLDER
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    text = ["# Routing patterns\n"]
    paths: list[Path] = []
    for found in find_patterns(loaded, tokenizer=tokenizer, seed=seed):
        where = {"group": found.group, "configuration": found.strategy}
        for name, table in found.tables.items():
            tables[name].append(table.assign(**where)[[*where, *table.columns]])
        text.append(f"## {found.strategy}\n")
        text += [f"- {sentence}" for sentence in sentences(found)]
        for kind, draw in PICTURES.items():
            path = _unlike(paths, folder, found.strategy, kind)
            figure = draw(found)
            show_names(figure)
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=200)
            paths.append(path)
            text.append(f"\n![{kind} of {found.strategy}]({path.name})")
        text.append("")
    if not paths:
        return []  # keeps earlier tables instead of writing empty ones
    for name, some in tables.items():
        content = pd.concat(some, ignore_index=True).to_csv(index=False, lineterminator="\n")
        paths.append(write_text(folder / f"{name}.csv", content))
    text += ["## How to read this\n", CAVEATS]
    return [*paths, write_text(folder / "patterns.md", "\n".join(text))]


def _unlike(paths: list[Path], folder: Path, strategy: str, kind: str) -> Path:
    """Return a picture's file, numbered if configurations share a name."""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", strategy).strip("_").lower()
    path, number = folder / f"{plain}_{kind}.png", 2
    while path in paths:
        path, number = folder / f"{plain}_{number}_{kind}.png", number + 1
    return path


def sentences(found: Patterns) -> list[str]:
    """Return a configuration's patterns as sentences."""
    written = []
    for _, row in found.tables["complexity"].iterrows():
        if not is_missing(row["layer"]):
            continue
        what = row["against"] if row["task"] == "all" else f"{row['against']}, {row['task']}"
        if not is_missing(row["reason"]):
            written.append(f"Experts and {what}: {row['reason']}.")
        else:
            written.append(
                f"Experts and {what}: rank correlation {row['spearman']:+.2f} "
                f"[{row['low']:+.2f}, {row['high']:+.2f}] over {row['n']} ({row['unit']})."
            )
    written += _sentences_of_layers(found.tables["complexity"].dropna(subset="layer"))
    for of, some in found.tables["specialisation"].groupby("of"):
        first = some.loc[some["corrected"].idxmax()]
        clear = int((some["p_adjusted"] <= LEVEL).sum())
        written.append(
            f"Serving a token is informative about its {of} for {clear} of {len(some)} "
            f"experts; most of all layer {first['layer']} expert {first['expert']} "
            f"({100 * first['share']:.1f} % of the entropy; {first['lift']:.1f} times as often for "
            f"{first['most']})."
        )
    if found.clusters is None:
        written.append("Clusters: too few documents, or all use the experts alike.")
    else:
        best = found.clusters
        written.append(
            f"Clusters: {best.number} of documents, silhouette "
            f"{best.silhouette:.2f} ({best.remark}), agreement with the tasks {best.agreement:.2f}."
        )
    return written


def _sentences_of_layers(table: pd.DataFrame) -> list[str]:
    """Return a sentence for each task with correlations between experts and token losses."""
    written = []
    for task, some in table.groupby("task", sort=False):
        known = some.dropna(subset="spearman")
        if known.empty:
            written.append(f"Experts and {OF_TOKEN}, {task}: {some['reason'].iloc[0]}.")
            continue
        low, high = known["spearman"].min(), known["spearman"].max()
        first = known.loc[known["spearman"].abs().idxmax()]
        written.append(
            f"Experts and {OF_TOKEN}, {task}: rank correlations {low:+.2f} to {high:+.2f} over "
            f"{len(known)} layers, {first['n']} tokens each; furthest from 0 in layer "
            f"{first['layer']}: {first['spearman']:+.2f} "
            f"[{first['low']:+.2f}, {first['high']:+.2f}]."
        )
    return written
