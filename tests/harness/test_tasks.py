"""The tasks: demo texts load and are refused when damaged; bh_ tasks equal the stock ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager

from lm_eval_bh import resources
from lm_eval_bh.errors import DataError
from lm_eval_bh.harness import demo_texts
from lm_eval_bh.resources import shipped

STOCK = {"bh_wikitext": "wikitext", "bh_lambada": "lambada_openai", "bh_hellaswag": "hellaswag"}
DEMO_SIZES = {"bh_demo_wikitext": 40, "bh_demo_lambada": 150, "bh_demo_hellaswag": 150}


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """Index our tasks and the stock ones they are compared with, and not the 14,000 others."""
    stock = Path(lm_eval.tasks.__file__).parent
    folders = [stock / name for name in ("wikitext", "lambada", "hellaswag")]
    return TaskManager(include_path=[shipped("tasks"), *folders], include_defaults=False)


def strings(task: Any) -> list[tuple[str, Any]]:
    task.build_all_requests()
    return [(request.request_type, request.args) for request in task.instances]


@pytest.fixture(scope="module", params=STOCK.items(), ids=STOCK)
def pair(request, manager, hf_env) -> tuple[Any, Any]:
    """Load one of our tasks and its stock original on the first 300 of the real documents."""
    loaded = manager.load(list(request.param))["tasks"]
    ours, stock = (loaded[name] for name in request.param)
    split = ours.config.test_split or ours.config.validation_split
    assert ours.dataset[split].num_rows == stock.dataset[split].num_rows
    for task in (ours, stock):
        task.dataset[split] = task.dataset[split].take(min(300, task.dataset[split].num_rows))
    return ours, stock


@pytest.mark.real
def test_same_requests_as_stock(pair):
    ours, stock = pair
    requests = strings(ours)
    assert len(requests) >= 62
    assert requests == strings(stock)


ANSWERS = {
    "bh_wikitext": [-7.5],
    "bh_lambada": [(-1.5, False)],
    "bh_hellaswag": [(-4.0, False), (-3.0, False), (-2.0, False), (-9.0, False)],
}


@pytest.mark.real
def test_same_metrics_as_stock(pair):
    ours, stock = pair
    assert ours.aggregation().keys() == stock.aggregation().keys()
    assert ours.higher_is_better() == stock.higher_is_better()
    assert ours.VERSION == stock.VERSION
    answer = ANSWERS[ours.config.task]
    values = ours.process_results(ours.eval_docs[3], answer)
    assert values == stock.process_results(stock.eval_docs[3], answer)
    for name, aggregate in ours.aggregation().items():
        assert aggregate([values[name]] * 2) == stock.aggregation()[name]([values[name]] * 2)


@pytest.mark.parametrize(("name", "size"), DEMO_SIZES.items())
def test_demo_tasks(manager, name, size):
    task = manager.load([name])["tasks"][name]
    requests = strings(task)
    assert len(task.eval_docs) == size
    assert len(requests) == size * (4 if "hellaswag" in name else 1)
    for _, args in requests:
        assert args[-1].strip()  # what is scored
        assert "  " not in args[-1] or "wikitext" in name
    if "hellaswag" in name:
        assert {task.doc_to_target(doc) for doc in task.eval_docs} == {0, 1, 2, 3}


def test_articles_are_those_of_the_task_a_paragraph_each():
    demo = shipped("tasks") / "demo"
    lines = (demo / "wikitext.jsonl").read_text(encoding="utf-8").splitlines()
    paragraphs = "\n".join(json.loads(line)["page"] for line in lines).splitlines()
    assert (demo / "articles.txt").read_text(encoding="utf-8") == "\n\n".join(paragraphs)


def test_tags(manager):
    assert set(manager.load(["bh_demo"])["tasks"]) == set(DEMO_SIZES)
    assert manager.task_index["bh_suite"].tags == set(STOCK)


def test_every_name_is_prefixed():
    ours = TaskManager(include_path=shipped("tasks"), include_defaults=False)
    assert set(ours.all_tasks) == {*STOCK, *DEMO_SIZES, "bh_suite", "bh_demo"}
    assert len(list(shipped("tasks").glob("*.yaml"))) == 6  # a broken one would be skipped silently


@pytest.fixture
def copied_tasks(tmp_path, monkeypatch) -> Path:
    """Point the package to a folder of tasks that a test may damage."""
    (tmp_path / "tasks" / "demo").mkdir(parents=True)
    monkeypatch.setattr(resources, "PACKAGE", tmp_path)
    return tmp_path / "tasks" / "demo"


def test_missing_demo_file(copied_tasks):
    with pytest.raises(DataError, match=r"wikitext\.jsonl cannot be read .*: reinstall"):
        demo_texts.load_demo("wikitext")


GOOD = json.dumps({"text": "All is well"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + '\n{"text": "half', r"^Line 2 of .*lambada\.jsonl is not JSON"),
        (GOOD + '\n{"words": "x"}\n', r"^Line 2 of .* lacks a str 'text'"),
        ('{"text": 3}\n', r"^Line 1 of .* lacks a str 'text'"),
        ("[]\n", r"^Line 1 of .* lacks a str 'text'"),
        ("", r"^Line 1 of .* is not JSON"),
    ],
)
def test_damaged_demo_file(copied_tasks, content, message):
    (copied_tasks / "lambada.jsonl").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        demo_texts.load_demo("lambada")
    assert str(caught.value).endswith("reinstall lm-eval-bh.")
    assert "\n" not in str(caught.value)


def test_foreign_bytes(copied_tasks):
    (copied_tasks / "lambada.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        demo_texts.load_demo("lambada")


def test_line_separators_inside_a_text(copied_tasks):
    row = json.dumps({"text": "one\u2028two three"}, ensure_ascii=False)
    (copied_tasks / "lambada.jsonl").write_text(row + "\n", encoding="utf-8")
    loaded = demo_texts.load_demo("lambada", pretrained="x", alpha=0.4)
    assert loaded["test"][0]["text"] == "one\u2028two three"
