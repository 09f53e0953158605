"""One function recognises missing cells; pandas 3 turns None in text columns into NaN."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import lm_eval_bh
from lm_eval_bh.analysis.compare.verdicts import verdict_of
from lm_eval_bh.analysis.patterns.complexity import COMPLEXITY, OF_TOKEN
from lm_eval_bh.analysis.patterns.findings import Patterns
from lm_eval_bh.analysis.patterns.writing import sentences
from lm_eval_bh.analysis.show.report_tables import comparison_table
from lm_eval_bh.analysis.table.missing import holds, is_missing, text_of

NOTHING = [None, float("nan"), np.float64("nan"), pd.NA, pd.NaT]


@pytest.mark.parametrize("cell", NOTHING, ids=repr)
def test_nothing(cell):
    assert is_missing(cell)
    assert not holds(cell)
    assert text_of(cell) == ""


@pytest.mark.parametrize("cell", ["", "nan", 0, 0.0, False, [], [None], np.inf], ids=repr)
def test_something(cell):
    assert not is_missing(cell)
    assert holds(cell) == bool(cell)
    assert text_of(cell) == str(cell)


def test_a_correlation_beside_a_reason_is_written():
    """Of one table, so that pandas makes the column with the reason one of text."""
    known = {"n": 12, "spearman": 0.25, "low": -0.4, "high": 0.7, "p_value": 0.4, "unit": "nats"}
    rows = [
        known | {"task": "a", "against": "loss of the document"},
        known | {"task": "all", "against": "frequency of the token"},
        {"task": "b", "against": "loss of the document", "n": 0, "reason": "no loss was logged"},
        {"task": "b", "against": OF_TOKEN, "n": 0, "reason": "no loss was logged"},
    ]
    table = pd.DataFrame(rows, columns=list(COMPLEXITY)).astype({"layer": "Int64"})
    for kind in (object, "str"):
        tables = {"complexity": table.astype({"reason": kind})}
        tables["specialisation"] = pd.DataFrame(columns=["of"])
        assert sentences(Patterns("bh", 1, None, None, tables))[:4] == [
            "Experts and loss of the document, a: rank correlation +0.25 [-0.40, +0.70] over 12 "
            "(nats).",
            "Experts and frequency of the token: rank correlation +0.25 [-0.40, +0.70] over 12 "
            "(nats).",
            "Experts and loss of the document, b: no loss was logged.",
            f"Experts and {OF_TOKEN}, b: no loss was logged.",
        ]


@pytest.mark.parametrize("nothing", NOTHING, ids=repr)
def test_comparisons_show_no_missing_cell_as_a_word(nothing):
    columns = [
        "metric",
        "strategy",
        "task",
        "documents",
        "value",
        "baseline_value",
        "difference",
        "difference_low",
        "difference_high",
        "ratio",
        "ratio_low",
        "ratio_high",
        "flips_worse",
        "flips_better",
        "p_adjusted",
        "equivalence_p_adjusted",
        "equivalent",
        "reason",
    ]
    row = dict.fromkeys(columns, nothing) | {"strategy": "bh", "task": "t"}
    numbers = {name: np.nan for name in columns if name.startswith("ratio")}
    [found] = comparison_table(pd.DataFrame([row | numbers])).rows
    shown = {title: cell.text for title, cell in found.cells.items()}
    assert {text for title, text in shown.items() if title not in ("configuration", "task")} == {""}
    row |= {"filter": nothing, "reason": "no samples"}
    assert verdict_of(pd.Series(row), 0.05, 0.8) == (None, "t: not compared, no samples.")


def test_no_other_code_decides_what_is_missing():
    """Columns may be tested by their own methods; cells only by this function."""
    source = Path(lm_eval_bh.__file__).parent
    others = {
        file.name
        for file in source.rglob("*.py")
        if re.search(r"\bpd\.(isna|notna|isnull|notnull)\(", file.read_text(encoding="utf-8"))
    }
    assert others == {"missing.py"}
