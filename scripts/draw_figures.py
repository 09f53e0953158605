"""Draws the figures of README and the explanations, for tiny-olmoe on the demo articles.

``python scripts/draw_figures.py`` writes them into docs/images, for the site and the repository.
They have a white background, so that they are readable on a dark page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh import NullModel, select_experts
from lm_eval_bh.analysis.show.plots.style import ALPHA, BASELINE_LINE, NEUTRAL, PALETTE, RC
from lm_eval_bh.export.layer_methods import layer_methods
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.pick import pick
from lm_eval_bh.routing.methods.router import softmax_output
from lm_eval_bh.routing.policy import Policy
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.calibration import calibrate, collect_router_logits, text_batches
from lm_eval_bh.routing.tables.null_kind import NullKind

ROOT = Path(__file__).resolve().parents[1]
TOKENS, LENGTH, LAYER, LEVEL = 4096, 512, 0, 0.4
FAINT_BAR = "#C9D6DF"


class Measured:
    """The router logits of the demo articles, and the shipped null model."""

    def __init__(self) -> None:
        articles = shipped("tasks") / "demo" / "wikitext.jsonl"
        lines = articles.read_text(encoding="utf-8").splitlines()
        self.texts = [json.loads(line)["page"] for line in lines]
        self.tokenizer = AutoTokenizer.from_pretrained(tiny_olmoe())
        self.model = AutoModelForCausalLM.from_pretrained(tiny_olmoe())
        self.routers = find_routers(self.model)
        batches = text_batches(self.tokenizer, self.texts, tokens=TOKENS, length=LENGTH, batch=8)
        self.logits = collect_router_logits(
            self.model, [router.module for router in self.routers], batches, progress=False
        )
        self.null = NullModel.load(shipped("kde_models") / "tiny-olmoe.safetensors")

    def counts(self, rule: str = "bh", **options: Any) -> torch.Tensor:
        """Return the number of experts of each token and layer."""
        null = self.null if METHODS[rule].tests else None
        found = [
            select_experts(logits, null, layer=layer, rule=rule, **options).counts
            for layer, logits in self.logits.items()
        ]
        return torch.cat(found).float()


def two_tokens(measured: Measured) -> Figure:
    """Draw sorted p-values against the line of Benjamini and Hochberg."""
    logits = measured.logits[LAYER]
    counts = select_experts(
        logits, measured.null, layer=LAYER, alpha=LEVEL, max_k=64, min_k=1
    ).counts
    p = measured.null.p_values(LAYER, logits).sort(dim=-1).values
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    ranks = np.arange(1, 17)
    line = ranks * LEVEL / logits.shape[-1]
    for axes, wanted in zip(figure.subplots(1, 2, sharey=True), (2, 7), strict=True):
        token = int((counts == wanted).nonzero()[0])
        values = p[token, :16].numpy()
        taken = ranks <= wanted
        axes.plot(ranks, line, color=NEUTRAL, linestyle=BASELINE_LINE, label=f"k · {LEVEL} / 64")
        axes.plot(ranks[taken], values[taken], "o", color=PALETTE[0], label="selected")
        axes.plot(
            ranks[~taken], values[~taken], "o", mfc="none", color=PALETTE[4], label="left out"
        )
        axes.set(title=f"A token that gets {wanted} experts", xlabel="rank k of the p-value")
        axes.set_ylim(0, 0.16)
    figure.axes[0].set_ylabel("p-value")
    figure.axes[0].legend(loc="upper left")
    return figure


def null_of_a_layer(measured: Measured) -> Figure:
    """Draw the null distribution over the logits, and the resulting p-values."""
    logits = measured.logits[LAYER].flatten().numpy()
    x, cdf = measured.null.cdf(LAYER)
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    left.hist(logits, bins=120, density=True, color=PALETTE[5], label="router logits of this text")
    left.plot(x, np.gradient(cdf, x), color=NEUTRAL, label="null model, of other text")
    left.set(xlabel="router logit", ylabel="density", title=f"Layer {LAYER} of tiny-olmoe")
    left.set_ylim(0, 1.3 * np.gradient(cdf, x).max())
    left.legend(loc="upper right")
    left.set_xlim(*np.quantile(logits, [0.0001, 0.9999]))
    right.semilogy(x, np.maximum(1 - cdf, 1e-12), color=PALETTE[0])
    right.axhline(LEVEL / 64, color=NEUTRAL, linestyle=BASELINE_LINE)
    right.annotate(
        f"{LEVEL} / 64: the line of the best expert",
        (0.02, LEVEL / 64),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        verticalalignment="top",
    )
    right.set(xlabel="router logit", ylabel="p-value = 1 - F(logit)", ylim=(1e-4, 1.5))
    return figure


def numbers_of_experts(measured: Measured) -> Figure:
    """Draw the numbers of experts per token at four levels."""
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.subplots()
    levels = (0.3, 0.4, 0.5, 0.6)
    for place, level in enumerate(levels):
        counts = measured.counts(alpha=level, max_k=8)
        shares = [100 * float((counts == k).float().mean()) for k in range(1, 9)]
        label = f"{ALPHA} = {level}: mean {counts.mean():.2f}"
        at = np.arange(1, 9) + (place - 1.5) * 0.2
        axes.bar(at, shares, 0.2, color=PALETTE[place], label=label)
    axes.set(xlabel="experts of a token, max_k = 8", ylabel="tokens (%)", xticks=range(1, 9))
    axes.legend()
    return figure


def means_of_rules(measured: Measured) -> Figure:
    """Draw the mean number of experts over the parameter of each rule."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panels = {
        left: ("bh", "by", "holm", "hochberg", "storey", "p_value"),
        right: ("top_p", "min_p", "min_w"),
    }
    grid = np.geomspace(0.01, 0.95, 14)
    for axes, rules in panels.items():
        for place, rule in enumerate(rules):
            means = [
                float(measured.counts(rule=rule, alpha=float(a), max_k=8).mean()) for a in grid
            ]
            axes.plot(grid, means, color=PALETTE[place], label=rule)
        axes.set_xscale("log")
        axes.legend()
    left.set(xlabel="level", ylabel="mean experts, max_k = 8", title="Tests")
    right.set(xlabel="share, or weight (min_w)", title="Rules on weights")
    return figure


