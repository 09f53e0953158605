"""Finds and reads the files of runs: lm-eval's results, and where their routing logs are."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_bh.analysis.read.earlier_release import upgraded
from lm_eval_bh.errors import DataError
from lm_eval_bh.schema import (
    INTERNAL_ROUTING,
    MANIFEST,
    RunInfo,
    TaskSummary,
    experiment_name,
    read_json,
    read_manifest,
    read_run_info,
)

Notices = list[tuple[Path, str]]  # files, each with a sentence about it

# What reading a JSON file of another shape than expected raises.
_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)

# lm-eval ends the names of its files with the time.
_DATED = re.compile(r"_(\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?)\.json$")


def pretrained_of(content: Mapping[str, Any]) -> str:
    """Return the hub name or path of the model that a results file is of."""
    config = content["config"]
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        pairs = (part.partition("=") for part in arguments.split(","))
        arguments = {name.strip(): value for name, _, value in pairs}
    # Where the model was given as an object, lm-eval makes up a random model_name.
    drawn = content.get("model_source") == "CUSTOM"
    named = None if drawn else content.get("model_name")
    return str(arguments.get("pretrained") or named or config.get("model"))


@dataclass
class Run:
    """One results file of lm-eval."""

    file: Path
    content: dict[str, Any]
    info: RunInfo | None
    run_id: str
    fingerprint: str  # of the file's bytes
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
        fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()
        info = read_run_info(content, str(file))
        info = info and upgraded(info, str(file))
        run_id = info["run_id"] if info else f"hf-{fingerprint[:12]}"
        return cls(file, content, info, run_id, fingerprint)

    @property
    def tasks(self) -> list[str]:
        """The tasks evaluated, without the totals of groups of tasks."""
        known = self.content.get("configs") or self.content["results"]
        return sorted(task for task in self.content["results"] if task in known)

    @property
    def model(self) -> str:
        """The hub name, or the last part of a path."""
        name = pretrained_of(self.content)
        return Path(name).name if name.startswith(("/", ".", "~")) else name

    def of_task(self, table: str, task: str) -> Any:
        """Return the entry of one of lm-eval's tables for a task, or None."""
        return (self.content.get(table) or {}).get(task)

    def documents(self, task: str) -> int | None:
        """Return how many documents of a task were evaluated."""
        counted = (self.of_task("n-samples", task) or {}).get("effective")
        if counted is None:
            counted = self.content["results"][task].get("sample_len")
        return None if counted is None else int(counted)

    def summary(self, task: str) -> TaskSummary | None:
        """Return the routing summary of a task; None if it was not logged."""
        summary = self.info["summary"] if self.info else None
        found = summary["tasks"].get(task) if summary else None
        return found if found and found["tokens"] else None

    @property
    def cached_requests(self) -> int | None:
        """How many requests the routing summary does not count; None without a summary."""
        summary = self.info["summary"] if self.info else None
        return summary["cached_requests"] if summary else None

    def samples_file(self, task: str) -> Path | None:
        """Return the file of lm-eval's samples of a task, if it exists."""
        dated = _DATED.search(self.file.name)
        path = self.file.with_name(f"samples_{task}_{dated[1]}.jsonl") if dated else None
        return path if path and path.is_file() else None

    def internal_routing_file(self, task: str) -> Path | None:
        """Return the path of a task's internal routing log, if the run wrote one."""
        if self.log_folder is None or self.info is None:
            return None
        config = self.info["config"]
        alpha = None if self.info["rule"]["fixed_count"] else config["alpha"]
        name = experiment_name(config["rule"], config["max_k"], alpha, task) + INTERNAL_ROUTING
        # With its task's name in front where two tasks of the run have one data set.
        names = (f"{task}_{name}", name)
        return next((self.log_folder / name for name in names if name in self.log_files), None)

    def find_log(self, manifests: Mapping[str, Path]) -> DataError | None:
        """Find the log folder; return an error if it is incomplete."""
        if self.info is None or not self.info["log_dir"]:
            return None
        places = [self.file.parent, *self.file.parent.parents, Path()]
        candidates = [place / self.info["log_dir"] / self.run_id for place in places]
        if self.run_id in manifests:
            candidates.insert(0, manifests[self.run_id])
        folder = next((folder for folder in candidates if folder.is_dir()), None)
        if folder is None:
            return None
        try:
            self.log_files = tuple(read_manifest(folder)["files"])
        except DataError as error:
            return error
        self.log_folder = folder
        return None

    def settings(self) -> dict[str, Any]:
        """Return the settings of the model that must be equal in comparable runs."""
        config, info = self.content["config"], self.info
        null = (info["null_model"] if info else None) or {}
        return {
            "model": self.model,
            "number of parameters": config.get("model_num_parameters"),
            "dtype": config.get("model_dtype"),
            "commit of the model": config.get("model_sha") or None,
            "fingerprint of the routers": null.get("fingerprint"),
            "max_length": self.content.get("max_length"),
            "system instruction": self.content.get("system_instruction_sha") or "none",
            "chat template": self.content.get("chat_template_sha") or "none",
            # Without a template it changes nothing, and lm-eval's defaults for it differ.
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
            else str(config.get("limit")),
            "version": self.of_task("versions", task),
            "hash": self.of_task("task_hashes", task),
            "num_fewshot": shots,
            "fewshot_seed": config.get("fewshot_seed") if shots else None,
            "gen_kwargs": str(config.get("gen_kwargs") or "none"),
        }


