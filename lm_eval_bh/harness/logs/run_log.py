"""The routing logs of an evaluation, and the summary made from them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from lm_eval_bh.harness.logs.evaluated_documents import EvaluatedDocuments
from lm_eval_bh.harness.logs.log_folder import LogFolder
from lm_eval_bh.harness.logs.log_options import LogOptions
from lm_eval_bh.harness.logs.merge_summaries import merge_summaries
from lm_eval_bh.harness.logs.recorder import Recorder
from lm_eval_bh.harness.logs.sample_log import Key, SampleLog, key_of
from lm_eval_bh.harness.logs.served_requests import ServedRequests
from lm_eval_bh.harness.logs.sinks import Sink
from lm_eval_bh.harness.logs.summary_log import SummaryLog
from lm_eval_bh.routing.patching.integration import BHRoutingIntegration
from lm_eval_bh.routing.routers import transformers_model
from lm_eval_bh.schema import (
    INTERNAL_ROUTING,
    SCHEMA_VERSION,
    InternalRouting,
    RoutingSummary,
    Sample,
    TaskSummary,
    experiment_name,
    read_json,
    shortened,
)

if TYPE_CHECKING:
    from lm_eval_bh.harness.logs.token_log import TokenLog


class RunLog:
    """The routing logs of one evaluation on one process.

    Parameters
    ----------
    integration : BHRoutingIntegration
        Its hooks report to the log until :meth:`detach`.
    options : LogOptions
        What to log. Nothing is written before the first request is served.
    run_id : str
        Run id, the same on every process: see :func:`new_run_id`.
    rank : int
        Rank of this process.

    Attributes
    ----------
    ended : bool
        Whether the evaluation has ended, finished or interrupted; the next needs a new log.
    served : ServedRequests
        The requests being served; none outside :meth:`serving`.
    cached_requests : int
        Number of requests that a cache has answered; the caller counts.
    """

    def __init__(
        self, integration: BHRoutingIntegration, options: LogOptions, run_id: str, rank: int
    ) -> None:
        self.run_id = run_id
        self.options = options
        self.ended = False
        self.served = ServedRequests()
        self.cached_requests = 0
        self.documents = EvaluatedDocuments()
        self._integration = integration
        self._rows_before = integration.rows_computed
        self._layers = integration.layers
        self._parts = 0
        self._states: list[dict[str, Any]] = []
        self._losses: dict[Key, float] = {}
        self._folder: LogFolder | None = None
        self._samples: SampleLog | None = None
        self._tokens: TokenLog | None = None
        config = integration.config
        self._summary = SummaryLog(len(integration.routers), integration.num_experts, config)
        sinks: list[Sink] = []
        if options.details:
            experts = integration.num_experts
            self._folder = LogFolder(Path(str(options.log_dir)), run_id, rank)
            self._samples = SampleLog(
                options.samples,
                experts,
                config.min_k if config.adaptive else config.max_k,
                config.max_k,
            )
            sinks.append(self._samples)
            if options.log_routing == "full":
                from lm_eval_bh.harness.logs.token_log import TokenLog

                self._tokens = TokenLog(self._folder, experts, options.log_logits, config)
                sinks.append(self._tokens)
        logging = options.log_routing != "off"
        model = transformers_model(integration.model).base_model
        self.recorder = Recorder(model, self._summary if logging else None, sinks)
        if logging:
            integration.observers.append(self.recorder.observe)

    def detach(self) -> None:
        """Stop listening to the hooks, and drop files that an interruption left unfinished."""
        if self.recorder.observe in self._integration.observers:
            self._integration.observers.remove(self.recorder.observe)
        if self._tokens is not None:
            self._tokens.discard()

    @contextmanager
    def serving(self, instances: Sequence[Any]) -> Iterator[ServedRequests]:
        """Log the enclosed passes for these requests, and write the logs afterwards."""
        self.served = ServedRequests(instances)
        self.documents.add(instances)
        try:
            if self._folder is not None:
                self._folder.create()
            yield self.served
            self.flush()
        except BaseException:
            self.ended = True
            raise
        finally:
            self.served = ServedRequests()

    @contextmanager
    def unlogged(self) -> Iterator[None]:
        """Exclude the enclosed passes from all logs, including the computed expert rows."""
        before = self._integration.rows_computed
        yield
        after = self._integration.rows_computed
        if None not in (before, after, self._rows_before):
            self._rows_before += after - before  # type: ignore[operator]

    def add_losses(self, log_likelihoods: Iterable[float]) -> None:
        """Record the log-likelihoods of the requests being served, in order."""
        for owner, loss in self.served.losses(log_likelihoods):
            if owner.doc_id < self.options.samples:
                self._losses[key_of(owner)] = loss

    def flush(self) -> None:
        """Write what a request method has gathered."""
        if self._samples is not None and self._folder is not None:
            samples = self._samples.take(self._losses)
            name = f".samples-{self._folder.rank}-{self._parts}.json"
            self._folder.write_json(name, samples)
            self._parts += 1
            self._losses.clear()
        if self._tokens is not None:
            self._tokens.flush()

    def state(self) -> dict[str, Any]:
        """Return all counters of this process, as plain values."""
        return self._summary.state() | {
            "cached_requests": self.cached_requests,
            "documents": self.documents.hashes,
            "expert_rows": self._expert_rows(),
            "token_parts": self._tokens.parts if self._tokens else [],
            "token_rows": self._tokens.rows if self._tokens else 0,
        }

    def collect(self, states: list[dict[str, Any]] | None) -> None:
        """Take the states of all processes; None on any but the first."""
        if states is not None:
            self._states = states
            self.documents.collect(states)

    def summary(self) -> RoutingSummary | None:
        """Return the routing summary over all processes; None without logging."""
        if self.options.log_routing == "off":
            return None
        states = self._all_states()
        cached = sum(state["cached_requests"] for state in states)
        return merge_summaries(states, self._layers, cached)

    def finish(self) -> None:
        """On the first process, join the parts of all processes and write the manifest."""
        summary = self.summary()
        if self.ended or self._folder is None or summary is None:
            self.ended = True
            return
        samples: dict[str, list[Sample]] = {}
        parts = sorted(self._folder.path.glob(".samples-*.json"))
        for part in parts:
            for task, some in read_json(part).items():
                samples.setdefault(task, []).extend(some)
        self.documents.name(samples)
        files: list[str] = []
        for task, task_summary in summary["tasks"].items():
            some = samples.get(task, [])
            some.sort(key=lambda sample: (sample["sample_id"], sample["request"], sample["repeat"]))
            content = self._internal_routing(task, task_summary, some)
            name = f"{content['config']}{INTERNAL_ROUTING}"
            # wikitext and bh_wikitext share a data set; the later file also gets its task's name.
            own = shortened(f"{task}_{content['config']}") + INTERNAL_ROUTING
            files.append(own if name in files else name)
            self._folder.write_json(files[-1], content)
        states = self._all_states()
        files += [part for state in states for part in state["token_parts"]]
        rows = sum(state["token_rows"] for state in states)
        self._folder.finish(self.run_id, files, rows)
        for part in parts:
            part.unlink()
        self.ended = True

    def _all_states(self) -> list[dict[str, Any]]:
        return [self.state(), *self._states[1:]]  # its own state is newer than the collected one

    def _expert_rows(self) -> int | None:
        rows = self._integration.rows_computed
        return None if rows is None or self._rows_before is None else rows - self._rows_before

    def _internal_routing(
        self, task: str, summary: TaskSummary, samples: list[Sample]
    ) -> InternalRouting:
        config = self._integration.config
        layers = summary["layers"]
        alpha = self._integration.describe()["alpha"] if config.adaptive else None
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "config": experiment_name(config.rule, config.max_k, alpha, task),
            "strategy": config.rule,
            "num_experts": self._integration.num_experts,
            "dataset": task,
            "samples": samples,
            "aggregate_stats": {
                "layers": [layer["layer"] for layer in layers],
                "total_tokens": summary["tokens"],
                "avg_experts": summary["mean_experts_per_token"],
                "std_experts": summary["std_experts_per_token"],
                "per_layer_avg_experts": [layer["mean_experts"] for layer in layers],
                "per_layer_std_experts": [layer["std_experts"] for layer in layers],
                "expert_usage_counts": [layer["usage"] for layer in layers],
            },
        }


def new_run_id(processes: int) -> str:
    """Return an id that sorts by time and is equal on all processes, which must call together."""
    run_id = [f"{datetime.now():%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"]
    if processes > 1:
        broadcast_object_list(run_id)
    return run_id[0]
