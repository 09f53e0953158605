"""``lm-eval-bh sweep``: reads the settings, shows the plan, runs what is missing."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lm_eval_bh.cli.word_lists import numbers, words

SHOWN = 12  # experiments that a plan lists; --dry-run lists all


def sweep(
    output_dir: Annotated[Path, typer.Option(help="Folder of the sweep; run again to resume.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="quick (3 experiments on tiny-olmoe) or full (4 baselines + 16 BH, x 3)."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the same keys; flags override it.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Model: hub name, folder, tiny-olmoe.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks and tags: bh_suite,bh_demo.")] = None,
    baselines: Annotated[str | None, typer.Option(help="Static top-k baselines: 8,16.")] = None,
    alphas: Annotated[str | None, typer.Option(help="Levels: 0.3,0.4.")] = None,
    max_k: Annotated[str | None, typer.Option(help="Most experts of a token: 8,16.")] = None,
    rules: Annotated[str | None, typer.Option(help="Selection rules: bh,by.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="A number, or auto.")] = None,
    seed: Annotated[int | None, typer.Option(help="All seeds of lm-eval.")] = None,
    log_routing: Annotated[str | None, typer.Option(help="off, summary, samples or full.")] = None,
    log_samples: Annotated[
        int | None, typer.Option(help="Documents of each task whose routing is kept as JSON.")
    ] = None,
    model_args: Annotated[
        str | None, typer.Option(help="Further arguments of hf-bh: dtype=float32,kde=FILE.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
    repeat: Annotated[
        int, typer.Option(help="Runs of everything; two measure the stability metrics.")
    ] = 1,
    shard: Annotated[
        str | None, typer.Option(help="i/n: only every n-th experiment, for a job array.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster, or local.", metavar="ADDRESS|local"),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Workers on Ray; default: one a GPU.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")] = False,
) -> None:
    """Run a grid of routing configurations on tasks, with one loaded model; resume by repeating."""
    from lm_eval_bh.harness.sweep.runner import first_process, plan, run
    from lm_eval_bh.harness.sweep.sweep_config import SweepConfig

    settings = SweepConfig.gather(
        preset,
        config,
        {
            "pretrained": pretrained,
            "tasks": None if tasks is None else words(tasks),
            "baselines": None if baselines is None else numbers("baselines", baselines, int),
            "alphas": None if alphas is None else numbers("alphas", alphas, float),
            "max_k": None if max_k is None else numbers("max-k", max_k, int),
            "rules": None if rules is None else words(rules),
            "limit": limit,
            "batch_size": int(batch_size) if batch_size and batch_size.isdecimal() else batch_size,
            "seed": seed,
            "log_routing": log_routing,
            "log_samples": log_samples,
            "model_args": _arguments(model_args),
        },
    )
    todo = plan(settings, output_dir, repeat=repeat, shard=shard)
    console = Console(quiet=not first_process())
    _show(console, todo, every=dry_run)
    if dry_run:
        return
    run(todo, device=device, ray=ray, workers=workers)
    elsewhere = len(todo.folder.missing(todo.experiments))
    done = f"{len(todo.experiments) - elsewhere} of {len(todo.experiments)} experiments are done"
    if elsewhere:
        done += f", {elsewhere} are under way in another process"
    console.print(
        f"{done}. Next: lm-eval-bh aggregate {output_dir}", highlight=False, soft_wrap=True
    )


def _show(console: Console, todo: Any, every: bool) -> None:
    """Print which experiments there are, which are done, and how long the rest may take."""
    documents = todo.config.limit or "all"
    table = Table(
        "experiment",
        "task",
        "documents",
        "state",
        title=f"Sweep of {todo.config.pretrained} in {todo.folder.path}",
    )
    missing = set(todo.missing)
    listed = todo.experiments if every else todo.experiments[:SHOWN]
    for experiment in listed:
        state = "to run" if experiment in missing else "done"
        table.add_row(experiment.name, experiment.task, str(documents), state)
    console.print(table)
    if len(listed) < len(todo.experiments):
        console.print(f"... and {len(todo.experiments) - len(listed)} more (--dry-run lists them).")
    left = todo.seconds_left
    console.print(
        f"{len(todo.experiments)} experiments, {len(todo.missing)} to run; "
        + (
            "how long they take, the first will tell."
            if left is None
            else f"about {timedelta(seconds=round(left))} by those that are done."
        ),
        highlight=False,
    )


def _arguments(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    from lm_eval.utils import simple_parse_args_string

    return dict(simple_parse_args_string(text))
