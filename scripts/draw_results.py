"""Draws the figures of docs/results from the numbers in the tables of those pages.

``python scripts/draw_results.py`` writes them into docs/images. No number stands here: whoever
changes a table draws its figure again.
"""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from lm_eval_bh.analysis.show.plots.style import ALPHA, BASELINE_LINE, NEUTRAL, PALETTE, RC

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES = ROOT / "docs" / "results", ROOT / "docs" / "images"


def tables(page: str) -> list[list[list[str]]]:
    """Return the cells of each table of a page of results, the head first."""
    found: list[list[list[str]]] = []
    inside = False
    for line in (RESULTS / page).read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            found.append([])
        inside = True
        if not set(line) <= set("|-: "):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def false_rejections() -> Figure:
    """Draw the share of tokens with a false rejection beside alpha, where all are null."""
    shares = [table for table in tables("false_rejections.md") if table[0][1] == "bh"]
    levels = re.findall(r"^alpha = ([\d.]+);", (RESULTS / "false_rejections.md").read_text(), re.M)
    rules = ("bh", "storey", "by")
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(levels), sharey=True)
    for axes, level, (head, *rows) in zip(panels, levels, shares, strict=True):
        for place, rule in enumerate(rules):
            values = [float(row[head.index(rule)]) for row in rows]
            heights = [len(rows) - 1 - row for row in range(len(rows))]
            axes.plot(values, heights, "os^"[place], color=PALETTE[(0, 4, 2)[place]], label=rule)
        axes.axvline(float(level), color=NEUTRAL, linestyle=BASELINE_LINE, label=ALPHA)
        axes.set(title=f"{ALPHA} = {level}", xlabel="tokens with a rejection (share)")
        axes.set_xlim(0, None)
        axes.set_yticks(heights, [row[0] for row in rows])
    panels[0].set_ylabel("correlation of the 64 statistics")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def speed() -> Figure:
    """Draw the time of one MoE layer, against top-8 and against static top-k at the same mean."""
    beside_top, beside_static = tables("speed.md")[:2]
    figure = Figure(figsize=(8, 3.3), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=(1.25, 1))
    titles = ("Time, as a share of top-8's", "... of static top-k's, same mean")
    for axes, (head, *rows), title in zip(panels, (beside_top, beside_static), titles, strict=True):
        for column, name in enumerate(head[1:]):
            ends = [
                [float(n) for n in re.findall(r"[\d.]+", row[1 + column].strip("*"))]
                for row in rows
            ]
            at = [float(row[0]) + 0.09 * (column - 1) for row in rows]
            middle = [value for value, _, _ in ends]
            errors = [[v - low for v, low, _ in ends], [high - v for v, _, high in ends]]
            axes.errorbar(at, middle, errors, fmt="os^"[column], color=PALETTE[column], label=name)
        axes.axhline(1, color=NEUTRAL, linestyle=BASELINE_LINE)
        axes.set(title=title, xlabel="mean experts per token")
        axes.set_xticks(means := [float(row[0]) for row in rows], [f"{mean:g}" for mean in means])
    panels[0].plot([0, 8], [0, 1], color="#9A9A9A", linewidth=1, label="in proportion to experts")
    panels[0].set(xlim=(1.5, 8.5), ylim=(0, 1.4))
    panels[1].set(xlim=(1.5, 6.5), ylim=(0.8, 1.2))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def batches() -> Figure:
    """Draw the loss over the distinct experts of a step, a line a method."""
    methods = {
        "static top-k": "static top",
        "XShare": "`xshare`",
        "OEA": "`oea`",
        "fixed budget, benefit": "`batch_mass`, benefit",
        "batch_min_w": "**`batch_min_w`, benefit, power 2",
    }
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, title, (_, *rows) in zip(
        panels, ("tiny-olmoe", "tiny-glm"), tables("batches.md")[:2], strict=True
    ):
        for place, (label, begins) in enumerate(methods.items()):
            of_method = [row for row in rows if row[0].startswith(begins)]
            axes.plot(
                [float(row[1]) for row in of_method],
                [float(row[3]) for row in of_method],
                marker="osD^v"[place],
                color=PALETTE[place],
                label=label,
            )
        axes.set(title=title, xlabel="distinct experts per layer and step", yscale="log")
        axes.set_yticks(ticks := [0.5, 1, 2, 5, 10, 20, 50, 100, 200], [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    panels[0].set_ylabel("loss against static top-8 (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5)
    return figure


FIGURES = {"false_rejections": false_rejections, "speed": speed, "batches": batches}


def main() -> None:
    """Draw all of them."""
    for name, draw in FIGURES.items():
        with rc_context(RC):
            draw().savefig(IMAGES / f"{name}.svg", format="svg", metadata={"Date": None})
        print(IMAGES / f"{name}.svg")


if __name__ == "__main__":
    main()