def factors_of_experts(measured: Measured) -> Figure:
    """Draw the factors of the weight: norms, and effects on the loss."""
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    panels = {"contribution": "Mean output norm", "benefit": "Effect on the loss (RMS)"}
    for axes, (statistic, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        null = calibrate(
            measured.model,
            measured.tokenizer,
            [router.module for router in measured.routers],
            measured.texts,
            model_name="tiny-olmoe",
            revision=None,
            text_name="the demo articles",
            tokens=TOKENS,
            length=LENGTH,
            kind=NullKind(statistic=statistic),
            progress=False,
        )
        for layer, factors in enumerate(null.factors):
            relative = np.sort(factors / factors.mean())
            axes.plot(np.arange(1, 65), relative, color=PALETTE[layer], label=f"layer {layer}")
        axes.set(title=title, xlabel="experts, sorted", ylabel="relative to the layer's mean")
    figure.axes[0].legend()
    return figure


def routing(measured: Measured) -> Figure:
    """Draw the way of one token: router, score, decide, weigh, experts."""
    policy = Policy.load("tiny-olmoe")
    method = layer_methods(policy)[LAYER]
    router = softmax_output(measured.logits[LAYER], 64, policy.native_top_k)
    picked = pick(method, router)
    best = method.score(router).exp().topk(2).values
    legible = (picked.counts == 4) & (best[:, 0] < 2 * best[:, 1])  # the first is partly hidden
    token = int(legible.nonzero()[0])
    experts = picked.indices[token, :4].numpy()
    scores = method.score(router)[token].exp().numpy()
    bars = np.arange(64)
    kept = np.isin(bars, experts)
    order = np.argsort(-scores)[:12]
    native, ours = router.weights[token].numpy(), picked.weights[token].numpy()
    own = dict(zip(router.indices[token].tolist(), native.tolist(), strict=True))

    figure = Figure(figsize=(8.4, 2.7))
    stages = (
        ("1. Router", "A logit for each\nof 64 experts"),
        ("2. Score", "What each would\nadd to the token"),
        ("3. Decide", "Those that reach\nthe threshold: 4"),
        ("4. Weigh", "The router's weights,\ntimes a gain"),
        ("5. Experts", "4 of 64 run, and\ntheir outputs add up"),
    )
    width, gap, left = 0.158, 0.042, 0.017
    panels = []
    for place, (title, caption) in enumerate(stages):
        x = left + place * (width + gap)
        axes = figure.add_axes((x, 0.3, width, 0.53))
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_color(NEUTRAL)
        axes.spines[:].set_visible(True)
        axes.set_title(title, fontsize=11.5, fontweight="bold", pad=7)
        figure.text(
            x + width / 2, 0.25, caption, ha="center", va="top", fontsize=9.5, linespacing=1.35
        )
        if place:
            figure.text(
                x - gap / 2, 0.565, "\N{RIGHTWARDS ARROW}", ha="center", va="center", fontsize=17
            )
        panels.append(axes)
    panels[0].bar(bars, measured.logits[LAYER][token].numpy(), 1.0, color=NEUTRAL)
    panels[1].bar(bars, scores, 1.0, color=NEUTRAL)
    colours = [PALETTE[0] if kept[expert] else FAINT_BAR for expert in order]
    panels[2].bar(np.arange(len(order)), scores[order], 0.8, color=colours)
    panels[2].axhline(
        float(method.table("thresholds").exp()[0]), color=PALETTE[4], linestyle=BASELINE_LINE
    )
    panels[3].bar(np.arange(4), ours[:4], 0.62, color=PALETTE[0])
    panels[3].bar(
        np.arange(4), [own[e] for e in experts], 0.62, fill=False, edgecolor="black", linewidth=1
    )
    panels[3].set_xlim(-0.8, 3.8)
    panels[4].pcolormesh(
        np.where(kept, 1.0, 0.0).reshape(8, 8)[::-1],
        cmap=ListedColormap([FAINT_BAR, PALETTE[0]]),
        edgecolors="white",
        linewidth=2.5,
    )
    for axes in panels[1:4]:
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    return figure


FIGURES = {
    "routing": routing,
    "two_tokens": two_tokens,
    "null_of_a_layer": null_of_a_layer,
    "numbers_of_experts": numbers_of_experts,
    "means_of_rules": means_of_rules,
    "factors_of_experts": factors_of_experts,
}


def main() -> None:
    """Draw all figures, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "docs" / "images")
    asked = parser.parse_args()
    if unknown := set(asked.names) - FIGURES.keys():
        parser.error(f"there is no figure {', '.join(sorted(unknown))}")
    asked.output_dir.mkdir(parents=True, exist_ok=True)
    measured = Measured()
    for name in asked.names or FIGURES:
        file = asked.output_dir / f"{name}.svg"
        with rc_context(RC):
            FIGURES[name](measured).savefig(file, format="svg", metadata={"Date": None})
        print(file)


if __name__ == "__main__":
    main()
