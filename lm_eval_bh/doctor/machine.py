"""Examines this machine: devices, the hub, caches."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lm_eval_bh.doctor.finding import NOTE, PROBLEM, Finding
from lm_eval_bh.resources import cache_folder

REACH_SECONDS = 3.0
LITTLE = 5e9  # free bytes on a disk


def check_devices() -> Iterator[Finding]:
    """Yield the devices that models can run on."""
    import torch

    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    yield Finding("cpu", threads)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            yield Finding(
                f"cuda:{index}",
                f"{found.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, bfloat16 "
                f"{'yes' if torch.cuda.is_bf16_supported() else 'no'}",
            )
    elif torch.version.cuda is not None:
        yield Finding(
            "cuda",
            f"torch is built for CUDA {torch.version.cuda}, but sees no device",
            NOTE,
            "check nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding(
            "cuda",
            f"none: torch {torch.__version__} is built without it",
            NOTE,
            "with a GPU, install the torch for it: pytorch.org/get-started",
        )
    if torch.backends.mps.is_available():
        yield Finding(
            "mps", "there is one", NOTE, "the tests run on the CPU: compare a few documents"
        )


def check_hub() -> Iterator[Finding]:
    """Yield whether the hub is reachable."""
    from huggingface_hub import constants, get_session

    offline = [
        name
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
        if os.environ.get(name, "").upper() in constants.ENV_VARS_TRUE_VALUES
    ]
    if offline:
        yield Finding(
            "hub",
            f"offline, by {' and '.join(offline)}: only what is in the caches",
            NOTE,
            f"unset {' '.join(offline)} to download",
        )
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
    except Exception as error:  # errors of its HTTP library
        yield Finding(
            "hub",
            f"{constants.ENDPOINT} does not answer ({type(error).__name__})",
            NOTE,
            "without network set HF_HUB_OFFLINE=1; tiny-olmoe and bh_demo need none",
        )
        return
    yield Finding("hub", f"{constants.ENDPOINT} answers")


def check_caches() -> Iterator[Finding]:
    """Yield the caches with their sizes, and the free space of their disks."""
    import datasets
    from huggingface_hub import constants

    for name, folder in (
        ("hub cache", Path(constants.HF_HUB_CACHE)),
        ("data sets", Path(datasets.config.HF_DATASETS_CACHE)),
        ("null models", cache_folder()),
    ):
        yield _check_folder(name, folder)


def _check_folder(name: str, folder: Path) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not _can_be_made(there):
        remedy = "set HF_HOME or XDG_CACHE_HOME to a folder that you can write to"
        return Finding(name, f"{folder} cannot be written to", PROBLEM, remedy)
    found = "nothing yet"
    if folder.exists():
        files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        size = sum(path.stat().st_size for path in files)
        found = f"{len(files)} files, {_size(size)}"
    text = f"{folder}: {found}, {_size(free)} free on the disk"
    if free < LITTLE:
        return Finding(name, text, NOTE, "free some space before a large model loads")
    return Finding(name, text)


def _can_be_made(folder: Path) -> bool:
    """Return whether a folder can be made in another: permissions alone do not tell."""
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return True
    except OSError:
        return False


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
