"""Draws the figures of docs/results from the CSV files of that folder.

``python scripts/draw_results.py`` writes them into docs/images. This script holds no results: after
a change of a CSV file, draw its figure again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from lm_eval_bh.analysis.show.pareto_figure import Point, draw_pareto
from lm_eval_bh.analysis.show.plots.style import ALPHA, BASELINE_LINE, NEUTRAL, PALETTE, RC

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES = ROOT / "docs" / "results", ROOT / "docs" / "images"
WORKLOADS = {
    "prefill 1,024": "prefill, 1,024 tokens",
    "batch 32": "batch of 32",
    "decode 1": "decode, one token",
}


def numbers(name: str) -> pd.DataFrame:
    """Return the table of a CSV file of results."""
    return pd.read_csv(RESULTS / f"{name}.csv")


def errors(rows: pd.DataFrame, middle: str) -> list[Any]:
    """Return the lengths of error bars around a column, from the columns ``low`` and ``high``."""
    return [rows[middle] - rows["low"], rows["high"] - rows[middle]]


def false_rejections() -> Figure:
    """Draw the share of tokens with a false rejection beside alpha, where all are null."""
    table = numbers("false_rejections")
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, table["alpha"].nunique(), sharey=True)
    for axes, (alpha, rows) in zip(panels, table.groupby("alpha"), strict=True):
        heights = list(range(len(rows)))[::-1]
        for place, rule in enumerate(("bh", "storey", "by")):
            colour = PALETTE[(0, 4, 2)[place]]
            axes.plot(rows[rule], heights, "os^"[place], color=colour, label=rule)
        axes.axvline(float(alpha), color=NEUTRAL, linestyle=BASELINE_LINE, label=ALPHA)
        axes.set(title=f"{ALPHA} = {alpha:g}", xlabel="tokens with a rejection (share)")
        axes.set_xlim(0, None)
        axes.set_yticks(heights, rows["statistics"])
    panels[0].set_ylabel("correlation of the 64 statistics")
    return with_legend(figure, panels[0], 4)


def speed() -> Figure:
    """Draw the time of one MoE layer, against top-8 and against static top-k at the same mean."""
    table = numbers("speed")
    table[["of", "workload", "k"]] = table["ratio_of"].str.extract(r"^(.*?), (.*), k (.*)$")
    table["k"] = table["k"].astype(float)
    figure = Figure(figsize=(8, 3.3), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=(1.25, 1))
    titles = {"top-8": "Time, as a share of top-8's", "static": "... of static top-k's, same mean"}
    for axes, (control, title) in zip(panels, titles.items(), strict=True):
        compared = table[table["of"] == f"MoE layer / best stock {control}"]
        for place, (workload, label) in enumerate(WORKLOADS.items()):
            rows = compared[compared["workload"] == workload]
            at = rows["k"] + 0.09 * (place - 1)
            how = {"fmt": "os^"[place], "color": PALETTE[place], "label": label}
            axes.errorbar(at, rows["ratio"], errors(rows, "ratio"), **how)
        axes.axhline(1, color=NEUTRAL, linestyle=BASELINE_LINE)
        axes.set(title=title, xlabel="mean experts per token")
        axes.set_xticks(means := sorted(compared["k"].unique()), [f"{mean:g}" for mean in means])
    panels[0].plot([0, 8], [0, 1], color="#9A9A9A", linewidth=1, label="in proportion to experts")
    panels[0].set(xlim=(1.5, 8.5), ylim=(0, 1.4))
    panels[1].set(xlim=(1.5, 6.5), ylim=(0.8, 1.2))
    return with_legend(figure, panels[0], 4)


def pareto() -> Figure:
    """Draw the policies that beat static top-k on tiny-olmoe, over the mean number of experts."""
    table = numbers("tiny_olmoe").query("text == 'WikiText-2'")
    topk = table[table["method"] == "topk"]
    static = dict(zip(topk["mean_experts"], topk["perplexity"], strict=True))
    names = ["min_w benefit mass 0.2", "min_w predicted", "min_w benefit", "bh benefit"]
    points = {}
    for name in [*names, "bh predicted", "min_w contribution"]:
        rows = table[table["method"] == name]
        means, changes = rows["mean_experts"], rows["from_static"]
        perplexities = np.interp(means, list(static), list(static.values())) + changes
        ends = rows["from_static_low"], rows["from_static_high"]
        found = zip(means, perplexities, changes, *ends, strict=True)
        points[name] = [Point(*map(float, row)) for row in found]
    title = "Policies beside static top-k: tiny-olmoe, WikiText-2"
    return draw_pareto(static, points, title=title, best=names[0])


def league() -> Figure:
    """Draw what each method loses at half of a model's experts, per model, the best on top."""
    models = {"tiny_olmoe": 4, "tiny_glm": 4, "renormalised": 2}
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    panels = figure.subplots(1, len(models))
    for axes, (model, target) in zip(panels, models.items(), strict=True):
        table = numbers(f"league_{model}")
        rows = table[(table["target"] == target) & table["loss"].between(0.001, 5)]
        rows = rows.sort_values("loss", ascending=False)
        low, loss, high = (100 * rows[name] for name in ("loss_low", "loss", "loss_high"))
        control = rows["method"] == "topk"
        for place, (here, label) in enumerate(((~control, "method"), (control, "static top-k"))):
            heights = [height for height, wanted in enumerate(here) if wanted]
            bars = [(loss - low)[here].clip(lower=0), (high - loss)[here].clip(lower=0)]
            how = {"fmt": "os"[place], "color": PALETTE[place], "label": label, "markersize": 4}
            axes.errorbar(loss[here], heights, xerr=bars, **how)
        axes.axvline(float(loss[control].iloc[0]), color=NEUTRAL, linestyle=BASELINE_LINE)
        title = f"{model.replace('_', '-')},\n{target} of {2 * target} experts"
        axes.set(title=title, xscale="log", xlabel="loss (%)")
        ticks = [t for t in (1, 3, 10, 30, 100, 300) if low.min() < t < high.max()]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(axis="y", visible=False)  # a picture of a page has at most 150 kB
        names = rows["method"].str.removesuffix(" True")
        axes.set_yticks(range(len(rows)), names, fontsize=7)
    return with_legend(figure, axes, 2)


