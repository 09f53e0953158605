"""The pictures of routing patterns, one per question."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lm_eval_bh.analysis.patterns.complexity import OFTEN
from lm_eval_bh.analysis.patterns.findings import Patterns

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SHOWN = 12  # experts in the heat map


def complexity_picture(found: Patterns) -> Any:
    """Draw experts against loss, against frequency, and by token class; return the Figure."""
    figure = _figure(found, "who gets more experts", width=13)
    loss, frequency, classes = figure.subplots(1, 3)
    known = found.documents.dropna(subset="loss")
    for number, (task, some) in enumerate(known.groupby("task", sort=True)):
        loss.scatter(
            some["loss"], some["mean_experts"], s=18, alpha=0.7, label=task, **_mark(number)
        )
    units = ", ".join(sorted(known["loss_unit"].unique())) or "not logged"
    loss.set(title="Documents: difficulty", xlabel=f"loss ({units})")
    loss.set_ylabel("mean experts per token")
    if len(known):
        loss.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    else:
        _write_message(loss, "no loss was logged:\nrun with log_samples=N")

    often = found.tokens[found.tokens["occurrences"] >= OFTEN]
    frequency.scatter(
        often["occurrences"], often["mean_experts"], s=8, alpha=0.35, color="#999999", linewidths=0
    )
    if len(often):
        middle, low, mid, high = _binned(often["occurrences"], often["mean_experts"])
        frequency.errorbar(
            middle,
            mid,
            yerr=[mid - low, high - mid],
            color=COLOURS[0],
            marker="o",
            capsize=3,
            label="median and quartiles",
        )
        frequency.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    else:
        _write_message(frequency, f"no token occurs {OFTEN} times")
    frequency.set_xscale("log")
    frequency.set(title="Tokens: frequency", xlabel="occurrences of the token in the log")
    frequency.set_ylabel("mean experts per token")

    of_class = found.classes.assign(experts=found.classes["tokens"] * found.classes["mean_experts"])
    of_class = of_class.groupby("token_class")[["tokens", "experts"]].sum()
    of_class["mean"] = of_class["experts"] / of_class["tokens"]
    of_class = of_class.sort_values("mean")
    names = [f"{name}\n({n:,} tokens)" for name, n in of_class["tokens"].items()]
    classes.barh(names, of_class["mean"], color=COLOURS[0])
    classes.bar_label(classes.containers[0], fmt="%.2f", padding=3, fontsize=8)
    classes.margins(x=0.15)
    classes.set(title="Tokens: class", xlabel="mean experts per token")
    classes.tick_params(axis="y", labelsize=8)
    return figure


def specialisation_picture(found: Patterns) -> Any:
    """Draw how specialised the experts of each layer are, and the most specialised ones."""
    from matplotlib.colors import PowerNorm

    figure = _figure(found, "what experts are for", width=13)
    table = found.specialisation
    layers, experts = figure.subplots(1, 2, width_ratios=(2, 3))
    for number, (of, some) in enumerate(table.groupby("of", sort=True)):
        shares = [100 * rows["share"] for _, rows in some.groupby("layer")]
        places = np.arange(len(shares)) + 0.36 * (number - (table["of"].nunique() - 1) / 2)
        drawn = layers.boxplot(
            shares, positions=places, widths=0.3, patch_artist=True, sym=".", manage_ticks=False
        )
        for box, line in zip(drawn["boxes"], drawn["medians"], strict=True):
            box.set(facecolor=COLOURS[number], alpha=0.6)
            line.set_color("black")
        for fliers in drawn["fliers"]:
            fliers.set(markeredgecolor=COLOURS[number], markersize=3)
        layers.plot([], [], color=COLOURS[number], linewidth=6, alpha=0.6, label=of)
    layers.set(title="Information of each expert", xlabel="layer")
    layers.set_ylabel("share of the entropy explained (%)")
    layers.set_xticks(np.arange(len(found.counts.layers)), found.counts.layers)
    layers.grid(axis="y", alpha=0.3)
    if not len(table):
        _write_message(layers, "there is one task,\nand one class of tokens")
    else:
        layers.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)

    of_class = table[table["of"] == "token class"].nlargest(SHOWN, "corrected")
    experts.set_title("The experts most informative about the token's class")
    if not len(of_class):
        _write_message(experts, "no token classes:\nname the tokenizer with --tokenizer")
        return figure
    names, lifts = found.lift_of(of_class)
    norm = PowerNorm(0.5, vmin=0)  # most are below 3, and a few above 10
    drawn = experts.imshow(lifts, cmap="cividis", aspect="auto", norm=norm)
    for row, column in np.ndindex(*lifts.shape):
        dark = norm(lifts[row, column]) < 0.55
        experts.text(
            column,
            row,
            f"{lifts[row, column]:.1f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
        )
    experts.set_xticks(
        range(len(names)), [name.replace(" ", "\n", 1) for name in names], fontsize=8
    )
    labels = [f"layer {row.layer} expert {row.expert}" for row in of_class.itertuples()]
    experts.set_yticks(range(len(labels)), labels, fontsize=8)
    figure.colorbar(drawn, ax=experts, label="times as often as tokens at large")
    return figure


def clusters_picture(found: Patterns) -> Any:
    """Draw the documents by cluster and by task, and the silhouettes that chose the number."""
    figure = _figure(found, "documents that use the experts alike", width=13)
    clustered, tasked, chosen = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    if found.clusters is None:
        for axes in (clustered, tasked, chosen):
            _write_message(axes, "too few documents")
        return figure
    places = found.clusters.places
    for axes, labels, title in (
        (clustered, [f"cluster {label}" for label in found.clusters.labels], "By cluster"),
        (tasked, found.documents["task"].tolist(), "By task"),
    ):
        for number, label in enumerate(sorted(set(labels))):
            inside = np.array([other == label for other in labels])
            axes.scatter(
                *places[inside].T,
                s=20,
                alpha=0.7,
                label=f"{label} ({inside.sum()})",
                **_mark(number),
            )
        axes.set(
            title=title, xlabel="first principal component", ylabel="second principal component"
        )
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    tried = found.clusters.silhouettes
    chosen.plot(list(tried), list(tried.values()), color=COLOURS[0], marker="o")
    best = max(tried, key=lambda k: tried[k])
    chosen.plot(best, tried[best], color=COLOURS[1], marker="D", markersize=10, linestyle="none")
    chosen.set(title="How many", xlabel="clusters", ylabel="silhouette", xticks=list(tried))
    chosen.set_ylim(min(0, *tried.values()), 1.1 * max(tried.values()))
    chosen.grid(axis="y", alpha=0.3)
    return figure


def _figure(found: Patterns, title: str, width: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 5), layout="constrained")
    figure.suptitle(f"{found.strategy}: {title}")
    return figure


def _mark(number: int) -> dict[str, str]:
    return {"color": COLOURS[number % 8], "marker": MARKERS[number % 8]}


def _write_message(axes: Any, words: str) -> None:
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes)


def _binned(x: pd.Series, y: pd.Series, bins: int = 8) -> tuple[Any, Any, Any, Any]:
    """Return middle, lower quartile, median and upper quartile of bins on a log scale."""
    edges = np.geomspace(x.min(), x.max(), bins + 1)
    place = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, bins - 1)
    of_bin = y.groupby(place)
    filled = np.flatnonzero(np.bincount(place, minlength=bins) >= 3)
    low, mid, high = (of_bin.quantile(level)[filled] for level in (0.25, 0.5, 0.75))
    return np.sqrt(edges[:-1] * edges[1:])[filled], low, mid, high
