"""Writes the documentation's table of model families, from the tests' tiny models."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "routing" / "patching"))
from families import Examined, examine, families  # noqa: E402
from plain_picks import faults  # noqa: E402

PAGE = "docs/reference/families.md"
BEGIN, END = "<!-- families: scripts/table_families.py -->", "<!-- end of families -->"
KINDS: list[tuple[str, str, Callable[[Examined], bool]]] = [
    (
        "softmax of the logits",
        "every method, statistic, temperature and `max_k`",
        lambda e: e.behaviour.softmax and not e.behaviour.normalizes,
    ),
    (
        "softmax, rescaled to sum to one",
        "the same",
        lambda e: e.behaviour.softmax and e.behaviour.normalizes,
    ),
    (
        "scores of their own, rescaled to a fixed sum",
        "the same but temperature; statistics start from the router's own weight",
        lambda e: e.behaviour.obeys and e.behaviour.normalizes,
    ),
    (
        "scores of their own",
        "the same",
        lambda e: e.behaviour.obeys,
    ),
    (
        "scores of their own, always of as many experts",
        "`topk`, `min_w` and tests of a layer's logits, `max_k` up to the router's own number",
        lambda e: True,
    ),
]


def table() -> str:
    """Return the table in Markdown."""
    found = [examine(family) for family in families()]
    works = [each for each in found if each.behaviour is not None]
    lines = [f"Of transformers {transformers.__version__}:", ""]
    lines += [
        "| weights of the router | what works | `min_w` with `benefit` and `mass` | families |",
        "|---|---|---|---|",
    ]
    left = list(works)
    for weights, what, fits in KINDS:
        names = [each.family for each in left if fits(each)]
        left = [each for each in left if each.family not in names]
        exact = [name for name in names if not faults(name, "min_w")]
        lines.append(
            f"| {weights} | {what} | exact in {len(exact)} of {len(names)} | {', '.join(names)} |"
        )
    refused = [each.family for each in found if each.built and each.behaviour is None]
    lines.append(
        f"| no (logits, weights, indices) | refused when constructed | | {', '.join(refused)} |"
    )
    unknown = [each.family for each in found if not each.built]
    lines.append(f"| not known: no tiny model was made | | | {', '.join(unknown)} |")
    crashing = ", ".join(each.family for each in works if not each.eager)
    lines += ["", f"`experts=eager` is refused where slots can stay unused in: {crashing}."]
    return "\n".join(lines)


def with_table(page: str) -> str:
    """Return the page with the table between its markers."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.S)
    return pattern.sub(f"{BEGIN}\n{table()}\n{END}", page)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    file = ROOT / PAGE
    file.write_text(with_table(file.read_text(encoding="utf-8")), encoding="utf-8")
