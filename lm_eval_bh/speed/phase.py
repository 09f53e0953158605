"""The whole speed phase: its input, its rounds, the work of each configuration, its file."""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from lm_eval_bh.errors import DataError, ParameterError
from lm_eval_bh.files import replacing
from lm_eval_bh.harness.sweep.evaluator import quiet
from lm_eval_bh.schema import SCHEMA_VERSION, SPEED, SpeedFile, SpeedWork, read_speed
from lm_eval_bh.speed.contestants import NATIVE, Contestant, contestants, name_of
from lm_eval_bh.speed.expert_work import ExpertWork
from lm_eval_bh.speed.floor import measure_machine, weights_of
from lm_eval_bh.speed.rounds import run_rounds
from lm_eval_bh.speed.task_text import decode_rows, prefill_batches, rows_of
from lm_eval_bh.speed.workloads import Decode, Prefill, Workload, dense_flops

FEWEST_ROUNDS = 7  # minimum for a meaningful interval
DECODED = (1, 8, 32)  # batch sizes of decoding
PACKAGES = ("torch", "transformers", "lm_eval", "lm-eval-bh")


@dataclass(frozen=True)
class SpeedSettings:
    """Settings of a speed phase.

    Attributes
    ----------
    rounds : int
        Number of rounds, in each of which every configuration runs once; the median counts.
    batches, documents : int
        Batches of a prefill, and the documents of a task to make them from.
    prompt, steps : int
        Tokens in the cache before decoding, and decoded tokens.
    seed : int
        Seed of the order within rounds.
    array : int
        Elements of the array that measures memory bandwidth.

    Raises
    ------
    ParameterError
        If a number is too small.
    """

    rounds: int = 9
    batches: int = 4
    documents: int = 64
    prompt: int = 128
    steps: int = 32
    seed: int = 0
    array: int = 2**27

    def __post_init__(self) -> None:
        if self.rounds < FEWEST_ROUNDS:
            raise ParameterError(
                f"rounds must be {FEWEST_ROUNDS} or more, or intervals say nothing: "
                f"found {self.rounds}."
            )
        for name in ("batches", "documents", "prompt", "steps"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} must be 1 or more: found {getattr(self, name)}.")


QUICK = SpeedSettings(rounds=7, batches=1, documents=16, prompt=4, steps=4, array=2**24)


def speed_file(folder: Path) -> Path:
    """Return the file of a folder's speed phase."""
    return folder / f"{SPEED}.json"


def asked_of(
    model: str,
    tasks: Sequence[str],
    configurations: Sequence[Mapping[str, Any]],
    batch_size: int,
    settings: SpeedSettings,
) -> dict[str, Any]:
    """Return everything that distinguishes phases, as plain values."""
    return {
        "model": model,
        "tasks": sorted(tasks),
        "configurations": sorted(map(name_of, configurations)),
        "batch_size": batch_size,
        "decoded": list(DECODED),
        **asdict(settings),
    }


def is_measured(file: Path, asked: Mapping[str, Any]) -> bool:
    """Return whether a file holds a phase; a damaged file does not."""
    if not file.is_file():
        return False
    try:
        return read_speed(file)["asked"] == asked
    except DataError:
        return False


