"""Measure the table in README: every rule against static top-k at the same mean number of experts.

    python scripts/compare_rules.py --output compare_rules.json

Perplexity on all of WikiText-2's test text. Every rule's parameter is solved on training text for a
mean of 3, 4, 5 and 6 experts. The mean on the test text is measured, and the rule is compared with
static top-k at *that* mean: between whole numbers its loss is interpolated, document by document,
about what mixing the two over the tokens would give. The interval is of the paired difference, by a
bootstrap over documents.

Every row is written as soon as it is measured, and a row that is in the file is not measured again,
so an interrupted run resumes. A file of another model or text is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh import (
    BHRoutingIntegration,
    NullModel,
    ParameterError,
    RoutingConfig,
    UnreachableError,
)
from lm_eval_bh.files import replacing
from lm_eval_bh.resources import TINY_OLMOE, tiny_olmoe
from lm_eval_bh.routing.nulls.find import resolve_null
from lm_eval_bh.routing.nulls.null_kind import NullKind
from lm_eval_bh.routing.nulls.texts import wikitext_texts
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.rules.registry import RULES
from lm_eval_bh.routing.scores.statistic import STATISTICS

LENGTH = 512
RESAMPLES = 10_000


@dataclass(frozen=True)
class Configuration:
    """One row: a rule on a statistic, and the mean number of experts it is solved for."""

    rule: str
    statistic: str
    variant: str
    target: float

    @property
    def label(self) -> str:
        """Its name in the file."""
        return f"{self.rule}/{self.statistic}/{self.variant}/{self.target:g}"


@dataclass
class Measured:
    """What came out; losses are sums in nats over a document's tokens.

    Where nothing was measured, ``failed`` is what the table says instead, and ``why`` the reason.
    """

    mean_experts: float | None = None
    alpha: float | None = None
    losses: list[float] = field(default_factory=list)
    failed: str | None = None
    why: str | None = None


# What a row takes besides its rule and statistic.
VARIANTS: dict[str, dict[str, Any]] = {
    "layer": {},
    "expert": {"null_scope": "expert"},
    "model, unselected": {"null_scope": "model", "null_from": "unselected"},
    "mass 0.5": {"mass": 0.5},
    "mass 0.2": {"mass": 0.2},
}


def kinds_of(name: str) -> list[tuple[str, str]]:
    """Return the (statistic, variant) that a rule is measured with."""
    factored = [name for name, row in STATISTICS.items() if row.factors]
    if RULES[name].random:
        return [("logit", "layer")]
    if name == "topk":
        return [("contribution", "layer"), ("logit", "mass 0.5")]
    if RULES[name].weighs:
        kinds = [(statistic, "layer") for statistic in ("logit", *factored)]
        return [*kinds, ("benefit", "mass 0.2")]
    kinds = [("logit", "layer"), ("contribution", "layer")]
    if name == "bh":
        kinds += [("logit", "expert"), ("contribution", "expert")]
    if name in ("bh", "p_value"):
        kinds += [(statistic, "model, unselected") for statistic in ("weight", *factored)]
    return kinds


def configurations(
    targets: Sequence[float], most: int, rules: Sequence[str]
) -> list[Configuration]:
    """Return all rows: static top-k, which the others are compared with, then target by target."""
    rows = [Configuration("topk", "logit", "layer", k) for k in range(2, most + 1)]
    for k in targets:
        rows += [Configuration(name, *kind, k) for name in rules for kind in kinds_of(name)]
    return rows


class Bench:
    """The model, the text, and the null models, loaded once."""

    def __init__(
        self, pretrained: str, limit: int | None, length: int | None, max_k: int, batch: int
    ) -> None:
        folder = str(tiny_olmoe()) if pretrained == TINY_OLMOE else pretrained
        self.max_k = max_k
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.train = wikitext_texts("train")
        self.nulls: dict[NullKind, NullModel] = {}
        self.tokens: list[int] = []
        windows: list[tuple[int, list[int]]] = []
        prefix = self.tokenizer.bos_token_id or self.tokenizer.eos_token_id
        for document, text in enumerate(wikitext_texts("test")[:limit]):
            ids = [prefix, *self.tokenizer(text, verbose=False)["input_ids"][:length]]
            self.tokens.append(len(ids) - 1)
            windows += [
                (document, ids[start : start + LENGTH + 1])
                for start in range(0, len(ids) - 1, LENGTH)
            ]
        windows.sort(key=lambda window: len(window[1]), reverse=True)
        self.batches = [windows[i : i + batch] for i in range(0, len(windows), batch)]

    def measure(self, row: Configuration) -> Measured:
        options: dict[str, Any] = {"max_k": self.max_k, "target_experts": row.target}
        if RULES[row.rule].fixed_count:
            options = {"max_k": int(row.target)}
        options |= VARIANTS[row.variant]
        try:
            config = RoutingConfig(rule=row.rule, statistic=row.statistic, **options)
            if config.needs_null and config.null_kind not in self.nulls:
                self.nulls[config.null_kind] = resolve_null(
                    "auto", self.model, find_routers(self.model), self.tokenizer, config.null_kind
                )
            routing = BHRoutingIntegration(
                self.model,
                config,
                null_model=self.nulls[config.null_kind] if config.needs_null else "auto",
                tokenizer=self.tokenizer,
                texts=self.train,
            )
        except ParameterError as error:
            unreachable = isinstance(error, UnreachableError)
            return Measured(failed="out of reach" if unreachable else "not solved", why=str(error))
        losses = np.zeros(len(self.tokens))
        with routing, torch.inference_mode():
            for batch in self.batches:
                for (document, _), loss in zip(batch, self.losses(batch), strict=True):
                    losses[document] += float(loss)
        assert routing.counters is not None
        alpha = None if routing.solution is None else routing.solution.alphas[0]
        return Measured(routing.counters.mean(), alpha, losses.tolist())

    def losses(self, batch: Sequence[tuple[int, list[int]]]) -> Tensor:
        """Return the summed loss of each window, in nats."""
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(window) for _, window in batch], batch_first=True, padding_value=-100
        )
        inputs, targets = ids[:, :-1], ids[:, 1:]
        logits = self.model(
            input_ids=inputs.clamp(min=0), attention_mask=targets != -100, use_cache=False
        ).logits
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100
        )
        return loss.view_as(targets).double().sum(-1)


bench: Bench


def start(*arguments: Any) -> None:
    """Load what a process measures with, once for all of its rows."""
    global bench
    bench = Bench(*arguments)


def measured(row: Configuration) -> tuple[Configuration, list[int], Measured]:
    """Measure a row with this process's bench."""
    return row, bench.tokens, bench.measure(row)


