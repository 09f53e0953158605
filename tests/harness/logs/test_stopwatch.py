"""Time of an evaluation's passes: read later, without the logs' time, after a warm-up."""

from __future__ import annotations

import torch
from lm_eval import simple_evaluate

from lm_eval_bh import RoutingConfig
from lm_eval_bh.harness.logs import stopwatch
from lm_eval_bh.harness.logs.ownership import Batch, Owner
from lm_eval_bh.harness.logs.sinks import Sinks
from lm_eval_bh.harness.logs.stopwatch import Span, moment
from lm_eval_bh.harness.logs.summary_log import BEHIND, SummaryLog
from lm_eval_bh.harness.model import BHLM
from lm_eval_bh.harness.sweep.task_names import new_task_manager


class Clock:
    """A clock that passes time only when it is told to."""

    now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class SlowSink:
    """A log that takes its time."""

    def __init__(self, clock):
        self._clock = clock

    def begin(self, batch, device):
        self._clock.sleep(5)

    def layer(self, layer, router_logits, selection):
        self._clock.sleep(5)

    def end(self):
        self._clock.sleep(5)


def test_the_time_of_the_logs_is_not_the_model_s(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stopwatch.time, "perf_counter", clock)
    sinks = Sinks([SlowSink(clock)])
    watch = sinks.stopwatch(torch.device("cpu"))
    sinks.begin(None, torch.device("cpu"))
    sinks.layer(0, None, None)
    clock.sleep(2)
    span = watch()
    sinks.end()  # after the pass
    assert span.seconds() == 2


class AskedSpan(Span):
    """A span that records whether it was read."""

    asked = 0

    def seconds(self):
        AskedSpan.asked += 1
        return 1.0


def test_the_last_passes_are_asked_for_only_at_the_end(monkeypatch):
    monkeypatch.setattr(AskedSpan, "asked", 0)
    log, now = SummaryLog(1, 4, RoutingConfig()), moment(torch.device("cpu"))
    owner = Owner("task", 0, 0, 0, 0)
    batch = Batch([[owner]], torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3).long(), [0])
    log.begin(batch, torch.device("cpu"))
    for _ in range(BEHIND + 3):
        log.took(batch, AskedSpan(now, now, []))
    assert AskedSpan.asked == 3
    assert log.state()["tasks"]["task"]["seconds"] == BEHIND + 3
    assert log.state()["tasks"]["task"]["seconds"] == BEHIND + 3


def test_the_first_pass_is_warmed_up_once_and_leaves_no_trace():
    lm = BHLM.create_from_arg_obj(
        {"pretrained": "tiny-olmoe", "alpha": 0.4}, {"device": "cpu", "batch_size": 2}
    )
    passes = []
    lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(args[0].shape)), with_kwargs=True
    )
    tasks = {"tasks": ["bh_demo_lambada"], "task_manager": new_task_manager(defaults=False)}
    found = []
    for _ in range(2):
        results = simple_evaluate(lm, **tasks, limit=4, bootstrap_iters=0)
        found.append(results["config"]["bh"]["summary"])
    first, *measured = passes
    assert first == (1, measured[0][1])
    assert len(measured) == 4  # two batches of two, twice
    own = ("seconds", "tasks")
    assert {k: v for k, v in found[0].items() if k not in own} == {
        k: v for k, v in found[1].items() if k not in own
    }
    assert all(summary["seconds"] > 0 for summary in found)
