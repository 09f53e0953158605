"""The pictures of routing patterns, one per question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.patterns.complexity import OFTEN
from lm_eval_bh.analysis.patterns.findings import Patterns
from lm_eval_bh.analysis.patterns.specialisation import lift

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SHOWN = 12  # experts in the heat map


def complexity_picture(found: Patterns) -> Figure:
    """Draw experts against loss, against frequency, and by token class."""
    figure = _figure(found, "who gets more experts")
    loss, frequency, classes = figure.subplots(1, 3)

    known = found.tables["documents"].dropna(subset="loss")
    for number, (task, some) in enumerate(known.groupby("task", sort=True)):
        mark = _mark(number)
        loss.scatter(some["loss"], some["mean_experts"], s=18, alpha=0.7, label=task, **mark)
    units = ", ".join(sorted(known["loss_unit"].unique())) or "not logged"
    loss.set(title="Documents: difficulty", xlabel=f"loss ({units})")
    loss.set_ylabel("mean experts per token")
    if len(known):
        _legend_below(loss)
    else:
        _write_message(loss, "no loss was logged:\nrun with log_samples=N")

    often = found.tables["tokens"].query("occurrences >= @OFTEN")
    occurrences, experts = often["occurrences"], often["mean_experts"]
    frequency.scatter(occurrences, experts, s=8, alpha=0.35, color="#999999", linewidths=0)
    if len(often):
        middle, low, mid, high = _binned(occurrences, experts)
        bars = [mid - low, high - mid]
        how = {"color": COLOURS[0], "marker": "o", "capsize": 3, "label": "median and quartiles"}
        frequency.errorbar(middle, mid, yerr=bars, **how)
        _legend_below(frequency)
    else:
        _write_message(frequency, f"no token occurs {OFTEN} times")
    frequency.set_xscale("log")
    frequency.set(title="Tokens: frequency", xlabel="occurrences of the token in the log")
    frequency.set_ylabel("mean experts per token")

    of_task = found.tables["classes"]
    of_task = of_task.assign(experts=of_task["tokens"] * of_task["mean_experts"])
    of_class = of_task.groupby("token_class")[["tokens", "experts"]].sum()
    means = (of_class["experts"] / of_class["tokens"]).sort_values()
    names = [f"{name}\n({of_class['tokens'][name]:,} tokens)" for name in means.index]
    classes.bar_label(
        classes.barh(names, means, color=COLOURS[0]), fmt="%.2f", padding=3, fontsize=8
    )
    classes.margins(x=0.15)
    classes.set(title="Tokens: class", xlabel="mean experts per token")
    classes.tick_params(axis="y", labelsize=8)
    return figure


def specialisation_picture(found: Patterns) -> Figure:
    """Draw the specialisation of each layer's experts, and the most specialised ones."""
    figure = _figure(found, "what experts are for")
    table = found.tables["specialisation"]
    layers, experts = figure.subplots(1, 2, width_ratios=(2, 3))
    for number, (of, some) in enumerate(table.groupby("of", sort=True)):
        shares = [100 * rows["share"] for _, rows in some.groupby("layer")]
        colour = COLOURS[number]
        layers.boxplot(
            shares,
            positions=np.arange(len(shares)) + 0.36 * (number - (table["of"].nunique() - 1) / 2),
            widths=0.3,
            manage_ticks=False,
            patch_artist=True,
            boxprops={"facecolor": colour, "alpha": 0.6},
            medianprops={"color": "black"},
            flierprops={"marker": ".", "markeredgecolor": colour, "markersize": 3},
        )
        layers.plot([], [], color=colour, linewidth=6, alpha=0.6, label=of)
    layers.set(title="Information of each expert", xlabel="layer")
    layers.set_ylabel("share of the entropy explained (%)")
    layers.set_xticks(np.arange(len(found.counts.layers)), found.counts.layers)
    layers.grid(axis="y", alpha=0.3)
    if len(table):
        _legend_below(layers, y=-0.12, ncols=2)
    else:
        _write_message(layers, "there is one task,\nand one class of tokens")
    _lift_map(experts, found)
    return figure