class Table:
    """Puts every row beside static top-k at its own mean number of experts."""

    def __init__(self, rows: dict[str, Measured], tokens: Sequence[int], seed: int) -> None:
        self.rows = rows
        self.tokens = np.asarray(tokens, dtype=float)
        self.static = {
            int(label.rsplit("/", 1)[1]): np.array(row.losses)
            for label, row in rows.items()
            if label.startswith("topk/logit/layer/")
        }
        rng = np.random.default_rng(seed)
        documents = len(self.tokens)
        self.weights = rng.multinomial(documents, np.full(documents, 1 / documents), RESAMPLES)

    def perplexity(self, losses: np.ndarray[Any, Any]) -> float:
        return math.exp(losses.sum() / self.tokens.sum())

    def static_at(self, mean: float) -> np.ndarray[Any, Any]:
        """Return the documents' losses of static top-k, between whole numbers interpolated."""
        low = min(max(int(mean), min(self.static)), max(self.static) - 1)
        share = mean - low
        interpolated: np.ndarray[Any, Any] = (1 - share) * self.static[low] + share * self.static[
            low + 1
        ]
        return interpolated

    def compare(self, row: Measured) -> tuple[float, float, float, float, float]:
        """Return (perplexity, static perplexity, difference, lower and upper end of it)."""
        own, static = np.array(row.losses), self.static_at(row.mean_experts or 0.0)
        tokens = self.weights @ self.tokens
        differences = np.exp(self.weights @ own / tokens) - np.exp(self.weights @ static / tokens)
        low, high = np.quantile(differences, [0.025, 0.975])
        a, b = self.perplexity(own), self.perplexity(static)
        return a, b, a - b, float(low), float(high)

    def cell(self, row: Configuration) -> str:
        """Return the difference, its interval, and the mean number of experts."""
        measured = self.rows.get(row.label)
        if measured is None:
            return "not measured"
        if measured.failed is not None:
            return measured.failed
        _, _, difference, low, high = self.compare(measured)
        return f"{difference:+.2f} ({low:+.2f} to {high:+.2f}) at {measured.mean_experts:.2f}"

    def print(self, wanted: Sequence[Configuration], targets: Sequence[float]) -> None:
        """Print static top-k's own perplexity, and everyone else's difference from it."""
        print("| rule | statistic | null, or mass |", *(f" mean {k:g} |" for k in targets), sep="")
        print("|---|---|---|", *("---:|" for _ in targets), sep="")
        static = [f"{self.perplexity(self.static_at(k)):.2f}" for k in targets]
        print(f"| topk (perplexity) | logit | | {' | '.join(static)} |")
        order = list(RULES)
        others = {(r.rule, r.statistic, r.variant) for r in wanted} - {("topk", "logit", "layer")}
        for kind in sorted(others, key=lambda kind: (order.index(kind[0]), kind[1:])):
            cells = [self.cell(Configuration(*kind, k)) for k in targets]
            variant = kind[2] if RULES[kind[0]].tests or kind[2].startswith("mass") else ""
            print(f"| {kind[0]} | {kind[1]} | {variant} | {' | '.join(cells)} |")


