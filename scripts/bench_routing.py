"""Savings of fewer experts: stock transformers, static top-k, the prototype, this package.

python scripts/bench_routing.py                           # tiny-olmoe, and OLMoE's true size
python scripts/bench_routing.py --quick                   # two repeats
python scripts/bench_routing.py --profile                 # also shows where the time goes
python scripts/bench_routing.py --shared                  # on a CPU that others use too
python scripts/bench_routing.py --full-size               # all 16 layers, random bfloat16 weights
python scripts/bench_routing.py --device cuda --dtype bfloat16
python scripts/bench_routing.py --hooks                   # only what every method adds to a layer
python scripts/bench_routing.py --hooks --compiled        # its decisions under torch.compile, too
python scripts/bench_routing.py --harness                 # whole lm_eval runs: hf against hf-bh
python scripts/bench_routing.py --small --quick           # seconds: only to see that it works

Every number of a table comes from one run: in each repeat every row runs once, in turn, and the
median over the repeats counts, so that a machine that slows down slows all rows down. The stack has
random weights at OLMoE's true dimensions: its quality is meaningless, its time is not. Counts vary
between tokens: the null model is fitted to the stack's own logits made narrower, and alpha is
solved for the target mean count. Decoding is a sequence of single tokens, each with its own count.

The cost of a method is the time of the routers of a whole pass with its hooks minus without, as a
share of the time of one MoE layer with the model's own top-8, all measured in turn in one run.
"""

from __future__ import annotations

import copy
import csv
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModelForCausalLM, OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeModel, OlmoePreTrainedModel

from lm_eval_bh import BHRoutingIntegration, NullModel
from lm_eval_bh.files import replacing
from lm_eval_bh.resources import tiny_olmoe
from lm_eval_bh.routing.config import RoutingConfig
from lm_eval_bh.routing.fitted import fitted_method
from lm_eval_bh.routing.methods import METHODS
from lm_eval_bh.routing.methods.router import softmax_output
from lm_eval_bh.routing.patching import hook
from lm_eval_bh.routing.ranked import ranked_scores
from lm_eval_bh.routing.tables.null_kind import NullKind
from lm_eval_bh.speed.floor import measure_machine, wait_for

MEANS = (8.0, 6.0, 4.5, 4.0, 2.0)
STOCK = ("eager", "grouped_mm", "batched_mm")
BATCH, PROMPT, STEPS = 32, 1024, 16
LAYERS = 16  # of OLMoE-1B-7B
HOOK_LIMIT = 0.01  # of the time of the MoE layer
# Every method, and more expensive variants: p-values per expert, factors and a gain.
HOOKS: dict[str, dict[str, Any]] = {
    **{
        name: {"rule": name}
        for name, own in METHODS.items()
        if not (own.measured or own.runs_experts or own.recorded)
    },
    "bh, null of each expert": {"rule": "bh", "null_scope": "expert"},
    "min_w, benefit, mass 0.2": {"rule": "min_w", "statistic": "benefit", "mass": 0.2},
    "min_w, predicted": {"rule": "min_w", "statistic": "predicted"},
}
COMPILED = ("bh", "min_w")
NARROWER = (
    1.5  # the null model is that much narrower than the logits, so that there is something to find
)
console = Console(width=200)


@dataclass(frozen=True)
class Workload:
    """The input of one measurement: ``calls`` forward passes over ``shape`` tokens each."""

    name: str
    shape: tuple[int, int]
    calls: int


WORKLOADS = (
    Workload("prefill 1,024", (1, PROMPT), 1),
    Workload("batch 32", (BATCH, 1), 1),
    Workload("decode 1", (1, 1), STEPS),
)


@dataclass
class Part:
    """A part of a model, and how to call it on a workload's input."""

    name: str
    model: nn.Module
    call: Callable[[Tensor], Any]
    inputs: dict[str, list[Tensor]]
    times: int = 1  # how many such parts a call runs, one after the other
    experts: bool = True  # whether experts run at all
    dense_bytes: int = 0  # of parameters that every token needs


@dataclass
class Result:
    """One row in one column; seconds are per forward pass."""

    part: str
    workload: str
    row: str
    wanted_k: float
    mean_k: float
    seconds: list[float] = field(default_factory=list)
    floor: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Row:
    """One way of routing and computing: a context for calling the part."""

    name: str
    wanted_k: float
    mean_k: float
    context: Callable[[], AbstractContextManager[Any]]


