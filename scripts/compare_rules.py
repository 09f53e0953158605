"""Measure docs/results' table: every rule against static top-k at the same mean number of experts.

    python scripts/compare_rules.py --output compare_rules.json

Perplexity on all of WikiText-2's test text. Every rule's parameter is solved on training text for a
mean of 3, 4, 5 and 6 experts. The mean on the test text is measured, and the rule is compared with
static top-k at *that* mean: between whole numbers its loss is interpolated, document by document,
about what mixing the two over the tokens would give. The interval is of the paired difference, by a
bootstrap over documents.

    python scripts/compare_rules.py --text hellaswag --limit 2000 --output hellaswag.json

scores other texts, with the parameters that were solved on WikiText-2: what carries over.

Every row is written as soon as it is measured, and a row that is in the file is not measured again,
so an interrupted run resumes. A file of another model or text is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from datasets import load_dataset
from lm_eval.tasks.hellaswag.utils import preprocess
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_bh import (
    BHRoutingIntegration,
    NullModel,
    ParameterError,
    RoutingConfig,
    UnreachableError,
)
from lm_eval_bh.analysis.show.pareto_figure import Point, draw_pareto
from lm_eval_bh.files import figure_format, replacing
from lm_eval_bh.harness.demo_texts import demo_documents
from lm_eval_bh.policies.document_losses import Documents
from lm_eval_bh.policies.paired_differences import Difference, Ladder, PairedBootstrap
from lm_eval_bh.resources import TINY_OLMOE, model_path
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.scores import STATISTICS
from lm_eval_bh.routing.routers import find_routers
from lm_eval_bh.routing.tables.find import resolve_null
from lm_eval_bh.routing.tables.null_kind import NullKind
from lm_eval_bh.routing.tables.texts import wikitext_texts

LENGTH = 512
DRAWN = 6  # rows of the figure


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

    @property
    def name(self) -> str:
        """Its name in the figure, without the target."""
        variant = "" if self.variant == "layer" else f", {self.variant}"
        return f"{self.rule} {self.statistic}{variant}"

    @property
    def is_static(self) -> bool:
        """Whether it is what the others are compared with."""
        return (self.rule, self.statistic, self.variant) == ("topk", "logit", "layer")


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
    factored = [name for name, row in STATISTICS.items() if row.table]
    if METHODS[name].random:
        return [("logit", "layer")]
    if name == "topk":
        return [("contribution", "layer"), ("logit", "mass 0.5")]
    if not METHODS[name].tests:
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
    least = max(1, int(min(targets)) - 1)  # a mean that is missed stays between two of them
    rows = [Configuration("topk", "logit", "layer", k) for k in range(least, most + 1)]
    for k in targets:
        rows += [Configuration(name, *kind, k) for name in rules for kind in kinds_of(name)]
    return rows


def hellaswag_texts() -> list[str]:
    """Return HellaSwag's validation split, each context with its right ending."""
    rows = load_dataset("Rowan/hellaswag", split="validation")
    return [preprocess(f"{row['ctx']} {row['endings'][int(row['label'])]}") for row in rows]


def lambada_texts() -> list[str]:
    """Return LAMBADA's passages with their last words."""
    return list(load_dataset("EleutherAI/lambada_openai", "default", split="test")["text"])


TEXTS: dict[str, Callable[[], list[str]]] = {
    "wikitext": lambda: wikitext_texts("test"),
    "demo": lambda: demo_documents(10**6),
    "hellaswag": hellaswag_texts,
    "lambada": lambada_texts,
}


class Bench:
    """The model, the text, and the null models, loaded once."""

    def __init__(
        self,
        pretrained: str,
        limit: int | None,
        length: int | None,
        max_k: int,
        text: str,
        batch: int,
    ) -> None:
        folder = model_path(pretrained)
        self.max_k = max_k
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.train = wikitext_texts("train")
        self.nulls: dict[NullKind, NullModel] = {}
        self.documents = Documents.of(
            self.tokenizer,
            TEXTS[text]()[:limit],
            length=LENGTH,
            batch=batch,
            tokens_per_document=length,
        )

    def measure(self, row: Configuration) -> Measured:
        options: dict[str, Any] = {"max_k": self.max_k, "target_experts": row.target}
        if METHODS[row.rule].fixed_count:
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
        with routing:
            losses = self.documents.losses(self.model)
        assert routing.counters is not None
        alpha = None if routing.solution is None else routing.solution.alphas[0]
        return Measured(routing.counters.mean(), alpha, losses.tolist())


bench: Bench


def start(*arguments: Any) -> None:
    """Load what a process measures with, once for all of its rows."""
    global bench
    bench = Bench(*arguments)


