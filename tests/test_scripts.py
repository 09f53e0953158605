"""The comparison of rules that the documentation shows: what it compares, and with what."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Return scripts/compare_rules.py as a module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("compare_rules")


@pytest.fixture
def table(script):
    """Return a table of static top-k alone: documents of 10 to 40 tokens, loss falls with k."""
    tokens = np.array([10, 20, 30, 40])
    rng = np.random.default_rng(0)
    rows = {
        f"topk/logit/layer/{k}": script.Measured(
            float(k), None, (tokens * (4 + 1 / k + 0.01 * rng.normal(size=4))).tolist()
        )
        for k in (2, 3, 4)
    }
    return script.Table(rows, tokens.tolist(), seed=0)


def test_a_rule_that_is_static_top_k_differs_by_nothing(table, script):
    found = table.compare(script.Measured(3.0, 0.4, table.static.at(3).tolist()))
    assert found.perplexity == found.control
    assert found.difference == found.low == found.high == 0


def test_what_is_as_much_worse_in_every_document_is_worse_without_doubt(table, script):
    worse = table.static.at(3) + 0.1 * np.array([10, 20, 30, 40])  # a tenth of a nat a token
    found = table.compare(script.Measured(3.0, 0.4, worse.tolist()))
    assert found.perplexity == pytest.approx(found.control * np.exp(0.1))
    assert 0 < found.low < found.difference < found.high
    assert (
        found.high - found.low < 0.05 * found.difference
    )  # paired: what documents have in common cancels


def test_losses_that_differ_by_chance_alone_are_undecided(table, script):
    mixed = table.static.at(3) + np.array([1, -1, 1, -1])
    found = table.compare(script.Measured(3.0, 0.4, mixed.tolist()))
    assert found.low < 0 < found.high


def test_a_file_of_other_settings_is_refused_and_left_as_it_was(script, tmp_path):
    app = typer.Typer()
    app.command()(script.main)
    path = tmp_path / "rows.json"
    settings = {"pretrained": "tiny-olmoe", "limit": 2, "tokens_per_document": None, "max_k": 8}
    path.write_text(json.dumps({"settings": settings, "tokens": [5, 5], "rows": {}}))
    before = path.read_bytes()
    result = CliRunner().invoke(app, ["--output", str(path), "--limit", "3"])
    assert result.exit_code == 2
    assert "give the same options" in " ".join(result.output.replace("│", " ").split())
    assert path.read_bytes() == before
