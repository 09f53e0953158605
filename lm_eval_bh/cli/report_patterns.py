"""``lm-eval-bh report --patterns``: what routing logs show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_bh.cli.model_files import find_tokenizer
from lm_eval_bh.cli.printing import say_written, warn

if TYPE_CHECKING:
    from lm_eval_bh.analysis.read.loaded import Loaded


def report_patterns(loaded: Loaded, folder: Path, tokenizer: Path | None, seed: int) -> None:
    """Write the tables and figures of experts and difficulty, specialisation and clusters."""
    from lm_eval_bh.analysis.patterns import write_patterns

    path = tokenizer or find_tokenizer(Path(loaded.frame["file"].iloc[0]))
    say_written(write_patterns(loaded, folder, tokenizer=path, seed=seed))
    if path is None:
        warn("note: no tokenizer was found, so tokens have no class; name one with --tokenizer.")
