"""``lm-eval-bh policy verify``: compares a policy in an engine with the same policy in hf-bh."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.options import EngineName, ModelOfPolicy
from lm_eval_bh.cli.printing import show
from lm_eval_bh.errors import ModelError, ParameterError
from lm_eval_bh.resources import model_path


def verify(
    policy: Annotated[Path, typer.Argument(help="A policy file.")],
    engine: Annotated[
        EngineName,
        typer.Option(
            help="hf: transformers; vllm: its transformers backend; vllm-plugin: its own model."
        ),
    ],
    limit: Annotated[
        int,
        typer.Option("--limit", "--documents", min=1, help="Number of demo documents to score."),
    ] = 50,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "--length", min=2, help="Score at most this many per document."
        ),
    ] = 511,
    model: ModelOfPolicy = None,
    python: Annotated[
        str | None, typer.Option(help="Python of the engine's environment; default: this one.")
    ] = None,
    timeout: Annotated[
        int, typer.Option(min=1, help="Stop an engine that takes more seconds than this.")
    ] = 3600,
) -> None:
    """Score documents in an engine and in hf-bh, in float32, and print how far they differ."""
    from rich.table import Table
    from transformers import AutoTokenizer

    from lm_eval_bh.export.checkpoint import Checkpoint
    from lm_eval_bh.export.verification import verify as compare
    from lm_eval_bh.harness.demo_texts import demo_documents
    from lm_eval_bh.routing.policy import Policy

    loaded = Policy.load(policy)
    name = model or loaded.model
    if name is None:
        raise ParameterError("The policy does not say what model it is for: give --model.")
    with on_interrupt(NOTHING_HALF_WRITTEN):
        checkpoint = Checkpoint.find(model_path(name), loaded.revision if model is None else None)
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
            raise ModelError(
                f"The tokenizer of {name!r} could not be loaded ({reason}): give a model with one."
            ) from error
        longest = (checkpoint.config.get("max_position_embeddings") or max_tokens + 1) - 1
        texts = [tokenizer(text).input_ids for text in demo_documents(limit)]
        found = compare(
            loaded,
            checkpoint,
            [ids[: min(max_tokens, longest)] for ids in texts if len(ids) > 1],
            engine=engine,
            name=name,
            python=python or sys.executable,
            policy_file=policy,
            timeout=timeout,
        )
    table = Table(show_header=False, title=f"{policy.name} in {found.engine}, float32")
    counts = "unknown: the engine reports none"
    if found.other_counts is not None:
        counts = "all equal" if not found.other_counts else f"{found.other_counts} differ"
    for row in (
        ("documents, tokens scored", f"{found.documents}, {found.tokens:,}"),
        ("tokens without a finite score", f"{found.unscored:,}"),
        ("largest difference of a log-probability", f"{found.largest:.2e}"),
        ("experts of each token in each layer", counts),
        ("mean experts in hf-bh", f"{found.mean_experts:.3f}"),
        ("greedy continuation", "the same" if found.same_text else "different"),
        ("tokens/s with the policy", f"{found.speed:,.0f}"),
        (f"tokens/s with the stock top-{loaded.native_top_k}", f"{found.stock_speed:,.0f}"),
    ):
        table.add_row(*row)
    show(table)
    if found.differences:
        raise ModelError(
            f"{found.engine} differs from hf-bh ({'; '.join(found.differences)}): "
            "do not serve this policy there."
        )