class Routers(OlmoePreTrainedModel):
    """Only the routers of a forward pass, so that costs per pass are divided among them."""

    def __init__(self, router: nn.Module, config: OlmoeConfig, layers: int) -> None:
        super().__init__(OlmoeConfig(**config.to_dict(), experts_implementation="eager"))
        self.routers = nn.ModuleList(copy.deepcopy(router) for _ in range(layers))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for router in self.routers:
            router(hidden_states)
        return hidden_states


def routers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "OlmoeTopKRouter"]


@contextmanager
def stock(model: Any, implementation: str, k: int) -> Iterator[None]:
    """Stock transformers with another top-k."""
    before, routers = model.get_experts_implementation(), routers_of(model)
    own = routers[0].top_k
    model.set_experts_implementation(implementation)
    for router in routers:
        router.top_k = k
    try:
        yield
    finally:
        model.set_experts_implementation(before)
        for router in routers:
            router.top_k = own


@contextmanager
def compiled(context: AbstractContextManager[Any]) -> Iterator[None]:
    """Decide under torch.compile."""
    before = hook.pick
    hook.pick = torch.compile(before, dynamic=False)  # type: ignore[assignment]
    try:
        with context, torch._dynamo.config.patch(recompile_limit=4 * LAYERS):
            yield
    finally:
        hook.pick = before  # type: ignore[assignment]


@contextmanager
def prototype(
    model: Any, implementation: str, null: NullModel, alpha: float, max_k: int
) -> Iterator[None]:
    """Interpolate p-values in NumPy; compute ``max_k`` slots, unused ones with weight zero."""

    def hook(layer: int) -> Callable[..., Any]:
        x, cdf = null.cdf(layer)

        def select(module: nn.Module, args: Any, output: Any) -> Any:
            logits = output[0]
            values = logits.detach().float().cpu().numpy()
            p = torch.from_numpy(1.0 - np.interp(values, x, cdf)).to(logits.device)
            ordered, _ = p.sort(dim=-1)
            rank = torch.arange(1, p.shape[-1] + 1, device=p.device)
            met = ordered <= rank / p.shape[-1] * alpha
            counts = torch.where(met, rank, 0).amax(-1).clamp(1, max_k)
            weights = torch.softmax(logits, dim=-1, dtype=torch.float)
            weights, indices = weights.topk(max_k, dim=-1)
            used = torch.arange(max_k, device=p.device) < counts.unsqueeze(-1)
            weights = torch.where(used, weights, 0.0)
            weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights.to(logits.dtype), indices

        return select

    handles = [
        router.register_forward_hook(hook(layer)) for layer, router in enumerate(routers_of(model))
    ]
    try:
        with stock(model, implementation, max_k):
            yield
    finally:
        for handle in handles:
            handle.remove()


