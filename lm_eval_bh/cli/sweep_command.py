"""``lm-eval-bh sweep``: reads the settings, shows the plan, runs what is missing."""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lm_eval_bh.cli.interrupts import EXPERIMENTS_KEPT, on_interrupt
from lm_eval_bh.cli.options import (
    LARGEST_SEED,
    Device,
    Dtype,
    LogLevel,
    ModelArgs,
    OptionalModel,
    SweepPreset,
    joined_arguments,
)
from lm_eval_bh.cli.printing import say, show
from lm_eval_bh.cli.word_lists import numbers, words_or_none
from lm_eval_bh.files import check_output

if TYPE_CHECKING:
    from lm_eval_bh.harness.sweep.runner import Plan
    from lm_eval_bh.harness.sweep.sweep_config import SweepConfig
    from lm_eval_bh.speed.of_sweep import SweepSpeed

SHOWN = 12  # experiments that a plan lists; --dry-run lists all
MOST_REPEATS = 1000


def sweep(
    output_dir: Annotated[Path, typer.Option(help="Folder of the sweep; run again to resume.")],
    preset: Annotated[
        SweepPreset | None,
        typer.Option(
            help="quick: 6 configurations of tiny-olmoe; seeds: 4 baselines and 16 of BH, on 3 "
            "tasks; full: seeds, and static top-2 to top-7."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the same keys; flags override it.")
    ] = None,
    pretrained: OptionalModel = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks and tags: bh_suite,bh_demo.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of further tasks, as lm_eval --include_path.")
    ] = None,
    baselines: Annotated[
        list[str] | None, typer.Option(help="Static top-k baselines: 8,16.")
    ] = None,
    alphas: Annotated[list[str] | None, typer.Option(help="Levels: 0.3,0.4.")] = None,
    max_k: Annotated[
        list[str] | None, typer.Option(help="Largest numbers of experts: 8,16.")
    ] = None,
    rules: Annotated[list[str] | None, typer.Option(help="Selection rules: bh,by.")] = None,
    policies: Annotated[
        list[str] | None, typer.Option(help="Policy files, or tiny-olmoe, which ships.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Number of documents per task.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="An integer, or auto.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=LARGEST_SEED, help="Value of all seeds of lm-eval.")
    ] = None,
    log_routing: Annotated[
        LogLevel | None, typer.Option(help="How much of the routing to keep; default: summary.")
    ] = None,
    log_samples: Annotated[
        int | None, typer.Option(help="Number of documents per task whose routing is kept as JSON.")
    ] = None,
    model_args: ModelArgs = None,
    dtype: Dtype = "auto",
    device: Device = None,
    repeat: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_REPEATS,
            help="Times to run everything; tables need two to measure stability.",
        ),
    ] = 1,
    shard: Annotated[
        str | None,
        typer.Option(help="i/n: run only every n-th experiment, as one job of an array."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Run on the Ray cluster at this address.", metavar="ADDRESS|local"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Workers on Ray; default: one per GPU.")
    ] = None,
    speed: Annotated[
        bool | None,
        typer.Option(
            "--speed/--no-speed",
            help="Measure the speed of all configurations at the end; default: with a preset.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")] = False,
) -> None:
    """Run a grid of routing configurations on tasks, with one loaded model.

    The same command run again resumes the sweep.
    """
    with on_interrupt(EXPERIMENTS_KEPT):
        from lm_eval_bh.harness.sweep.local import end_processes
        from lm_eval_bh.harness.sweep.runner import first_process, plan, run
        from lm_eval_bh.harness.sweep.sweep_config import SweepConfig
        from lm_eval_bh.routing.placement import placement

        settings = SweepConfig.gather(
            preset,
            config,
            {
                "pretrained": pretrained,
                "tasks": words_or_none(tasks),
                "baselines": numbers("baselines", baselines, int) if baselines else None,
                "alphas": numbers("alphas", alphas, float) if alphas else None,
                "max_k": numbers("max-k", max_k, int) if max_k else None,
                "rules": words_or_none(rules),
                "policies": words_or_none(policies),
                "limit": limit,
                "batch_size": _number_or_word(batch_size),
                "seed": seed,
                "log_routing": log_routing,
                "log_samples": log_samples,
                "model_args": _arguments(model_args),
                "include_path": None if include_path is None else str(include_path),
            },
        )
        if joined_arguments(model_args, dtype=dtype) != (model_args or ""):
            routed = {**settings.model_args, "dtype": dtype}
            settings = dataclasses.replace(settings, model_args=routed)
        check_output(output_dir, "--output-dir", folder=True)
        if ray is None:  # a cluster has devices of its own
            placement(device)
        todo = plan(settings, output_dir, repeat=repeat, shard=shard)
        phase = _speed_phase(settings, output_dir, speed, preset, config)
        alone = ray is None and shard is None and int(os.environ.get("WORLD_SIZE", "1")) == 1
        if first_process():
            _show_plan(todo, every=dry_run)
        if dry_run:
            return
        to_measure = phase is not None and alone and not phase.done
        then = phase.run if phase is not None and to_measure else None
        run(todo, device=device, ray=ray, workers=workers, then=then)
        if first_process():
            if phase is not None:
                say(
                    f"Speeds are in {phase.file}."
                    if alone
                    else "The sweep measures speed only in one process with all experiments: "
                    "run the same command without --shard or --ray for it."
                )
            _say_done(todo, output_dir)
        end_processes()


def _speed_phase(
    settings: SweepConfig,
    output_dir: Path,
    wanted: bool | None,
    preset: str | None,
    config: Path | None,
) -> SweepSpeed | None:
    """Return the speed phase if --speed or a preset asks for one, and --no-speed does not."""
    if wanted is False:
        return None
    from lm_eval_bh.harness.sweep.settings_file import read_settings
    from lm_eval_bh.speed.of_sweep import OF_PRESET, SweepSpeed
    from lm_eval_bh.speed.phase import SpeedSettings

    preset = preset or (None if config is None else read_settings(config).get("preset"))
    amount = OF_PRESET.get(preset or "", SpeedSettings() if wanted else None)
    return None if amount is None else SweepSpeed(settings, output_dir, amount)


def _show_plan(todo: Plan, every: bool) -> None:
    """Print which experiments there are, which are done, and how long the rest may take."""
    from rich.table import Table

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
    show(table)
    if len(listed) < len(todo.experiments):
        say(f"... and {len(todo.experiments) - len(listed)} more (--dry-run lists them).")
    left = todo.seconds_left
    say(
        f"{len(todo.experiments)} experiments, {len(todo.missing)} to run; "
        + (
            "the first will show how long they take."
            if left is None
            else f"about {timedelta(seconds=round(left))} to go, judging by those that are done."
        )
    )


def _say_done(todo: Plan, output_dir: Path) -> None:
    elsewhere = len(todo.folder.missing(todo.experiments))
    done = f"{len(todo.experiments) - elsewhere} of {len(todo.experiments)} experiments are done"
    if elsewhere:
        done += f", another process is running {elsewhere}"
    say(f"{done}. Next: lm-eval-bh aggregate {output_dir}")


def _number_or_word(text: str | None) -> int | str | None:
    return int(text) if text and text.isdecimal() else text


def _arguments(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    from lm_eval.utils import simple_parse_args_string

    return dict(simple_parse_args_string(text))
