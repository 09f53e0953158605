"""Draws the figures of the explanations for the site, of tiny-olmoe on the demo articles."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from mkdocs.structure.files import File, Files
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh import NullModel, select_experts
from lm_eval_bh.analysis.show.plots.style import ALPHA, BASELINE_LINE, NEUTRAL, PALETTE, RC
from lm_eval_bh.resources import shipped, tiny_olmoe
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.calibration import calibrate, collect_router_logits, text_batches
from lm_eval_bh.routing.tables.null_kind import NullKind

TOKENS, LENGTH, LAYER, LEVEL = 4096, 512, 0, 0.4


class Measured:
    """The router logits of the demo articles, and the null model that ships."""

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
        """Return how many experts each token of each layer gets."""
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
    """Draw the null distribution over the logits, and the p-values that it gives."""
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
    """Draw how many experts tokens get at four levels."""
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
    """Draw what the weight is multiplied by: norms, and effects on the loss."""
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


FIGURES = {
    "two_tokens": two_tokens,
    "null_of_a_layer": null_of_a_layer,
    "numbers_of_experts": numbers_of_experts,
    "means_of_rules": means_of_rules,
    "factors_of_experts": factors_of_experts,
}


def on_files(files: Files, config: Any) -> Files:
    """Add the figures to the site."""
    measured = Measured()
    for name, draw in FIGURES.items():
        content = io.BytesIO()
        with rc_context(RC):
            draw(measured).savefig(content, format="svg", metadata={"Date": None})
        uri = f"images/{name}.svg"
        files.append(File.generated(config, uri, content=content.getvalue()))
    return files