class Bench:
    """Solves the levels, runs the rows of a part in turn, and knows the floor."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        repeats: int,
        now: Callable[[], float] = time.perf_counter,
        array: int = 2**27,
    ) -> None:
        self.dtype, self.device, self.repeats, self.now = dtype, device, repeats, now
        self.results: list[Result] = []
        self.hooks: list[Result] = []
        self.means = MEANS
        self.machine = measure_machine(dtype, device, now, array)

    def clock(self, part: Part, inputs: list[Tensor]) -> float:
        """Return the seconds of one part, on average over the inputs."""
        wait_for(self.device)
        start = self.now()
        for value in inputs:
            part.call(value)
        wait_for(self.device)
        return (self.now() - start) / len(inputs) / part.times

    def logits(self, part: Part, inputs: list[Tensor]) -> dict[int, Tensor]:
        """Return the router logits of the layers that a part runs, on the CPU."""
        found: dict[int, list[Tensor]] = {}
        with BHRoutingIntegration(part.model, rule="topk", collect_stats=False) as routing:
            routing.observers.append(lambda at, z, _: found.setdefault(at, []).append(z))
            for value in inputs:
                part.call(value)
        return {at: torch.cat(values).float().cpu() for at, values in found.items()}

    def solve(
        self, part: Part, inputs: list[Tensor]
    ) -> tuple[NullModel, dict[float, tuple[float, float]]]:
        """Return a null model and, for each target mean count, (alpha, actual mean count)."""
        logits = self.logits(part, inputs)
        null = NullModel.fit(
            {
                at: logits.get(at, logits[min(logits)]) / NARROWER
                for at in range(len(routers_of(part.model)))
            }
        )
        solved = []
        for at, z in logits.items():
            method = fitted_method(RoutingConfig(max_k=8), null, at, z.shape[-1])
            solved.append((method, ranked_scores(method, null, at, softmax_output(z, 8, 8))[0]))

        def mean(log_odds: float) -> float:
            alpha = float(1 / (1 + np.exp(-log_odds)))
            counts = [method.count(ranked, method.level(alpha)) for method, ranked in solved]
            return float(torch.cat(counts).clamp(1, 8).double().mean())

        levels: dict[float, tuple[float, float]] = {}
        for wanted in self.means:
            if wanted == max(self.means):
                levels[wanted] = 0.5, wanted
                continue
            aim = got = wanted
            for _ in range(4):  # fewer experts below change the logits above
                low, high = -14.0, 5.0
                for _ in range(14):
                    middle = (low + high) / 2
                    low, high = (middle, high) if mean(middle) < aim else (low, middle)
                alpha = float(1 / (1 + np.exp(-high)))
                with BHRoutingIntegration(part.model, kde=null, alpha=alpha) as routing:
                    for value in inputs:
                        part.call(value)
                    got = routing.counters.mean() or 0.0  # type: ignore[union-attr]
                if abs(got - wanted) < 0.05:
                    break
                aim = min(max(aim + wanted - got, 1.0), 8.0)
            levels[wanted] = alpha, got
        return null, levels

    def trial(
        self, part: Part, inputs: list[Tensor], context: AbstractContextManager[Any]
    ) -> float:
        """Return the seconds of a second call."""
        with context:
            self.clock(part, inputs)
            return self.clock(part, inputs)

    def possible(self, part: Part, inputs: list[Tensor]) -> list[str]:
        """Return the stock implementations whose copies of weights fit into memory."""
        config: Any = part.model.config
        tokens = inputs[0].shape[0] * inputs[0].shape[1]
        copied = tokens * 8 * 3 * config.hidden_size * config.intermediate_size
        return [
            name
            for name in (STOCK if part.experts else STOCK[:1])
            if name != "batched_mm" or copied * self.dtype.itemsize < 2**28
        ]

    def best(self, part: Part, inputs: list[Tensor]) -> str:
        """Return the fastest stock implementation at top-8."""
        return min(
            self.possible(part, inputs),
            key=lambda name: self.trial(part, inputs, stock(part.model, name, 8)),
        )

    def rows(
        self,
        part: Part,
        inputs: list[Tensor],
        null: NullModel,
        levels: dict[float, tuple[float, float]],
    ) -> list[Row]:
        """Return every row of a part."""
        model: Any = part.model
        possible = self.possible(part, inputs)
        best = self.best(part, inputs)
        rows = []
        for wanted, (alpha, found) in levels.items():
            for k in sorted({int(wanted), -int(-wanted // 1)}):
                rows += [
                    Row(f"stock {name} top-{k}", k, k, lambda n=name, k=k: stock(model, n, k))
                    for name in possible
                ]
            rows.append(
                Row(
                    "prototype",
                    wanted,
                    found,
                    lambda a=alpha: prototype(model, best, null, a, 8),
                )
            )
            equal = wanted == max(self.means)
            rows.append(
                Row(
                    "ours",
                    wanted,
                    found,
                    lambda a=alpha, e=equal: BHRoutingIntegration(
                        model,
                        kde=null,
                        alpha=a,
                        min_k=8 if e else 1,
                        max_k=8,
                        collect_stats=False,  # bench_logging.py measures what logs cost
                    ),
                )
            )
        return list({(row.name, row.wanted_k): row for row in rows}.values())

    def run(self, part: Part) -> None:
        """Measure every workload of a part."""
        for workload in WORKLOADS:
            inputs = part.inputs[workload.name]
            null, levels = self.solve(part, inputs)
            rows = self.rows(part, inputs, null, levels)
            found = {
                row: Result(part.name, workload.name, row.name, row.wanted_k, row.mean_k)
                for row in rows
            }
            floors: dict[float, float] = {}
            for row in rows:  # warm up, and count the work
                with row.context():
                    self.clock(part, inputs)
                floors[row.wanted_k] = 0.0
            for wanted in floors:
                k = levels[wanted][1] if wanted in levels else wanted
                alpha = levels[wanted][0] if wanted in levels else None
                floors[wanted] = self.floor(part, inputs, null, alpha, k)
            bar = tqdm(range(self.repeats), f"{part.name}, {workload.name}", disable=None)
            for _ in bar:
                for row in rows:
                    with row.context():
                        if not part.experts:  # a router takes less time than what is made ready
                            self.clock(part, inputs)
                        found[row].seconds.append(self.clock(part, inputs))
            for result in found.values():
                result.floor = floors[result.wanted_k]
                self.results.append(result)

    def run_hooks(self, routers: Part, layer: Part, with_compiled: bool) -> None:
        """Measure the routers of a pass with the hooks of every method, and the MoE layer."""
        for workload in WORKLOADS:
            fed = routers.inputs[workload.name], layer.inputs[workload.name]
            tables = calibrated(self.logits(routers, fed[0])[0], routers.model)
            contexts = {"stock router": lambda: stock(routers.model, "eager", 8)}
            for name, options in HOOKS.items():
                k = 4 if METHODS[options["rule"]].fixed_count else 8
                config = RoutingConfig(**options, max_k=k)
                null = tables[config.null_kind] if config.needs_null else "auto"
                contexts[name] = lambda c=config, n=null: BHRoutingIntegration(
                    routers.model, c, null_model=n, collect_stats=False
                )
            if with_compiled:
                for name in COMPILED:
                    contexts[f"{name}, compiled"] = lambda make=contexts[name]: compiled(make())
            own = self.best(layer, fed[1])
            seconds: dict[str, list[float]] = {name: [] for name in (*contexts, "MoE layer")}
            for context in contexts.values():  # warm up
                with context():
                    self.clock(routers, fed[0])
            for _ in tqdm(range(self.repeats), f"hooks, {workload.name}", disable=None):
                with stock(layer.model, own, 8):
                    seconds["MoE layer"].append(self.clock(layer, fed[1]))
                for name, context in contexts.items():
                    with context():
                        self.clock(routers, fed[0])
                        seconds[name].append(self.clock(routers, fed[0]))
            self.hooks += [
                Result("hook", workload.name, name, 8, 8, taken) for name, taken in seconds.items()
            ]

    def floor(
        self, part: Part, inputs: list[Tensor], null: NullModel, alpha: float | None, k: float
    ) -> float:
        """Return the lower bound of seconds for this work: arithmetic, or memory."""
        touched: list[int] = []
        changes: dict[str, Any] = (
            {"min_k": int(k), "max_k": int(k)}
            if alpha is None or k == max(self.means)
            else {"alpha": alpha}
        )
        routing = BHRoutingIntegration(part.model, kde=null, experts="eager", **changes)
        routing.observers.append(
            lambda _, logits, s: touched.append(int((s.indices.unique() < logits.shape[-1]).sum()))
        )
        with routing, FlopCounterMode(display=False) as counter:
            for value in inputs:
                part.call(value)
        config: Any = part.model.config
        expert = 3 * config.hidden_size * config.intermediate_size * self.dtype.itemsize
        read = part.dense_bytes * len(inputs) + (sum(touched) * expert if part.experts else 0)
        read += sum(value.numel() * value.element_size() for value in inputs)
        return self.machine.floor(counter.get_total_flops(), read) / len(inputs) / part.times

    def of(self, part: str, workload: str, row: str, k: float) -> Result | None:
        for r in self.results:
            if (r.part, r.workload, r.row, r.wanted_k) == (part, workload, row, k):
                return r
        return None

    def best_stock(self, part: str, workload: str, k: float) -> list[float]:
        """Return the seconds of the best stock implementation; between two k, their means."""
        best = [
            min(
                (
                    r
                    for r in self.results
                    if (r.part, r.workload, r.wanted_k) == (part, workload, bound)
                    and r.row.startswith("stock")
                ),
                key=lambda r: r.median,
            ).seconds
            for bound in sorted({int(k), -int(-k // 1)})
        ]
        return [statistics.mean(each) for each in zip(*best, strict=True)]


def calibrated(logits: Tensor, model: nn.Module) -> dict[NullKind, NullModel]:
    """Return the null models for the methods of HOOKS, equal in every layer."""
    layers, hidden = len(routers_of(model)), routers_of(model)[0].weight.shape[1]
    experts, narrow = logits.shape[-1], logits / NARROWER
    found = {}
    for options in HOOKS.values():
        config = RoutingConfig(**options)
        kind = config.null_kind
        if not config.needs_null or kind in found:
            continue
        factors = None
        if kind.statistic != "logit":
            shape = (1, hidden + 2, experts) if kind.statistic == "predicted" else (1, experts)
            factors = 0.5 + np.random.default_rng(0).random(shape)
        if kind.statistic == "predicted":
            one = NullModel.from_scores([narrow], kind, factors)
        else:
            one = NullModel.fit(
                {0: narrow},
                null_scope=kind.null_scope,
                statistic=kind.statistic,
                factors=factors,
            )
        header = replace(one.header, num_layers=layers, bandwidth=None)
        repeated = None if factors is None else factors.repeat(layers, 0)
        found[kind] = NullModel(one.tables * layers, header, repeated)
    return found


def parts_of(name: str, model: Any, only_model: bool, layers: int = LAYERS) -> list[Part]:
    """Return the router, the MoE layer and the whole of a model, with their inputs."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = {
        w.name: [
            torch.randint(2, vocabulary, w.shape, generator=generator).to(model.device)
            for _ in range(w.calls)
        ]
        for w in WORKLOADS
    }
    limit = getattr(model.config, "max_position_embeddings", PROMPT)
    if limit < PROMPT:  # tiny-olmoe: as many tokens, in rows it was made for
        ids[WORKLOADS[0].name] = [ids[WORKLOADS[0].name][0].reshape(-1, 256)]

    def whole(value: Tensor) -> Any:
        return model(value, use_cache=False)

    def dense(module: nn.Module) -> int:
        return sum(
            p.numel() * p.element_size()
            for n, p in module.named_parameters()
            if "experts" not in n and "embed" not in n
        )

    parts = [Part(f"{name}", model, whole, ids, dense_bytes=dense(model))]
    if only_model:
        return parts
    block = next(m for m in model.modules() if type(m).__name__ == "OlmoeSparseMoeBlock")
    hidden: dict[str, list[Tensor]] = {w: [] for w in ids}
    for workload, values in ids.items():
        handle = block.register_forward_pre_hook(
            lambda _, args, w=workload: hidden[w].append(args[0].clone())
        )
        for value in values:
            whole(value)
        handle.remove()
    routers = Routers(block.gate, model.config, layers)
    return [
        Part("router", routers, routers, hidden, layers, False, dense(routers)),
        Part("MoE layer", model, block, hidden, dense_bytes=dense(block.gate)),
        *parts,
    ]


