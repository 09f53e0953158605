"""The main path on the real data sets: stock numbers reproduced, and BH adapting."""

from __future__ import annotations

import lm_eval
import pytest
from datasets import Dataset
from datasets.fingerprint import Hasher
from lm_eval.tasks import TaskManager

from lm_eval_bh.resources import shipped, tiny_olmoe

pytestmark = [pytest.mark.real, pytest.mark.slow]
TASKS = {"bh_wikitext": "wikitext", "bh_lambada": "lambada_openai", "bh_hellaswag": "hellaswag"}


@pytest.fixture(scope="module")
def manager(hf_env):
    """Index our tasks and the three stock ones, not the other 14,000."""
    from pathlib import Path

    import lm_eval.tasks as tasks

    stock = Path(tasks.__file__).parent
    folders = [shipped("tasks"), *(stock / name for name in ("wikitext", "lambada", "hellaswag"))]
    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)


@pytest.fixture(scope="module", autouse=True)
def mapped_once():
    """Map a data set once: lm-eval maps HellaSwag's 10,000 documents at each look at them."""
    map_, found = Dataset.map, {}

    def mapped(self, function, **options):
        if options:
            return map_(self, function, **options)
        key = self._fingerprint, Hasher.hash(function)
        if key not in found:
            found[key] = map_(self, function)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "map", mapped)
        yield


def run(manager, model, arguments, tasks, limit):
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        batch_size=8,
        bootstrap_iters=0,
        device="cpu",
    )


def metrics(results, task):
    return {
        name: value for name, value in results["results"][task].items() if isinstance(value, float)
    }


def test_our_tasks_and_top_8_give_the_numbers_of_the_stock_tasks_and_hf(manager):
    stock = run(manager, "hf", f"pretrained={tiny_olmoe()}", list(TASKS.values()), 12)
    ours = run(manager, "hf-bh", "pretrained=tiny-olmoe,rule=topk,max_k=8", list(TASKS), 12)
    for name, twin in TASKS.items():
        assert metrics(ours, name) == metrics(stock, twin)
        assert metrics(ours, name)


def test_mean_experts_rise_with_the_level_on_every_data_set(manager):
    means = {task: [] for task in TASKS}
    for alpha in (0.3, 0.4, 0.5, 0.6):
        results = run(
            manager, "hf-bh", f"pretrained=tiny-olmoe,alpha={alpha},max_k=8", list(TASKS), 3
        )
        for task, summary in results["config"]["bh"]["summary"]["tasks"].items():
            means[task].append(summary["mean_experts_per_token"])
    for rising in means.values():
        assert 1 < rising[0] < rising[1] < rising[2] < rising[3] < 8


def test_counters_do_not_depend_on_the_batch_size_or_the_cache(manager):
    """On the real texts, in float64, so that no decision depends on batch-shape rounding."""
    counted = []
    for batch_size, cache in ((1, True), (3, False), (8, True)):
        results = lm_eval.simple_evaluate(
            model="hf-bh",
            model_args="pretrained=tiny-olmoe,alpha=0.4,dtype=float64,experts=ragged,max_length=128,"
            f"logits_cache={cache}",
            tasks=list(TASKS),
            task_manager=manager,
            limit=1,
            batch_size=batch_size,
            bootstrap_iters=0,
            device="cpu",
        )
        tasks = results["config"]["bh"]["summary"]["tasks"]
        assert all(task["tokens"] > 50 for task in tasks.values())
        counted.append({name: task["layers"] for name, task in tasks.items()})
    assert counted[0] == counted[1] == counted[2]