def batches() -> Figure:
    """Draw the loss over the distinct experts of a step, one line per method."""
    methods = {
        "static top-k": "static top",
        "SERE, k0 2": "sere, k0 2",
        "XShare": "xshare",
        "OEA": "oea",
        "fixed budget, benefit": "batch_mass, benefit",
        "batch_min_w": "batch_min_w, benefit, power 2",
    }
    table = numbers("batches").query("decode_batch == 32")
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (model, rows) in zip(panels, table.groupby("model", sort=False), strict=True):
        for place, (label, begins) in enumerate(methods.items()):
            of = rows[rows["method"].str.startswith(begins)].sort_values("distinct_experts")
            how = {"marker": "osD^vP"[place], "color": PALETTE[place], "label": label}
            axes.plot(of["distinct_experts"], 100 * of["loss"], **how)
        axes.set(title=model, xlabel="distinct experts per layer and step", yscale="log")
        axes.set_yticks(ticks := [0.5, 1, 2, 5, 10, 20, 50, 100, 200], [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    panels[0].set_ylabel("loss against static top-8 (%)")
    return with_legend(figure, panels[0], 6)


def vllm() -> Figure:
    """Draw how many times as fast as the stock top-8 each policy is in vLLM."""
    table = numbers("vllm_speed").dropna(subset=["low"])
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = {name: PALETTE[place] for place, name in enumerate(table["policy"].unique())}
    for axes, (model, of_model) in zip(panels, table.groupby("model", sort=False), strict=True):
        workloads = list(of_model["workload"].unique())
        for place, (policy, rows) in enumerate(of_model.groupby("policy", sort=False)):
            at = [row + 0.2 * (place - 1) for row in range(len(workloads))]
            how = {"fmt": "os^"[place], "color": colours[policy], "label": policy}
            axes.errorbar(at, rows["times_as_fast"], errors(rows, "times_as_fast"), **how)
        axes.axhline(1, color=NEUTRAL, linestyle=BASELINE_LINE)
        axes.set(title=model, ylim=(0.4, 2.6))
        axes.set_xticks(range(len(workloads)), workloads, rotation=30)
    panels[0].set_ylabel("times as fast as stock top-8")
    entries = {}
    for axes in panels:
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4)
    return figure


def reports() -> Figure:
    """Draw how many kinds of reported faults were found here, by area and release."""
    table = numbers("reports")
    counts = table.groupby(["area", "release"]).size().unstack(fill_value=0)
    counts = counts.loc[counts.sum(axis=1).sort_values().index]
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    left = counts.iloc[:, 0] * 0
    for place, release in enumerate(counts):
        how = {"color": PALETTE[place], "hatch": ("", "//")[place], "edgecolor": "white"}
        label = f"found in release {release}"
        axes.barh(counts.index, counts[release], left=left, label=label, **how)
        left = left + counts[release]
    axes.set(xlabel="kinds of faults reported elsewhere")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower right")
    return figure


def with_legend(figure: Figure, axes: Any, columns: int) -> Figure:
    """Add the legend of some axes above the panels of a figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)
    return figure


FIGURES = {
    "false_rejections": false_rejections,
    "speed": speed,
    "pareto": pareto,
    "league": league,
    "batches": batches,
    "vllm": vllm,
    "reports": reports,
}


def main() -> None:
    """Draw all of them."""
    for name, draw in FIGURES.items():
        with rc_context(RC):
            draw().savefig(IMAGES / f"{name}.svg", format="svg", metadata={"Date": None})
        print(IMAGES / f"{name}.svg")


if __name__ == "__main__":
    main()