def true_size(
    layers: int, dtype: torch.dtype, device: torch.device, small: bool = False
) -> nn.Module:
    """Return OLMoE-1B-7B without its head, with random weights and ``layers`` layers.

    With ``small`` its matrices are small too.
    """
    config = OlmoeConfig(
        num_hidden_layers=layers,
        hidden_size=64 if small else 2048,
        intermediate_size=32 if small else 1024,
        num_experts=64,
    )
    if layers < 16 or small:
        config.vocab_size = 4096
    torch.manual_seed(0)
    with torch.device("meta"):
        model = OlmoeModel(config)
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:  # one draw of a slice, repeated: 7 billion normal numbers take minutes
                flat = parameter.view(-1)
                noise = torch.randn(min(len(flat), 2**22 + 13), device=device) * 0.02
                for start in range(0, len(flat), len(noise)):
                    piece = flat[start : start + len(noise)]
                    piece.copy_(noise[: len(piece)])
    model.rotary_emb = type(model.rotary_emb)(config).to(device)  # its buffers are computed
    return model.eval()


def show(bench: Bench) -> None:
    """Print one table of milliseconds and multiples of the floor, by row, part and workload."""
    columns = list(dict.fromkeys((r.part, r.workload) for r in bench.results))
    table = Table(
        "row",
        "mean k",
        *(f"{part}\n{workload}" for part, workload in columns),
        title="Median milliseconds of a forward pass, and in brackets how many times the floor",
    )
    for k in sorted({r.wanted_k for r in bench.results}, reverse=True):
        names = list(dict.fromkeys(r.row for r in bench.results if r.wanted_k == k))
        for name in names:
            cells = []
            for column in columns:
                r = bench.of(*column, name, k)
                cells.append(f"{r.median * 1e3:.3g} ({r.median / r.floor:.1f})" if r else "")
            table.add_row(name, f"{k:g}", *cells, style="bold" if name == "ours" else "")
        table.add_section()
    console.print(table)
    means = Table(
        "part", "workload", *(f"{k:g}" for k in bench.means), title="Mean k of ours, as it was"
    )
    for column in columns:
        got = [bench.of(*column, "ours", k) for k in bench.means]
        means.add_row(*column, *(f"{r.mean_k:.2f}" if r else "" for r in got))
    console.print(means)