def _lift_map(axes: Axes, found: Patterns) -> None:
    """Draw the token classes of the most informative experts."""
    from matplotlib.colors import PowerNorm

    axes.set_title("The experts most informative about the token's class")
    table = found.tables["specialisation"].query("of == 'token class'").nlargest(SHOWN, "corrected")
    if not len(table):
        _write_message(axes, "no token classes:\nname the tokenizer with --tokenizer")
        return
    counts = found.counts
    tokens, served = counts.tokens.sum(0), counts.served.sum(0)
    present = tokens.sum(0) > 0
    place = [counts.layers.index(layer) for layer in table["layer"]]
    lifts = lift(served[place, :, table["expert"]][:, present], tokens[place][:, present])
    norm = PowerNorm(0.5, vmin=0)  # most values are below 3, a few above 10
    drawn = axes.imshow(lifts, cmap="cividis", aspect="auto", norm=norm)
    for (row, column), value in np.ndenumerate(lifts):
        colour = "white" if norm(value) < 0.55 else "black"
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    names = [name.replace(" ", "\n", 1) for name in np.array(counts.classes)[present]]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    labels = [f"layer {row.layer} expert {row.expert}" for row in table.itertuples()]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.figure.colorbar(drawn, ax=axes, label="times as often as tokens at large")


def clusters_picture(found: Patterns) -> Figure:
    """Draw the documents by cluster and by task, and the silhouettes."""
    figure = _figure(found, "documents that use the experts alike")
    clustered, tasked, chosen = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    if found.clusters is None:
        for axes in (clustered, tasked, chosen):
            _write_message(axes, "too few documents")
        return figure
    documents = found.tables["documents"]
    for axes, title, names in (
        (clustered, "By cluster", "cluster " + documents["cluster"].astype(str)),
        (tasked, "By task", documents["task"]),
    ):
        for number, name in enumerate(sorted(names.unique())):
            inside = (names == name).to_numpy()
            label, mark = f"{name} ({inside.sum()})", _mark(number)
            axes.scatter(*found.clusters.places[inside].T, s=20, alpha=0.7, label=label, **mark)
        axes.set(title=title, xlabel="first principal component")
        axes.set_ylabel("second principal component")
        _legend_below(axes, ncols=2)
    tried = pd.Series(found.clusters.silhouettes)
    chosen.plot(tried, color=COLOURS[0], marker="o")
    chosen.plot(tried.nlargest(1), color=COLOURS[1], marker="D", markersize=10, linestyle="none")
    chosen.set(title="How many", xlabel="clusters", ylabel="silhouette", xticks=tried.index)
    chosen.set_ylim(min(0, tried.min()), 1.1 * tried.max())
    chosen.grid(axis="y", alpha=0.3)
    return figure


def _figure(found: Patterns, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle(f"{found.strategy}: {title}")
    return figure


def _mark(number: int) -> dict[str, str]:
    return {"color": COLOURS[number % 8], "marker": MARKERS[number % 8]}


def _legend_below(axes: Axes, y: float = -0.16, ncols: int = 1) -> None:
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, y), ncols=ncols)


def _write_message(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes)


def _binned(x: pd.Series, y: pd.Series, bins: int = 8) -> tuple[Any, Any, Any, Any]:
    """Return middle, lower quartile, median and upper quartile of bins on a log scale."""
    edges = np.geomspace(x.min(), x.max(), bins + 1)
    place = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, bins - 1)
    of_bin = y.groupby(place)
    filled = np.flatnonzero(np.bincount(place, minlength=bins) >= 3)
    low, mid, high = (of_bin.quantile(level)[filled] for level in (0.25, 0.5, 0.75))
    return np.sqrt(edges[:-1] * edges[1:])[filled], low, mid, high
