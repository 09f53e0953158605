"""Runs on the demo texts, and the slow reference for their logs."""

from __future__ import annotations

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from reference import Reference
from routing_runs import ARGS, LIMIT

from lm_eval_bh import NullModel
from lm_eval_bh.resources import shipped, tiny_olmoe

GENERATION = {
    "task": "demo_generation",
    "custom_dataset": None,
    "output_type": "generate_until",
    "doc_to_text": "{{text[:120]}}",
    "doc_to_target": "{{text[120:]}}",
    "generation_kwargs": {"until": [",", "the"], "max_gen_toks": 10, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
    "test_split": "test",
}


@pytest.fixture(scope="session")
def tasks():
    """Three ways of scoring, and generation, on the demo texts."""
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)
    lambada = manager.load(["bh_demo_lambada"])["tasks"]["bh_demo_lambada"]
    generation = GENERATION | {"custom_dataset": lambada.config.custom_dataset}
    generation["dataset_kwargs"] = lambada.config.dataset_kwargs
    return ["bh_demo_wikitext", "bh_demo_lambada", "bh_demo_hellaswag", generation]


@pytest.fixture(scope="session")
def run(tasks):
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)

    def evaluate(
        arguments="", *, model_args=ARGS, tasks=tasks, batch_size=1, limit=LIMIT, **options
    ):
        return lm_eval.simple_evaluate(
            model="hf-bh",
            model_args=f"{model_args},{arguments}" if arguments else model_args,
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            batch_size=batch_size,
            bootstrap_iters=0,
            device="cpu",
            **options,
        )

    return evaluate


@pytest.fixture(scope="session")
def reference(tasks):
    manager = TaskManager(include_path=str(shipped("tasks")), include_defaults=False)
    lm = HFLM(
        str(tiny_olmoe()),
        dtype="float64",
        experts_implementation="eager",
        max_length=48,
        device="cpu",
    )
    slow = Reference(lm, NullModel.load(shipped("kde_models") / "tiny-olmoe.safetensors"), 0.5, 6)
    for task in manager.load(tasks)["tasks"].values():
        task.build_all_requests(limit=LIMIT, rank=0, world_size=1)
        slow.run(task.instances)
    return slow


@pytest.fixture(scope="session")
def expected(reference):
    return {
        task: {
            "histogram": reference.histogram[task],
            "usage": reference.usage[task],
            "cross": reference.cross[task],
        }
        for task in reference.histogram
    }


@pytest.fixture(scope="session")
def full_logs(run, tasks, tmp_path_factory):
    """Folders of full logs by what is special about their routing; the first has generations."""
    routed = {
        "float32": "rule=topk,dtype=float32",
        "bfloat16": "rule=topk,dtype=bfloat16",
        "min_w": "rule=min_w,alpha=0.05,dtype=float32",
    }
    folder = tmp_path_factory.mktemp("full")
    for name, how in routed.items():
        log = f"log_routing=full,log_dir={folder / name}"
        some = tasks if name == "float32" else tasks[:3]  # what is generated may differ
        arguments = "pretrained=tiny-olmoe,max_length=48"
        run(f"{how},{log}", model_args=arguments, tasks=some, batch_size=4)
    return {name: folder / name for name in routed}