def checks(bench: Bench) -> list[dict[str, Any]]:
    """Return the targets, each as a ratio of two rows of this run."""
    found: list[dict[str, Any]] = []

    def add(what: str, ratio: float, interval: list[float], limit: float | None) -> None:
        reached = None if limit is None else ratio <= limit
        found.append(
            {
                "what": what,
                "ratio": ratio,
                "interval": interval,
                "limit": limit,
                "reached": reached,
            }
        )

    columns = list(dict.fromkeys((r.part, r.workload) for r in bench.results))
    for (part, workload), k in itertools.product(columns, bench.means):
        ours = bench.of(part, workload, "ours", k)
        if ours is None:
            continue
        top_8 = bench.best_stock(part, workload, 8)
        ratio = paired(ours.seconds, top_8)
        if part == "router":
            add(f"router / stock router, {workload}, k {k:g}", *ratio, None)
            if layer := bench.of("MoE layer", workload, "ours", k):
                added = paired(list(np.subtract(ours.seconds, top_8)), layer.seconds)
                add(f"what routing adds / layer, {workload}, k {k:g}", *added, HOOK_LIMIT)
                share = paired(ours.seconds, layer.seconds)
                add(f"router / layer, {workload}, k {k:g}", *share, None)
            continue
        limit = static = None
        if part == "MoE layer":  # whole models have no limit: they are shown
            static = 1.05 if k < max(bench.means) else None  # top-8 is the model as it was
            limit = {("prefill 1,024", 4.5): 0.65, ("decode 1", 4.0): 0.55}.get((workload, k))
        alike = paired(ours.seconds, bench.best_stock(part, workload, k))
        add(f"{part} / best stock static, {workload}, k {k:g}", *alike, static)
        add(f"{part} / best stock top-8, {workload}, k {k:g}", *ratio, limit)
    for workload in WORKLOADS:
        seconds = {r.row: r.seconds for r in bench.hooks if r.workload == workload.name}
        layers, stock_router = seconds.pop("MoE layer", []), seconds.pop("stock router", [])
        for name, taken in seconds.items():
            added = paired(list(np.subtract(taken, stock_router)), layers)
            limit = None if name.endswith(", compiled") else HOOK_LIMIT
            add(f"hook of {name} / layer, {workload.name}", *added, limit)
    return found


