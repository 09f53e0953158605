"""Starts two processes that evaluate together, as ``accelerate launch`` does."""

from __future__ import annotations

import functools
import os
import random
import socket
import subprocess
import sys

import pytest


@pytest.fixture
def launch(commands):
    """Return a function that runs a script, or ``-m`` and a module, in two processes on the CPU.

    It returns what they print. The test fails with their output if they fail or do not end.
    """
    return functools.partial(launch_by, commands / "python")


def launch_by(python, *arguments) -> str:
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--main_process_port", str(free_port())]
    variables = {"ACCELERATE_USE_CPU": "true"}
    if sys.platform == "linux":
        variables["GLOO_SOCKET_IFNAME"] = "lo"  # the name of the machine may not resolve
    command = [python, "-m", "accelerate.commands.launch", *options, *map(str, arguments)]
    try:
        done = subprocess.run(
            command, env=os.environ | variables, capture_output=True, timeout=300, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        shown = [
            (output or b"").decode(errors="replace") for output in (error.stdout, error.stderr)
        ]
        pytest.fail("\n".join([str(error), *shown]))
    return done.stdout.decode()


def free_port() -> int:
    """Return a free port that no other program gets in the meantime.

    The system hands out ports from 32768 on. accelerate would ask it for one of these
    (``--main_process_port 0``), give it back, and bind it seconds later, after torch is imported.
    """
    choose = random.SystemRandom()  # tests of other processes must not choose the same
    while True:
        port = choose.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
