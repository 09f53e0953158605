"""Reads one run: lm-eval's results, and the paths of its samples and routing logs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_bh.analysis.read.earlier_release import upgraded
from lm_eval_bh.analysis.read.exported_folder import OF_EXPORTED, exported_policy
from lm_eval_bh.analysis.read.harness_format import HarnessResults
from lm_eval_bh.analysis.read.model_arguments import (
    is_path,
    model_of,
    one_name,
    pretrained_of,
    revision_of,
    telling_arguments,
)
from lm_eval_bh.errors import DataError
from lm_eval_bh.experiment_names import is_file_name
from lm_eval_bh.schema import (
    INTERNAL_ROUTING,
    RunInfo,
    TaskSummary,
    experiment_name,
    read_json,
    read_manifest,
    read_run_info,
    shortened,
)
from lm_eval_bh.validation import mismatch

Notices = list[tuple[Path, str]]  # files, each with a sentence about it

# lm-eval's file names end with the time.
DATED = re.compile(r"_(\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?)\.json$")


@dataclass
class Run:
    """One results file of lm-eval."""

    file: Path
    content: dict[str, Any]
    info: RunInfo | None
    run_id: str
    fingerprint: str  # of the file's bytes
    exported: str | None = None  # the model whose exported folder another engine ran
    log_folder: Path | None = None
    log_files: tuple[str, ...] = ()

    @classmethod
    def read(cls, file: Path) -> Run:
        """Read a results file; raise :class:`DataError` if it is not one."""
        content = read_json(file)
        if not isinstance(content.get("results"), dict) or not content["results"]:
            raise DataError(f"{file} is incomplete: it has no results; run the evaluation again.")
        if not isinstance(content.get("config"), dict):
            raise DataError(
                f"{file} is incomplete: it has no configuration; run the evaluation again."
            )
        if reason := mismatch(content, HarnessResults, "the file"):
            raise DataError(f"{file} is damaged: {reason}; run the evaluation again.")
        if wrong := [task for task in content["results"] if {"/", "\0"} & set(task)]:
            raise DataError(
                f"{file} is damaged: {wrong[0]!r} is not a task name; run the evaluation again."
            )
        fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()
        info = read_run_info(content, str(file))
        info = info and upgraded(info, str(file))
        run_id = info["run_id"] if info else f"hf-{fingerprint[:12]}"
        exported = None
        if info is None and (found := exported_policy(content)):
            exported, info = found
            info["run_id"] = run_id
        return cls(file, content, info, run_id, fingerprint, exported)

    @property
    def tasks(self) -> list[str]:
        """The evaluated tasks, without totals of task groups."""
        known = self.content.get("configs") or self.content["results"]
        return sorted(task for task in self.content["results"] if task in known)

    @property
    def model(self) -> str:
        """The hub name, or the last part of the path."""
        name = self.exported or pretrained_of(self.content)
        return Path(name).name if is_path(name) else name

    @property
    def commit(self) -> str | None:
        """The commit of the model on the hub, if lm-eval recorded it."""
        return self.content["config"].get("model_sha") or None

    def of_task(self, table: str, task: str) -> Any:
        """Return the entry of one of lm-eval's tables for a task, or None."""
        return (self.content.get(table) or {}).get(task)

    def documents(self, task: str) -> int | None:
        """Return the number of evaluated documents of a task."""
        counted = (self.of_task("n-samples", task) or {}).get("effective")
        if counted is None:
            counted = self.content["results"][task].get("sample_len")
        return None if counted is None else int(counted)

    def documents_digest(self, task: str) -> str | None:
        """Return a digest that is equal for runs on the same documents; None if unknown."""
        return (self.info.get("documents") or {}).get(task) if self.info else None

    def summary(self, task: str) -> TaskSummary | None:
        """Return the routing summary of a task; None if it was not logged."""
        summary = self.info["summary"] if self.info else None
        found = summary["tasks"].get(task) if summary else None
        return found if found and found["tokens"] else None

    @property
    def cached_requests(self) -> int | None:
        """Number of requests that the routing summary omits; None without a summary."""
        summary = self.info["summary"] if self.info else None
        return summary["cached_requests"] if summary else None

    def samples_file(self, task: str) -> Path | None:
        """Return the file of lm-eval's samples of a task, if it exists."""
        dated = DATED.search(self.file.name)
        name = f"samples_{task}_{dated[1]}.jsonl" if dated else ""
        path = self.file.with_name(name) if is_file_name(name) else None
        return path if path and path.is_file() else None

    def internal_routing_file(self, task: str) -> Path | None:
        """Return the path of a task's internal routing log, if the run wrote one."""
        if self.log_folder is None or self.info is None:
            return None
        config = self.info["config"]
        alpha = None if self.info["rule"]["fixed_count"] else config["alpha"]
        name = experiment_name(config["rule"], config["max_k"], alpha, task)
        # The task's name comes first if two tasks of the run share a data set.
        names = (shortened(f"{task}_{name}") + INTERNAL_ROUTING, name + INTERNAL_ROUTING)
        return next((self.log_folder / name for name in names if name in self.log_files), None)

    def find_log(self, logs: Mapping[str, Path]) -> DataError | None:
        """Find the log folder; return an error if it is incomplete.

        The log folder is one that the user gave, or, for a relative ``log_dir``, one below a folder
        of the results. An absolute ``log_dir`` is not followed: for a copy of the results it would
        be the original's log, and the missing copy would go unnoticed.
        """
        if self.info is None or not (log_dir := self.info["log_dir"]):
            return None
        candidates = [logs[self.run_id]] if self.run_id in logs else []
        parts = Path(log_dir).parts
        if all(part == ".." or is_file_name(part) for part in parts):  # relative and valid
            candidates += [place / log_dir / self.run_id for place in self.file.parents]
        folder = next((folder for folder in candidates if folder.is_dir()), None)
        if folder is None:
            return None
        try:
            manifest = read_manifest(folder)
        except DataError as error:
            return error
        if manifest["run_id"] != self.run_id:
            return DataError(
                f"{folder} holds the log of another run, {manifest['run_id']}: "
                "put it back where it was, or run the evaluation again."
            )
        self.log_files, self.log_folder = tuple(manifest["files"]), folder
        return None

    def settings(self) -> dict[str, Any]:
        """Return the settings of the model that must be equal in comparable runs."""
        config, info = self.content["config"], self.info
        null = (info["null_model"] if info else None) or {}
        return {
            "model": one_name(self.exported) if self.exported else model_of(self.content),
            "model arguments": telling_arguments(
                self.content, OF_EXPORTED if self.exported else ()
            ),
            "number of parameters": config.get("model_num_parameters"),
            "dtype": config.get("model_dtype"),
            "revision": revision_of(self.content),
            "commit of the model": self.commit,
            "fingerprint of the routers": null.get("fingerprint"),
            "max_length": self.content.get("max_length"),
            "system instruction": self.content.get("system_instruction_sha") or "none",
            "chat template": self.content.get("chat_template_sha") or "none",
            # Without a template it has no effect, and lm-eval's defaults for it differ.
            "fewshot_as_multiturn": bool(self.content.get("fewshot_as_multiturn"))
            if self.content.get("chat_template_sha")
            else None,
        }

    def task_settings(self, task: str) -> dict[str, Any]:
        """Return the settings of a task that must be equal in comparable runs."""
        config = self.content["config"]
        counted = self.of_task("n-samples", task)
        shots = self.of_task("n-shot", task)
        return {
            # The outcome, where known: a limit above the number of documents has no effect.
            "limit": f"{counted['effective']} of {counted['original']} documents"
            if counted
            else None,
            "number of documents": self.documents(task),
            "limit as given": None if counted else str(config.get("limit")),
            "documents": self.documents_digest(task),
            "version": self.of_task("versions", task),
            "hash": self.of_task("task_hashes", task),
            "num_fewshot": shots,
            "fewshot_seed": config.get("fewshot_seed") if shots else None,
            "gen_kwargs": str(config.get("gen_kwargs") or "none"),
        }
