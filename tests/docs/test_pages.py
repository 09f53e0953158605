"""Every block of Python and of the shell in README, docs/ and examples/ runs, page by page.

The blocks of a page run in order, in one folder; Python blocks share their names. If a block cannot
run here, its title says why, and the number of these blocks is fixed below.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from code_blocks import RUN, Block, blocks_of
from warm_commands import warm_commands

from lm_eval_bh.harness.model import DEFAULT_MODEL
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


@pytest.fixture(scope="session")
def commands():
    with (
        tempfile.TemporaryDirectory() as folder,  # a socket's path must be short
        warm_commands(Path(folder)) as path,
    ):
        yield path


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


def test_the_stock_command_understands_the_literal_line(commands):
    """Offline, the real OLMoE cannot be loaded, so the line ends in our message: it was parsed."""
    line = "lm_eval --model hf-bh --model_args alpha=0.4,max_k=8 --tasks lambada"
    done = subprocess.run(
        [commands / line.split()[0], *line.split()[1:]], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"lm-eval-bh: error: The model '{DEFAULT_MODEL}' could not be loaded")
    assert "Traceback" not in done.stderr


def test_what_does_not_run_is_known():
    """A block that is no longer run changes this number, which prompts a look at the reasons."""
    excused = [
        f"{page}:{block.line}: {block.excuse}"
        for page, blocks in BLOCKS.items()
        for block in blocks
        if block.excuse is not None
    ]
    assert len(excused) == NOT_RUN_HERE, "\n".join(excused)
