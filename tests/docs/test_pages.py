"""Every block of Python and of the shell in README, docs/ and examples/ runs, page by page.

The blocks of a page run in order, in one folder; Python blocks share their names. If a block cannot
run here, its title says why, and the number of these blocks is fixed below.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from code_blocks import RUN, Block, blocks_of

from lm_eval_bh.routing.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for folder in ("", "docs", "examples")
    for page in (ROOT / folder).glob("**/*.md" if folder == "docs" else "*.md")
    if page.name != "CHANGELOG.md"
)
BLOCKS = {page.relative_to(ROOT).as_posix(): blocks_of(page) for page in PAGES}
NOT_RUN_HERE = 29

pytestmark = pytest.mark.slow


@pytest.fixture
def methods_of_a_page():
    """Forget the methods that a page has defined."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def run_bash(block: Block, place: str, commands: Path) -> None:
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "100",
        "QUICK": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{place}\n{block.code}\n{done.stdout}"


@pytest.mark.filterwarnings("ignore")  # a reader's Python shows them, and runs on
@pytest.mark.parametrize(
    "page",
    [
        name
        for name, blocks in BLOCKS.items()
        if any(b.excuse is None and b.language in RUN for b in blocks)
    ],
)
def test_every_block_runs(page, commands, methods_of_a_page, tmp_path, monkeypatch):
    for name in ("examples", "scripts", "kde_models", "tasks"):  # a reader is in a clone
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in BLOCKS[page]:
        if block.excuse is not None or block.language not in RUN:
            continue
        place = f"{page}:{block.line}"
        if block.language == "bash":
            run_bash(block, place, commands)
        else:
            try:
                exec(compile(block.code, place, "exec", dont_inherit=True), names)
            except BaseException as error:
                raise AssertionError(f"{place}\n{block.code}") from error


def test_what_does_not_run_is_known():
    """A block that is no longer run changes this number, which prompts a look at the reasons."""
    excused = [
        f"{page}:{block.line}: {block.excuse}"
        for page, blocks in BLOCKS.items()
        for block in blocks
        if block.excuse is not None
    ]
    assert len(excused) == NOT_RUN_HERE, "\n".join(excused)
