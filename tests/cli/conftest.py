"""Inputs of commands: a text file, and finished runs."""

from __future__ import annotations

import json

import pytest

from lm_eval_bh.resources import shipped


@pytest.fixture
def text(tmp_path):
    """Return a text file with some of the demo articles."""
    path = tmp_path / "text.txt"
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text().splitlines()[:12]
    path.write_text("\n\n".join(json.loads(line)["page"].replace("\n", " ") for line in lines))
    return path


@pytest.fixture
def runs(write):
    write("top4", rule="topk", loss=(2.0, 2.1, 2.2, 2.3))
    write("top2", rule="topk", max_k=2, loss=(2.2, 2.4, 2.3, 2.6))
    write("bh", alpha=0.4, loss=(2.1, 2.2, 2.3, 2.5), right=(0, 0, 1, 0), log=True)
    return write.folder


@pytest.fixture
def long_text(tmp_path):
    """Return a text file of enough paragraphs for three parts."""
    lines = (shipped("tasks") / "demo" / "wikitext.jsonl").read_text(encoding="utf-8").splitlines()
    parts = [part for line in lines for part in json.loads(line)["page"].split("\n")]
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(part for part in parts if len(part) > 150)[:30_000])
    return path