def show_hooks(bench: Bench) -> None:
    """Print the microseconds of router and hook for each method, and the hook's share."""
    names = list(dict.fromkeys(r.row for r in bench.hooks))
    table = Table(
        "router with the hook of",
        *(workload.name for workload in WORKLOADS),
        title="Microseconds a layer, and in brackets the hook's share of the MoE layer's time",
    )
    rows = {(r.row, r.workload): r for r in bench.hooks}
    for name in names:
        cells = []
        for workload in WORKLOADS:
            r, layer = rows[name, workload.name], rows["MoE layer", workload.name]
            bare = rows["stock router", workload.name].median
            share = f" ({100 * (r.median - bare) / layer.median:.2f} %)" if r is not layer else ""
            cells.append(f"{r.median * 1e6:,.0f}{share}")
        table.add_row(name, *cells)
    console.print(table)


def show_checks(found: list[dict[str, Any]]) -> None:
    table = Table("ratio of", "measured", "wanted, at most", "", title="Numbers to reach")
    for check in found:
        table.add_row(
            check["what"],
            f"{check['ratio']:.3f} ({check['interval'][0]:.3f} to {check['interval'][1]:.3f})",
            "" if check["limit"] is None else f"{check['limit']:g}",
            {True: "reached", False: "NOT reached", None: ""}[check["reached"]],
            style="yellow" if check["reached"] is False else "",
        )
    console.print(table)


