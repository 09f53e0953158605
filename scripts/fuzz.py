"""Fuzzes every reader for a given time: damaged files are read, or refused with a message.

python scripts/fuzz.py --minutes 5
python scripts/fuzz.py --minutes 1 --only "samples or headers"

Runs the tests of tests/trust/test_fuzzing.py, for which the suite draws 150 examples, in rounds
with new seeds and many more examples. A failing round ends it: the example is in its output, and
the exit code is 1.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

TESTS = Path(__file__).resolve().parents[1] / "tests" / "trust" / "test_fuzzing.py"


def main(
    minutes: Annotated[float, typer.Option(min=0, help="How long; a round is always ended.")] = 5,
    only: Annotated[str, typer.Option(help="As pytest takes -k: samples or headers.")] = "",
    examples: Annotated[int, typer.Option(min=1, help="Of each reader in a round.")] = 1000,
    seed: Annotated[int | None, typer.Option(help="Of the first round; default: random.")] = None,
) -> None:
    """Draw damaged files until the time is up."""
    first = random.randrange(2**31) if seed is None else seed
    end = time.monotonic() + 60 * minutes
    tried: Counter[str] = Counter()
    rounds = 0
    while not rounds or time.monotonic() < end:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", TESTS, "-k", only, "-p", "no:cacheprovider"),
                *(f"--hypothesis-seed={first + rounds}", "--hypothesis-show-statistics"),
            ],
            env=os.environ | {"LM_EVAL_BH_FUZZ_EXAMPLES": str(examples)},
            capture_output=True,
            text=True,
        )
        if done.returncode or "passing" not in done.stdout:
            print(done.stdout, done.stderr)
            print(
                f"pytest ended with {done.returncode}; a negative number is the signal that "
                "killed it."
            )
            raise typer.Exit(1)
        rounds += 1
        name = ""
        for line in done.stdout.splitlines():
            if found := re.match(r".*::test_(\S+):$", line):
                name = found[1]
            elif found := re.search(r"(\d+) passing\b", line):
                tried[name] += int(found[1])
    print(f"Seeds {first} to {first + rounds - 1}; files that were read or refused by a sentence:")
    for name, number in sorted(tried.items()):
        print(f"{number:10,d}  {name}")
    print(f"{tried.total():10,d}  in all; nothing else was raised.")


if __name__ == "__main__":
    typer.run(main)
