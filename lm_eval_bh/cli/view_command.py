"""``lm-eval-bh view``: a page on which the routing of a text, or of a run, can be seen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.model_files import find_tokenizer
from lm_eval_bh.cli.options import Device, Dtype, ModelArgs, OptionalModel, joined_arguments
from lm_eval_bh.cli.printing import say_written, warn
from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.files import check_output
from lm_eval_bh.resources import DEFAULT_MODEL

if TYPE_CHECKING:
    from lm_eval_bh.analysis.show.view_page import ViewRun, ViewText

STDIN = Path("-")
# Arguments that say which model it is, and not how it routes.
OF_MODEL = ("pretrained", "revision", "dtype", "device", "trust_remote_code", "tokenizer")


def view(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="One or two finished runs of log_routing=full, instead of a model."),
    ] = None,
    model: OptionalModel = None,
    model_args: ModelArgs = None,
    against: Annotated[
        str | None,
        typer.Option(help="Another configuration to show beside it: rule=topk,max_k=4."),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", "--string", help="The text itself.")] = None,
    text_file: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text, documents separated by empty lines; - reads stdin; default: demo "
            "articles."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of the runs; default: the first.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json of the runs' model, if view finds none.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The .html file to write.")] = Path("view.html"),
    limit: Annotated[
        int,
        typer.Option("--limit", "--documents", min=1, help="Documents to show, the first ones."),
    ] = 3,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "--tokens", min=2, help="Show at most this many per document."
        ),
    ] = 256,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Show which experts serve each token of a text, layer by layer, on one HTML page.

    The page needs no other file, so it can be mailed. --against keeps the model of the first
    configuration.
    """
    with on_interrupt(NOTHING_HALF_WRITTEN):
        arguments = joined_arguments(model_args, pretrained=model, dtype=dtype, device=device)
        if bool(runs) == bool(model or model_args):
            raise ParameterError(
                "view shows a model or finished runs: "
                "give either --model or --model-args, or one or two folders."
            )
        if text is not None and text_file is None and _names_file(text):
            text_file, text = Path(text), None
        check_output(output, "--output")
        if runs:
            _refuse_with_runs({"--against": against, "--text": text, "--text-file": text_file})
            from lm_eval_bh.analysis.show.logged_texts import read_logged

            found = read_logged(runs, task, limit, max_tokens, tokenizer, find_tokenizer)
        else:
            for option, value in {"--task": task, "--tokenizer": tokenizer}.items():
                if value is not None:
                    raise ParameterError(
                        f"{option} needs finished runs: leave it out with a model."
                    )
            configurations = [arguments]
            if against is not None:
                configurations.append(_beside(arguments, against))
            found = _routed(configurations, _paragraphs(text, text_file)[:limit], max_tokens)
        from lm_eval_bh.analysis.show.view_page import write_view

        say_written([write_view(output, f"Routing of {found[1][0]['model']}", *found)])


def _refuse_with_runs(given: dict[str, object]) -> None:
    for option, value in given.items():
        if value is not None:
            raise ParameterError(
                f"{option} needs a model, by --model: runs have texts of their own."
            )


def _names_file(text: str) -> bool:
    """Whether --text names a file, as it did up to release 0.2; a line says what to use now."""
    try:
        named = text == str(STDIN) or Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null character
        return False
    if named:
        warn("note: --text takes the text itself now: use --text-file for a file.")
    return named


def _paragraphs(text: str | None, text_file: Path | None) -> list[str]:
    if text is not None and text_file is not None:
        raise ParameterError("The text is given twice: give either --text or --text-file.")
    if text is not None:
        if not text.strip():
            raise DataError("--text holds no text: give one that is not empty.")
        return [text]
    if text_file is None:
        from lm_eval_bh.harness.demo_texts import load_demo

        return [page.strip() for page in load_demo("wikitext")["test"]["page"]]
    from lm_eval_bh.policies.paragraphs import read_paragraphs, split_paragraphs

    if text_file == STDIN:
        try:
            found = split_paragraphs(sys.stdin.read())
        except ValueError as error:
            raise DataError(f"- could not be read ({error}): give a UTF-8 text.") from error
    else:
        found = read_paragraphs(text_file)
    found = [part.strip() for part in found]
    if not found:
        raise DataError(f"{text_file} holds no text: give one that is not empty.")
    return found


def _beside(model_args: str, against: str) -> str:
    """Return the arguments of the second configuration: its own, and where the model is from."""
    given = {part.partition("=")[0].strip() for part in against.split(",")}
    kept = [
        part
        for part in model_args.split(",")
        if (name := part.partition("=")[0].strip()) in OF_MODEL and name not in given
    ]
    return ",".join([*kept, against])


def _routed(
    configurations: list[str], paragraphs: list[str], most: int
) -> tuple[list[ViewText], list[ViewRun]]:
    """Run each configuration over the texts."""
    from lm_eval_bh.analysis.read.model_arguments import arguments_of
    from lm_eval_bh.harness.model import BHLM
    from lm_eval_bh.viewing.text_view import routed, tokenized

    texts: list[ViewText] = []
    runs: list[ViewRun] = []
    for arguments in configurations:
        model = BHLM.create_from_arg_string(arguments)
        ids = [
            model.tok_encode(paragraph)[: min(most, model.max_length)] for paragraph in paragraphs
        ]
        found = tokenized(model.tokenizer, ids)
        if texts and texts != found:
            raise ParameterError(
                "The two models have different tokens, so view cannot show them side by side: "
                "leave pretrained out of --against."
            )
        texts = found
        given = arguments_of({"config": {"model_args": arguments}})
        runs.append(routed(model.integration, texts, str(given.get("pretrained", DEFAULT_MODEL))))
        del model
    return texts, runs