def main(
    output: Annotated[Path, typer.Option(help="JSON file for all rows; run again to resume.")],
    pretrained: str = TINY_OLMOE,
    targets: str = "3,4,5,6",
    max_k: int = 8,
    limit: Annotated[int | None, typer.Option(help="Documents; default: all.")] = None,
    tokens_per_document: Annotated[
        int | None, typer.Option(help="Tokens per document; default: all.")
    ] = None,
    rules: Annotated[str, typer.Option(help="Rules, joined by commas.")] = ",".join(RULES),
    batch_size: int = 16,
    workers: Annotated[int, typer.Option(help="Processes; each loads the model.")] = 1,
    seed: int = 0,
    table_only: Annotated[bool, typer.Option(help="Only print the rows of the file.")] = False,
) -> None:
    """Measure every row that is missing, and print the table."""
    means = [float(k) for k in targets.split(",")]
    wanted = configurations(means, max_k, rules.split(","))
    settings = {
        "pretrained": pretrained,
        "limit": limit,
        "tokens_per_document": tokens_per_document,
        "max_k": max_k,
    }
    rows: dict[str, Measured] = {}
    tokens: list[int] = []
    if output.exists():
        content = json.loads(output.read_text(encoding="utf-8"))
        if content["settings"] != settings:
            raise typer.BadParameter(
                f"{output} was made with other settings: {content['settings']}, not {settings}; "
                "give the same options, or another --output."
            )
        rows = {label: Measured(**row) for label, row in content["rows"].items()}
        tokens = content["tokens"]
    if not table_only:
        left = [row for row in wanted if row.label not in rows]
        with get_context("spawn").Pool(workers, start, (*settings.values(), batch_size)) as pool:
            done = pool.imap_unordered(measured, left)
            for row, tokens, result in tqdm(done, total=len(left), disable=None):
                rows[row.label] = result
                plain = {label: asdict(row) for label, row in rows.items()}
                content = {"settings": settings, "tokens": tokens, "rows": plain}
                with replacing(output) as temporary:
                    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(f"{len(tokens)} documents, {sum(tokens)} tokens\n")
    Table(rows, tokens, seed).print(wanted, sorted(means))


if __name__ == "__main__":
    typer.run(main)