@torch.no_grad()
def measure(
    lm: Any,
    model: str,
    tasks: Mapping[str, Any],
    configurations: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    settings: SpeedSettings | None = None,
) -> SpeedFile:
    """Compare configurations with each other and with the unchanged model.

    Parameters
    ----------
    lm : BHLM
        The loaded model, on one process. Its own routing is removed during the phase.
    model : str
        Name or path of the model as given.
    tasks : mapping of str to Task
        Loaded tasks of lm-eval, which provide the text.
    configurations : sequence of mapping
        Arguments of ``hf-bh``, see :func:`~lm_eval_bh.speed.contestants.contestants`.
    batch_size : int
        Batch size of the prefill: the evaluation's.

    Raises
    ------
    ParameterError
        If the model runs on several processes, or its context is too short for the settings.
    BHError
        If a configuration does not fit the model, or a task has no text.
    """
    settings = settings or SpeedSettings()
    if lm.world_size > 1:
        raise ParameterError(
            f"Speed is measured on one process, and there are {lm.world_size}: start one."
        )
    if (length := settings.prompt + 1 + settings.steps) > lm.max_length:
        raise ParameterError(
            f"prompt={settings.prompt} and steps={settings.steps} need {length} tokens, more than "
            f"the model's context of {lm.max_length}: give fewer."
        )
    network, load = lm.model, os.getloadavg()
    workloads: list[Workload] = []
    for name, task in sorted(tasks.items()):
        with quiet(logging.ERROR):
            rows = rows_of(lm, task, settings.documents)
        # Decoding first: reading its prompt warms up the configuration.
        workloads += [Decode(name, decode_rows(rows, n, length), settings.prompt) for n in DECODED]
        workloads.append(Prefill(name, prefill_batches(rows, batch_size, settings.batches)))
    with _unpatched(lm):
        machine = measure_machine(network.dtype, network.device, elements=settings.array)
        found = contestants(lm, configurations)
        work = [_work(one, network, workloads) for one in found]  # the first run of each: warm-up
        weights = weights_of(network, _experts(found, network))
        flops: list[int] = []
        for at, load_of in enumerate(workloads):
            if weights is None:
                flops.append(0)
                continue
            flops.append(dense_flops(load_of, network))
            for of_one in work:
                given, touched = of_one[at]["expert_rows"] or 0, of_one[at]["experts_touched"] or 0
                read = load_of.passes * weights.dense_bytes + touched * weights.expert_bytes
                needed = flops[at] + 2 * given * weights.expert_elements
                of_one[at]["floor_seconds"] = machine.floor(needed, read)

        def turn(place: int) -> list[float]:
            with found[place].at_work():
                return [one.seconds(network) for one in workloads]

        with tqdm(total=settings.rounds, desc="speed", unit="round", disable=None) as bar:
            rounds = run_rounds(len(found), settings.rounds, settings.seed, turn, bar.update)
    device = network.device
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": model,
        "asked": asked_of(model, list(tasks), configurations, batch_size, settings),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(network.dtype).removeprefix("torch."),
        "load_before": list(load),
        "load_after": list(os.getloadavg()),
        "versions": {name: version(name) for name in PACKAGES},
        "matmul_flops_per_second": machine.matmul_rate,
        "bytes_per_second": machine.bandwidth,
        "native": [one.name for one in found].index(NATIVE),
        "workloads": [
            {
                "name": one.name,
                "task": one.task,
                "batch_size": one.batch_size,
                "passes": one.passes,
                "tokens": one.tokens,
                "dense_flops": flops[at],
            }
            for at, one in enumerate(workloads)
        ],
        "configurations": [one.describe() for one in found],
        "work": work,
        "rounds": rounds,
    }


def write(found: SpeedFile, file: Path) -> Path:
    """Write the results, completely or not at all."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return file


@contextmanager
def _unpatched(lm: Any) -> Iterator[None]:
    """Remove the routing of the model's own integration within the block."""
    patched = lm.integration.patched
    lm.integration.unpatch_model()
    try:
        yield
    finally:
        if patched:
            lm.integration.patch_model()


def _experts(found: Sequence[Contestant], network: Any) -> int:
    return next(one.integration.num_experts for one in found if one.integration is not None)


def _work(one: Contestant, network: Any, workloads: Sequence[Workload]) -> list[SpeedWork]:
    """Run every workload once, and count the work of its experts."""
    found: list[SpeedWork] = []
    with one.at_work() as routing, ExpertWork(network) as counted:
        for workload in workloads:
            before: list[int | None] = []

            def begin(before: list[int | None] = before) -> None:
                counted.reset()
                before.append(None if routing is None else routing.rows_computed)

            workload.seconds(network, about_to_run=begin)
            after = None if routing is None else routing.rows_computed
            computed = None if after is None or before[0] is None else after - before[0]
            found.append(
                {
                    "expert_rows": counted.rows,
                    "expert_rows_computed": computed,
                    "experts_touched": counted.touched,
                    "floor_seconds": None,
                }
            )
    return found