def find_files(folders: Sequence[Path]) -> tuple[list[Path], dict[str, Path]]:
    """Return (results files, run id -> log folder), each in the order of their paths."""
    files: set[Path] = set()
    manifests: dict[str, Path] = {}
    for folder in folders:
        if folder.is_file():
            files.add(folder)
        elif not folder.is_dir():
            raise DataError(f"There is no folder {folder}: use one that lm_eval wrote to.")
        for parent, children, names in os.walk(folder):
            children.sort()
            for name in names:
                if name == MANIFEST:
                    manifests.setdefault(Path(parent).name, Path(parent))
                elif name.endswith(".json") and (
                    name.startswith("results_") or _DATED.search(name)
                ):
                    files.add(Path(parent) / name)
    return sorted(files, key=lambda file: file.as_posix()), manifests


def read_runs(
    files: Iterable[Path],
    manifests: Mapping[str, Path],
    check: Callable[[Run], object],
    problems: Notices,
    notes: Notices,
) -> Iterator[Run]:
    """Yield the complete runs.

    Parameters
    ----------
    files, manifests
        From :func:`find_files`.
    check : callable
        Raises what later reading would raise if something in the run is missing or wrong.
    problems, notes : list of (Path, str)
        Filled with why files are left out, and with remarks on others.
    """
    seen: dict[str, Run] = {}
    for file in files:
        try:
            run = Run.read(file)
            check(run)
        except (DataError, *_MALFORMED) as error:
            sentence = f"{file} is damaged ({error!r}): run the evaluation again."
            problems.append((file, str(error) if isinstance(error, DataError) else sentence))
            continue
        if run.run_id in seen:
            first = seen[run.run_id]
            if first.fingerprint == run.fingerprint:
                notes.append((file, f"{file} is a copy of {first.file}: it is read once."))
            else:
                sentence = (
                    f"{file} has the run id {run.run_id} of {first.file}, so their routing logs "
                    "cannot be told apart: run the evaluation again."
                )
                problems.append((file, sentence))
            continue
        if problem := run.find_log(manifests):
            problems.append((file, str(problem)))
        if run.info and run.info["log_dir"] and not (problem or run.log_folder):
            sentence = (
                f"The routing log of {file} is not in {run.info['log_dir']}: "
                "give the folder that it was moved to as well."
            )
            notes.append((file, sentence))
        if cached := run.cached_requests:
            sentence = (
                f"{cached} requests of {file} came from a cache: "
                "its routing numbers are of the others only."
            )
            notes.append((file, sentence))
        seen[run.run_id] = run
        yield run
