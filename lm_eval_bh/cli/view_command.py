"""``lm-eval-bh view``: a page on which the routing of a text, or of a run, can be seen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lm_eval_bh.cli.interrupts import NOTHING_HALF_WRITTEN, on_interrupt
from lm_eval_bh.cli.printing import say_written
from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.files import check_output
from lm_eval_bh.resources import DEFAULT_MODEL

if TYPE_CHECKING:
    from lm_eval_bh.analysis.show.view_page import ViewRun, ViewText

STDIN = Path("-")
# Of a model's arguments, those that say which one it is, and not how it routes.
OF_MODEL = ("pretrained", "revision", "dtype", "device", "trust_remote_code", "tokenizer")


def view(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="One or two finished runs of log_routing=full, instead of a model."),
    ] = None,
    model_args: Annotated[
        str | None,
        typer.Option(help="As lm_eval takes them: pretrained=tiny-olmoe,alpha=0.4,max_k=8."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Another configuration, shown beside it: rule=topk,max_k=4."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text file, one document per paragraph, or -; default: a demo article."),
    ] = None,
    string: Annotated[str | None, typer.Option(help="The text itself, instead of a file.")] = None,
    task: Annotated[str | None, typer.Option(help="Of the runs; default: the first.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json of the runs' model, if it is not found.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The .html file to write.")] = Path("view.html"),
    documents: Annotated[int, typer.Option(min=1, help="How many documents, the first ones.")] = 3,
    tokens: Annotated[int, typer.Option(min=2, help="Most tokens of each.")] = 256,
) -> None:
    """Show which experts serve each token of a text, layer by layer, on one HTML page.

    The page loads nothing and can be mailed. --against needs only what differs from --model-args.
    """
    with on_interrupt(NOTHING_HALF_WRITTEN):
        if bool(runs) == bool(model_args):
            raise ParameterError(
                "What to show is a model or runs: give either --model-args or one or two folders."
            )
        check_output(output, "--output")
        if runs:
            _refuse_with_runs({"--against": against, "--text": text, "--string": string})
            from lm_eval_bh.analysis.show.logged_texts import read_logged

            found = read_logged(runs, task, documents, tokens, tokenizer, _find_tokenizer)
        else:
            for option, value in {"--task": task, "--tokenizer": tokenizer}.items():
                if value is not None:
                    raise ParameterError(f"{option} is of runs: leave it out with --model-args.")
            configurations = [str(model_args)]
            if against is not None:
                configurations.append(_beside(str(model_args), against))
            found = _routed(configurations, _paragraphs(text, string)[:documents], tokens)
        from lm_eval_bh.analysis.show.view_page import write_view

        say_written([write_view(output, f"Routing of {found[1][0]['model']}", *found)])


def _refuse_with_runs(given: dict[str, object]) -> None:
    for option, value in given.items():
        if value is not None:
            raise ParameterError(f"{option} needs --model-args: runs have texts of their own.")


def _find_tokenizer(results: Path) -> Path | None:
    from lm_eval_bh.cli.patterns_command import find_tokenizer

    return find_tokenizer(results)


def _paragraphs(text: Path | None, string: str | None) -> list[str]:
    if text is not None and string is not None:
        raise ParameterError("The text is given twice: give either --text or --string.")
    if string is not None:
        if not string.strip():
            raise DataError("--string holds no text: give one that is not empty.")
        return [string]
    if text is None:
        from lm_eval_bh.harness.demo_texts import load_demo

        return [page.strip() for page in load_demo("wikitext")["test"]["page"]]
    from lm_eval_bh.policies.paragraphs import read_paragraphs, split_paragraphs

    if text == STDIN:
        try:
            found = split_paragraphs(sys.stdin.read())
        except ValueError as error:
            raise DataError(f"- could not be read ({error}): give a UTF-8 text.") from error
    else:
        found = read_paragraphs(text)
    found = [part.strip() for part in found]
    if not found:
        raise DataError(f"{text} holds no text: give one that is not empty.")
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
                "The two models have different tokens, so nothing can stand side by side: "
                "leave pretrained out of --against."
            )
        texts = found
        given = arguments_of({"config": {"model_args": arguments}})
        runs.append(routed(model.integration, texts, str(given.get("pretrained", DEFAULT_MODEL))))
        del model
    return texts, runs