def profile(bench: Bench, part: Part, k: float = 4.5) -> None:
    """Print a profile of this package's rows, and of the best static stock rows."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for workload in WORKLOADS:
        inputs = part.inputs[workload.name]
        null, levels = bench.solve(part, inputs)
        for row in bench.rows(part, inputs, null, levels):
            if row.wanted_k not in (k, int(k)) or row.name == "prototype":
                continue
            with row.context():
                bench.clock(part, inputs)
                with record(activities=[ProfilerActivity.CPU]) as recorded:
                    bench.clock(part, inputs)
            console.print(f"{part.name}, {workload.name}, {row.name}, mean k {row.mean_k:.2f}")
            table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=8)
            console.print(table, markup=False, highlight=False, soft_wrap=True)


def harness(repeats: int) -> dict[str, Any]:
    """Time whole runs of the stock command: ``hf`` against ``hf-bh`` at min_k = max_k = 8."""
    model = f"pretrained={tiny_olmoe()},dtype=float32"
    arguments = {"hf": model, "hf-bh": f"{model},min_k=8,max_k=8"}
    seconds: dict[str, list[float]] = {name: [] for name in arguments}
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(repeats), "harness", disable=None):
            for name, values in arguments.items():
                command = [sys.executable, "-m", "lm_eval", "--model", name]
                command += ["--model_args", values, "--tasks", "bh_demo", "--device", "cpu"]
                command += ["--output_path", folder]
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - start)
    ratio, interval = paired(seconds["hf-bh"], seconds["hf"])
    return {"seconds": seconds, "ratio": ratio, "interval": interval, "limit": 1.08}


def paired(ours: list[float], theirs: list[float]) -> tuple[float, list[float]]:
    """Return the median of the ratios of the same repeat, and its 95 % bootstrap interval."""
    ratios = np.array(ours) / np.array(theirs)
    drawn = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=-1), [2.5, 97.5])
    return float(np.median(ratios)), [float(low), float(high)]


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of every row; the median counts.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the stack.")] = 2,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.")] = None,
    shared: Annotated[
        bool,
        typer.Option(help="One thread, processor time: for a CPU that others use too."),
    ] = False,
    quick: Annotated[bool, typer.Option(help="Two repeats.")] = False,
    full_size: Annotated[
        bool, typer.Option(help="All 16 layers, bfloat16, random weights; 16 GB of free memory.")
    ] = False,
    harness_run: Annotated[
        bool, typer.Option("--harness", help="Time only whole lm_eval runs: hf against hf-bh.")
    ] = False,
    profiles: Annotated[
        bool, typer.Option("--profile", help="Print where the time of the MoE layer goes.")
    ] = False,
    only_hooks: Annotated[
        bool, typer.Option("--hooks", help="Measure only the hooks of all methods.")
    ] = False,
    with_compiled: Annotated[
        bool, typer.Option("--compiled", help="Two of the hooks also under torch.compile.")
    ] = False,
    small: Annotated[
        bool, typer.Option(help="Small matrices and two mean counts: says nothing of the speed.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file for the numbers; ratios and milliseconds also as CSV."),
    ] = None,
) -> None:
    """Measure router, MoE layer and whole model, side by side, in one run."""
    if shared and not device.startswith("cpu"):
        raise typer.BadParameter("--shared measures processor time, which needs --device cpu.")
    now = time.process_time if shared else time.perf_counter
    if threads or shared:
        torch.set_num_threads(1 if shared else threads or 1)
    place = torch.device(device)
    kind = torch.bfloat16 if full_size else getattr(torch, dtype)
    started, load = datetime.datetime.now(datetime.UTC), os.getloadavg()
    numbers: dict[str, Any] = {
        "started": started.isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "clock": "processor time" if shared else "wall",
        "dtype": str(kind).removeprefix("torch."),
        "load_before": load,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if harness_run:
        numbers["harness"] = harness(2 if quick else repeats)
        low, high = numbers["harness"]["interval"]
        ratio = numbers["harness"]["ratio"]
        console.print(f"hf-bh / hf, a whole harness run: {ratio:.3f} ({low:.3f} to {high:.3f})")
    else:
        if full_size and not small and free_bytes(place) < 16e9:
            raise typer.BadParameter(
                f"--full-size needs 16 GB of free memory on {device}, not "
                f"{free_bytes(place) / 1e9:.1f}; run it elsewhere, or use --layers 2."
            )
        with torch.inference_mode():
            bench = Bench(kind, place, 2 if quick else repeats, now, 2**20 if small else 2**27)
            measure(bench, layers, full_size, profiles, small, only_hooks, with_compiled)
        found = checks(bench)
        if bench.results:
            show(bench)
        if bench.hooks:
            show_hooks(bench)
        show_checks(found)
        gflops = bench.machine.matmul_rate / 1e9
        copy, read = bench.machine.copy_rate / 1e9, bench.machine.read_rate / 1e9
        console.print(
            f"{numbers['dtype']}, {numbers['threads']} threads, {numbers['clock']}; load before "
            f"{load[0]:.1f}, after {os.getloadavg()[0]:.1f}; matrix product {gflops:.0f} GFLOP/s, "
            f"copy {copy:.1f} GB/s, read {read:.1f} GB/s. "
            "Floor: max(FLOPs / matrix product, bytes / the faster of copy and read)."
        )
        numbers |= {
            "load_after": os.getloadavg(),
            "matmul_flops_per_second": bench.machine.matmul_rate,
            "copy_bytes_per_second": bench.machine.copy_rate,
            "read_bytes_per_second": bench.machine.read_rate,
            "checks": found,
            "results": [
                asdict(r) | {"median_seconds": r.median, "times_floor": r.median / r.floor}
                for r in bench.results
            ],
            "hooks": [asdict(r) | {"median_seconds": r.median} for r in bench.hooks],
        }
    if output:
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(numbers, indent=2) + "\n")
        console.print(f"Written to {output}")
        if "checks" in numbers:
            write_csvs(numbers, output)


def write_csvs(numbers: dict[str, Any], output: Path) -> None:
    """Write the ratios and the milliseconds of a run beside its JSON file."""
    ratios = [
        (check["what"], *(f"{r:.4f}" for r in (check["ratio"], *check["interval"])), check["limit"])
        for check in numbers["checks"]
    ]
    milliseconds = [
        (
            *(row["part"], row["workload"], row["row"], f"{row['wanted_k']:g}"),
            *(f"{1e3 * row['median_seconds']:.3g}", f"{row['times_floor']:.1f}"),
        )
        for row in numbers["results"]
    ]
    names = ["part", "workload", "row", "k", "milliseconds", "times_floor"]
    for suffix, header, rows in (
        ("", ["ratio_of", "ratio", "low", "high", "target"], ratios),
        ("_milliseconds", names, milliseconds),
    ):
        path = output.with_name(f"{output.stem}{suffix}.csv")
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])


def measure(
    bench: Bench,
    layers: int,
    full_size: bool,
    profiles: bool,
    small: bool,
    only_hooks: bool,
    with_compiled: bool,
) -> None:
    """Run every part."""
    dtype, device = bench.dtype, bench.device
    if small:
        bench.means = (8.0, 4.0)
    stack = true_size(16 if full_size and not small else layers, dtype, device, small)
    name = "OLMoE-1B-7B" if full_size else f"{layers}-layer stack"
    parts = parts_of(name, stack, only_model=full_size, layers=2 if small else LAYERS)
    if not full_size:
        bench.run_hooks(parts[0], parts[1], with_compiled)
    if only_hooks:
        return
    for part in parts:
        bench.run(part)
        if profiles and part.name == "MoE layer":
            profile(bench, part)
    if not (full_size or small):
        tiny = AutoModelForCausalLM.from_pretrained(tiny_olmoe(), dtype=dtype).to(device).eval()
        bench.run(parts_of("tiny-olmoe", tiny, only_model=True)[0])


if __name__ == "__main__":
    typer.run(main)
