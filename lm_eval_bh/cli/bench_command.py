"""``lm-eval-bh bench``: how fast configurations are, beside the unchanged model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.options import Device, Dtype, Model, Seed, joined_arguments
from lm_eval_bh.cli.printing import say, say_written, show
from lm_eval_bh.cli.word_lists import words
from lm_eval_bh.files import check_output

if TYPE_CHECKING:
    from lm_eval_bh.schema import SpeedFile


def bench(
    configurations: Annotated[
        list[str],
        typer.Argument(help="Arguments of hf-bh such as alpha=0.4,max_k=8, or files of policies."),
    ],
    pretrained: Model,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks that the text comes from, joined by commas; default: bh_demo."),
    ] = None,
    model_args: Annotated[
        str, typer.Option(help="Arguments of hf-bh that all configurations share.")
    ] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a prefill.")] = 8,
    batches: Annotated[int, typer.Option(min=1, help="Batches of a prefill.")] = 4,
    limit: Annotated[
        int,
        typer.Option(
            "--limit", "--documents", min=1, help="Number of documents to draw batches from."
        ),
    ] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt before decoding.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    rounds: Annotated[
        int, typer.Option(help="Times to measure each, 7 or more; tables show the median.")
    ] = 9,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for bh_speed.json, which aggregate joins.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="hf, or vllm: its own model, at batch 1, 8 and 32.")
    ] = "hf",
) -> None:
    """Measure the speed of configurations in shuffled rounds, in one process, on the same text.

    bench compares each with the unchanged model in the same round; an interval that contains 1
    shows no difference.
    """
    with on_interrupt(NOTHING_HALF_WRITTEN):
        if engine != "hf":
            from lm_eval_bh.cli.bench_engine import bench_vllm

            bench_vllm(
                engine,
                configurations,
                pretrained,
                model_args,
                prompt=prompt,
                steps=steps,
                rounds=rounds,
                seed=seed,
                output_dir=output_dir,
            )
            return
        from lm_eval.utils import simple_parse_args_string

        from lm_eval_bh.errors import ParameterError
        from lm_eval_bh.harness.preflight import check_run
        from lm_eval_bh.harness.sweep.task_names import are_ours, expand_tasks, new_task_manager
        from lm_eval_bh.routing.parameters import canonical
        from lm_eval_bh.routing.placement import placement
        from lm_eval_bh.speed.contestants import (
            OF_A_CONFIGURATION,
            arguments_of_one,
            check_configurations,
        )
        from lm_eval_bh.speed.phase import SpeedSettings, measure, speed_file, write

        settings = SpeedSettings(rounds, batches, limit, prompt, steps, seed)
        given = [arguments_of_one(text) for text in configurations]
        routings = check_configurations(given)
        arguments = joined_arguments(model_args, dtype=dtype)
        common = canonical(dict(simple_parse_args_string(arguments)))
        if own := sorted(common.keys() & OF_A_CONFIGURATION):
            raise ParameterError(
                f"--model-args sets {own[0]}, which belongs to a configuration: give it there."
            )
        check_run(pretrained, common, routings)
        placement(device)
        if output_dir is not None:
            check_output(output_dir, "--output-dir", folder=True)
        names = expand_tasks(words(tasks or ["bh_demo"]))
        if not names:
            raise ParameterError(
                "bench needs a task that the text comes from: give --tasks bh_demo."
            )

        from lm_eval_bh.harness.model import BHLM
        from lm_eval_bh.threads import use_threads_that_pay

        # Its own routing is taken out: the least that every model can do.
        plain: dict[str, Any] = {"rule": "topk", "max_k": 1, "log_routing": "off"}
        lm = BHLM.create_from_arg_obj(
            {"pretrained": pretrained, **common, **plain}, {"device": device}
        )
        use_threads_that_pay(lm.model)
        loaded = new_task_manager(defaults=not are_ours(names)).load(names)["tasks"]
        found = measure(lm, pretrained, loaded, given, batch_size=batch_size, settings=settings)
        print_speeds([found])
        if output_dir is not None:
            say_written([write(found, speed_file(output_dir))])


def print_speeds(files: list[SpeedFile]) -> None:
    """Print a table for each task and workload, and under what conditions it was measured."""
    from rich import box
    from rich.table import Table

    from lm_eval_bh.analysis.table.missing import holds, is_missing, text_of
    from lm_eval_bh.analysis.table.speed_phase import conditions, speed_frame

    for (task, workload), rows in speed_frame(files).groupby(["task", "workload"], sort=False):
        table = Table(title=f"{task}, {workload}", box=box.SIMPLE_HEAD, pad_edge=False)
        table.title_justify = "left"
        table.padding = (0, 1, 0, 0)  # it has to fit into 80 columns
        table.add_column("configuration")  # the one that may be broken
        table.add_column("tokens\n/s", justify="right", no_wrap=True)
        table.add_column("ms per\npass", justify="right", no_wrap=True)
        table.add_column("times as fast", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("dis-\ntinct", justify="right", no_wrap=True)
        table.add_column("rows per\ntoken", justify="right", no_wrap=True)
        table.add_column("times\nfloor", justify="right", no_wrap=True)
        for _, row in rows.iterrows():
            ends = (
                f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
                if not is_missing(row["ratio_low"])
                else ""
            )
            known, floor = row["expert_rows_per_token"], row["times_floor"]
            distinct = row["distinct_experts"]
            table.add_row(
                row["strategy"],
                f"{row['tokens_per_second']:,.0f}",
                f"{row['ms_per_pass']:.3g}",
                f"{row['ratio']:.2f}{ends}",
                text_of(row["verdict"]),
                "" if is_missing(distinct) else f"{distinct:.1f}",
                ""
                if is_missing(known)
                else f"{known:.2f}{'' if holds(row['rows_counted']) else '*'}",
                "" if is_missing(floor) else f"{floor:.1f}",
            )
        table.caption = (
            "Distinct: the different experts that a layer reads in a pass. Rows: one expert "
            "applied to one token. *: experts as selected, because transformers' own code computed "
            "the rows and counts none"
        )
        table.caption_justify = "left"
        show(table)
    for file in files:
        say(conditions(file))
