"""The code blocks of a Markdown page, and whether they are to be run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

RUN = {"bash", "python"}
SHOWN = {"text", "csv", "json", "yaml"}  # output, and files
NOT_RUN = 'title="Not run here: '


@dataclass(frozen=True)
class Block:
    """A fenced block: language, text and first line, and a reason if it is not run."""

    language: str
    code: str
    line: int
    excuse: str | None


def blocks_of(page: Path) -> list[Block]:
    """Return all blocks of a page; a language that is neither run nor shown is an error."""
    found = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        assert token.type != "code_block", (
            f"{page}:{token.map[0] + 1}: an indented block says of no language whether it runs"
        )
        if token.type != "fence":
            continue
        language, _, rest = token.info.partition(" ")
        place = f"{page}:{token.map[0] + 1}"
        assert language in RUN | SHOWN, f"{place}: {language!r} is neither run nor output"
        excuse = None
        if rest:
            assert rest.startswith(NOT_RUN), f"{place}: {rest}"
            excuse = rest.removeprefix(NOT_RUN).rstrip('"')
            assert len(excuse.split()) >= 3, f"{place}: no reason"
        found.append(Block(language, token.content, token.map[0] + 1, excuse))
    return found
