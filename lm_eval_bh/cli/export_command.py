"""``lm-eval-bh policy export``: takes a policy to an engine that does not know this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.options import ModelOfPolicy, Overwrite, TargetName
from lm_eval_bh.cli.printing import say
from lm_eval_bh.errors import ParameterError
from lm_eval_bh.files import check_output
from lm_eval_bh.resources import model_path


def export(
    policy: Annotated[Path, typer.Argument(help="A policy file.")],
    to: Annotated[TargetName, typer.Option(help="Engine that will run the policy.")],
    model: ModelOfPolicy = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "--output", help="Folder to write.")
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Link to the weights instead of copying them.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a model folder that routes by a policy, or print llama.cpp's options for it."""
    from lm_eval_bh.export.checkpoint import Checkpoint
    from lm_eval_bh.export.llama_cpp import llama_cpp_options
    from lm_eval_bh.export.model_folder import check_apart, check_folder, export_folder
    from lm_eval_bh.routing.policy import Policy

    loaded = Policy.load(policy)
    name = model or loaded.model
    if name is None:
        raise ParameterError("The policy does not say what model it is for: give --model.")
    revision = loaded.revision if model is None else None
    if to == "llama.cpp":
        if output_dir is not None:
            raise ParameterError("--to llama.cpp writes nothing: leave --output-dir out.")
        checkpoint = Checkpoint.find(model_path(name), revision)
        checkpoint.check(loaded, name)
        for line in llama_cpp_options(loaded, checkpoint):
            say(line)
        return
    if output_dir is None:
        raise ParameterError(f"--to {to} needs --output-dir: name a folder to write.")
    with on_interrupt(NOTHING_HALF_WRITTEN):
        check_folder(output_dir, overwrite)
        check_output(output_dir, "--output-dir", folder=True)
        checkpoint = Checkpoint.find(model_path(name), revision)
        check_apart(output_dir, checkpoint, policy)
        export_folder(
            loaded,
            checkpoint,
            output_dir,
            name=name,
            link=link,
            untie=to == "vllm",
            force=overwrite,
        )
    say(f"Written to {output_dir}")
    if to == "vllm":
        say(f"vllm serve {output_dir} --model-impl transformers --trust-remote-code")
    else:
        say(f'AutoModelForCausalLM.from_pretrained("{output_dir}", trust_remote_code=True)')
