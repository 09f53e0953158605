"""Writes the reference of commands from typer, and of files from schema.py, for the site."""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

ROOT = Path(__file__).resolve().parents[2]


def commands() -> str:
    """Return the page of all commands, their arguments and options."""
    from lm_eval_bh.cli.app import app

    command = typer.main.get_command(app)
    with typer.Context(command) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="lm-eval-bh", title="Commands")
        names = command.list_commands(context)
        helps = {name: command.get_command(context, name).help or "" for name in names}
    # Whole sentences, where typer cuts them at 45 characters.
    listed = [f"* [`{name}`](#lm-eval-bh-{name}): {first(helps[name])}" for name in names]
    begin, end = text.index("**Options**"), text.index("## ")
    text = text[:begin] + "\n".join(["**Commands**:", "", *listed, "", ""]) + text[end:]
    text = re.sub(r"^\* `--help`: .*\n", "", text, flags=re.M)
    text = text.replace("**Options**:\n\n\n", "")
    intro = (
        "Exit codes: 0; 1 for an error, which is one sentence; 2 for bad usage; 3 where files were "
        "left out, which are named; 130 for Ctrl-C, 143 for SIGTERM. `LMEVAL_LOG_LEVEL=DEBUG` in "
        "front of `lm_eval --model hf-bh` shows the traceback behind an error.\n\n"
    )
    return text.replace("**Usage**:", intro + "**Usage**:", 1).replace("%%", "%")


def first(help: str) -> str:
    """Return the first paragraph in one line."""
    return " ".join(help.partition("\n\n")[0].split())


def file_formats() -> str:
    """Return the page of files: every typed dictionary of schema.py with its comments."""
    source = ROOT / "lm_eval_bh" / "schema.py"
    module = ast.parse(source.read_text(encoding="utf-8"))
    comments = comments_by_line(source)
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    parts = ["# Files", ""]
    summary, _, files = (ast.get_docstring(module) or "").partition("Files\n-----\n")
    parts += [summary.split("\n\n")[0], ""]
    parts += [f"- {item}" for item in definitions(files)]
    for name, node in classes.items():
        if name.startswith("_"):  # its fields appear in classes that inherit it
            continue
        parts += ["", f"## {name}", "", readable(ast.get_docstring(node) or ""), ""]
        parts += ["| field | type | what |", "|---|---|---|"]
        for owner in (node, *ancestors(node, classes)):
            for field in owner.body:
                if isinstance(field, ast.AnnAssign):
                    kind = html.escape(ast.unparse(field.annotation)).replace("|", "\\|")
                    maybe = " May be missing." if optional(owner) else ""
                    told = re.sub(r"([\[|])", r"\\\1", comments.get(field.lineno, ""))
                    told = told[:1].upper() + told[1:]
                    told = f"{told.rstrip('.')}." if told else ""
                    parts.append(
                        f"| `{ast.unparse(field.target)}` | <code>{kind}</code> | {told}{maybe} |"
                    )
    parts += ["", "## Token log", "", "Columns of `tokens/part-*.parquet`, in their order:", ""]
    parts += ["| column | type | what |", "|---|---|---|"]
    from lm_eval_bh.schema import token_schema

    lines = source.read_text(encoding="utf-8").splitlines()
    for column in token_schema(True, 64):
        line = next(n for n, text in enumerate(lines, 1) if f'pa.field("{column.name}"' in text)
        kind = html.escape(str(column.type))
        parts.append(f"| `{column.name}` | <code>{kind}</code> | {comments.get(line, '')} |")
    parts.append("\n`logits` is there with `log_logits=true`, here for 64 experts.")
    return "\n".join(parts) + "\n"


def comments_by_line(source: Path) -> dict[int, str]:
    """Return the comment of each line of code: at its end, continued below, or above."""
    found: dict[int, str] = {}
    above, owner = "", None
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        code, _, comment = line.partition("# ")
        if code.strip():
            found[number] = f"{above} {comment}".strip()
            above, owner = "", number if comment else None
        elif owner and comment:
            found[owner] += f" {comment}"
        else:
            above, owner = f"{above} {comment}" if comment else "", None
    return found


def definitions(text: str) -> list[str]:
    """Return a list of ReST definitions as lines of Markdown."""
    items = re.findall(r"^``(.+?)``\n((?: +.*\n?)+)", text, re.M)
    return [f"`{name}`: {readable(' '.join(body.split()))}" for name, body in items]


def readable(text: str) -> str:
    """Return a docstring in Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"``(.+?)``", r"`\1`", text)


def ancestors(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> list[ast.ClassDef]:
    """Return the classes from which it inherits fields, the nearest first."""
    bases = [classes[base.id] for base in node.bases if getattr(base, "id", "") in classes]
    return [found for base in bases for found in (base, *ancestors(base, classes))]


def optional(node: ast.ClassDef) -> bool:
    """Whether its fields may be missing."""
    return any(word.arg == "total" for word in node.keywords)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Take the roles of ReST out of docstrings."""
    return re.sub(r":\w+:<code>~?(?:[\w.]*\.)?(\w+)</code>", r"<code>\1</code>", content)


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and those outside of the site's folder."""
    example = (ROOT / "examples" / "olmoe_1b_7b.md").read_text(encoding="utf-8")
    training = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    pages = {
        "reference/cli.md": commands(),
        "reference/files.md": file_formats(),
        "examples/olmoe_1b_7b.md": example.replace("](../docs/", "](../"),
        "examples/README.md": training.replace("](../docs/", "](../"),
    }
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files
