"""Names in figures are literal: no mathematics, no traceback, no warning per character."""

from __future__ import annotations

import logging
import warnings

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from lm_eval_bh.analysis.patterns import write_patterns
from lm_eval_bh.analysis.show import names
from lm_eval_bh.analysis.show.health_figure import draw_health
from lm_eval_bh.analysis.show.names import BOX, show_names
from lm_eval_bh.analysis.show.pareto_figure import Point, draw_pareto
from lm_eval_bh.analysis.show.plots import create_comprehensive_visualization
from lm_eval_bh.analysis.table.experiments import load_experiments

HOSTILE = [
    "a$b_{x$c",
    "$",
    "$$",
    r"\$a$",
    r"$\frac$",
    r"$\mathdefault{\frac}$",
    "a_b^c%d#e&f~g\\h{i}j",
    "\u6a21\u578b-\u65e5\u672c\u8a9e-\ud55c\uad6d\uc5b4",
    "\x1b[2J\t\x07",
    "\U0001f600",
    "\u05e9\u05dc\u05d5\u05dd",
]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_can_be_drawn(name, tmp_path, write):
    health = [
        {"layer": 0, "tokens": 9, "ks_distance": 0.1, "floor_share": 0, "ceiling_share": 0}
        | {"quantiles": [0, 0.5, 1]}
    ]
    draw_health(health, name, tmp_path / "health.png")
    point = Point(4.0, 20.0, -1.0, -2.0, 0.5)
    figure = draw_pareto({1: 30.0, 8: 18.0}, {name: [point]}, title=name, best=name)
    figure.savefig(tmp_path / "pareto.svg")


@pytest.mark.parametrize("name", HOSTILE[:4])
def test_tasks_of_any_name_can_be_drawn(name, tmp_path, write):
    tasks = {"bh_wikitext": name.replace("/", "")}

    def rename(content):
        for table in ("results", "configs", "versions", "n-shot", "n-samples", "task_hashes"):
            found = content[table]
            content[table] = {tasks.get(task, task): found[task] for task in found}

    write("top4", rule="topk", alpha=None, samples=False, change=rename)
    write("bh", samples=False, change=rename)
    loaded = load_experiments([write.folder])
    assert name in set(loaded.frame["task"])
    create_comprehensive_visualization(loaded.frame, tmp_path / "all.png", layers=loaded.layers)


def test_strategies_of_any_name_have_patterns(write, tmp_path, monkeypatch):
    write("bh", log=True)
    loaded = load_experiments([write.folder])
    loaded.frame["strategy"] = HOSTILE[0]
    assert write_patterns(loaded, tmp_path)


def test_dollars_are_drawn_as_they_are_and_powers_as_powers():
    figure = Figure()
    axes = figure.subplots()
    title = axes.set_title("a$b$c")
    axes.set_yscale("log")
    axes.set_ylim(1, 1e6)
    figure.canvas.draw()
    show_names(figure)
    assert not title.get_parse_math()
    ticks = [text for text in axes.get_yticklabels() if "mathdefault" in text.get_text()]
    assert ticks
    assert all(text.get_parse_math() for text in ticks)


def test_another_font_is_taken_where_one_has_the_characters(monkeypatch):
    """DejaVu Sans Mono ships with matplotlib; here it has the missing characters."""
    own = names._own()
    has = names._has
    monkeypatch.setattr(
        names, "_has", lambda path, c: has(path, c) and (c != "\xe9" or "SansMono.ttf" in path)
    )
    names._fonts_with.cache_clear()
    figure = Figure()
    title = figure.suptitle("caf\xe9")
    show_names(figure)
    names._fonts_with.cache_clear()
    assert "DejaVu Sans Mono" in title.get_fontfamily()
    assert title.get_text() == "caf\xe9"
    assert "SansMono" not in own


def test_what_no_font_has_is_a_box_and_is_said_once(caplog):
    names._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            figure = Figure()
            figure.text(0, 0, "a\U000f0000\nb\x1b")
            figure.text(0, 0.5, "a\U000f0000\nb\x1b")
            show_names(figure)
    assert {text.get_text() for text in figure.findobj(Text)} >= {f"a{BOX}\nb{BOX}"}
    [record] = caplog.records
    assert "so the figure shows boxes: install one" in record.getMessage()
    assert "\x1b" not in record.getMessage()