def measured(row: Configuration) -> tuple[Configuration, list[int], Measured]:
    """Measure a row with this process's bench."""
    return row, bench.documents.tokens.astype(int).tolist(), bench.measure(row)


class Table:
    """Puts every row beside static top-k at its own mean number of experts."""

    def __init__(self, rows: dict[str, Measured], tokens: Sequence[int], seed: int) -> None:
        self.rows = rows
        self.bootstrap = PairedBootstrap(np.asarray(tokens, dtype=float), seed=seed)
        self.static = Ladder(
            {
                float(label.rsplit("/", 1)[1]): np.array(row.losses)
                for label, row in rows.items()
                if label.startswith("topk/logit/layer/")
            }
        )

    def compare(self, row: Measured) -> Difference:
        """Compare a row with static top-k at its own mean."""
        control = self.static.at(row.mean_experts or 0.0)
        return self.bootstrap.compare(np.array(row.losses), control)

    def cell(self, row: Configuration) -> str:
        """Return the difference, its interval, and the mean number of experts."""
        measured = self.rows.get(row.label)
        if measured is None:
            return "not measured"
        if measured.failed is not None:
            return measured.failed
        found = self.compare(measured)
        interval = f"({found.low:+.2f} to {found.high:+.2f})"
        return f"{found.difference:+.2f} {interval} at {measured.mean_experts:.2f}"

    def print(self, wanted: Sequence[Configuration], targets: Sequence[float]) -> None:
        """Print static top-k's own perplexity, and everyone else's difference from it."""
        print("| rule | statistic | null, or mass |", *(f" mean {k:g} |" for k in targets), sep="")
        print("|---|---|---|", *("---:|" for _ in targets), sep="")
        static = [f"{self.bootstrap.perplexity(self.static.at(k)):.2f}" for k in targets]
        print(f"| topk (perplexity) | logit | | {' | '.join(static)} |")
        order = list(METHODS)
        others = {(r.rule, r.statistic, r.variant) for r in wanted} - {("topk", "logit", "layer")}
        for kind in sorted(others, key=lambda kind: (order.index(kind[0]), kind[1:])):
            cells = [self.cell(Configuration(*kind, k)) for k in targets]
            variant = kind[2] if METHODS[kind[0]].tests or kind[2].startswith("mass") else ""
            print(f"| {kind[0]} | {kind[1]} | {variant} | {' | '.join(cells)} |")

    def draw(self, wanted: Sequence[Configuration], path: Path, title: str) -> None:
        """Draw the rows that beat static top-k somewhere, the best first, over their means."""
        points: dict[str, list[Point]] = {}
        for row in wanted:
            measured = self.rows.get(row.label)
            if measured is None or measured.mean_experts is None or row.is_static:
                continue
            found = self.compare(measured)
            points.setdefault(row.name, []).append(
                Point(
                    measured.mean_experts,
                    found.perplexity,
                    found.difference,
                    found.low,
                    found.high,
                )
            )
        least = {name: min(p.difference for p in found) for name, found in points.items()}
        best = sorted((name for name in points if least[name] < 0), key=least.__getitem__)
        static = {k: self.bootstrap.perplexity(loss) for k, loss in self.static.rungs.items()}
        figure = draw_pareto(
            static,
            {name: points[name] for name in best[:DRAWN]},
            title=f"Policies beside static top-k: {title}",
            best=best[0] if best else None,
        )
        with replacing(path) as temporary:
            figure.savefig(temporary, format=figure_format(path), dpi=160)


def main(
    output: Annotated[Path, typer.Option(help="JSON file for all rows; run again to resume.")],
    pretrained: str = TINY_OLMOE,
    targets: str = "3,4,5,6",
    max_k: int = 8,
    text: Annotated[str, typer.Option(help=f"What is scored: {', '.join(TEXTS)}.")] = "wikitext",
    limit: Annotated[int | None, typer.Option(help="Documents; default: all.")] = None,
    tokens_per_document: Annotated[
        int | None, typer.Option(help="Tokens per document; default: all.")
    ] = None,
    rules: Annotated[str, typer.Option(help="Rules, joined by commas.")] = ",".join(
        name for name, method in METHODS.items() if not method.recorded
    ),
    batch_size: int = 16,
    workers: Annotated[int, typer.Option(help="Processes; each loads the model.")] = 1,
    seed: int = 0,
    figure: Annotated[
        Path | None, typer.Option(help="Also draw the best rows, to this PNG, PDF or SVG.")
    ] = None,
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
        "text": text,
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
    table = Table(rows, tokens, seed)
    table.print(wanted, sorted(means))
    if figure is not None:
        table.draw(wanted, figure, f"{pretrained.rsplit('/', 1)[-1]}, {text}")


if __name__ == "__main__":
    typer.run(main)
