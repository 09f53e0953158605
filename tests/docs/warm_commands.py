"""The commands lm-eval-bh and lm_eval, each forked from one process that has imported everything.

A start of lm_eval takes 20 seconds, nearly all for imports and the index of 14,000 tasks, and the
pages have dozens of commands. ``warm_commands.py SOCKET`` does this once; each of its forks then
runs the whole command with the arguments, folder, environment and streams of its client.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("lm-eval-bh", "lm_eval")
CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    told = json.dumps([{program!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(told).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(told)
    code = server.recv(1)
sys.exit(code[0] if code else 1)
"""


@contextmanager
def warm_commands(folder: Path) -> Iterator[Path]:
    """Serve the commands from a folder that is to be put on the PATH."""
    import subprocess

    address = folder / "socket"
    for program in PROGRAMS:
        text = CLIENT.format(python=sys.executable, address=str(address), program=program)
        (folder / program).write_text(text)
        (folder / program).chmod(0o755)
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    command = [sys.executable, __file__, str(address)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield folder
        finally:
            server.terminate()


def serve(address: str) -> None:
    """Import everything, and run what clients ask for, until killed."""
    from torch.utils import collect_env

    # What lm_eval puts into every results file: it lists all packages, which takes seconds.
    described = collect_env.get_pretty_env_info()
    collect_env.get_pretty_env_info = lambda: described

    import lm_eval.__main__ as harness
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import TaskIndex

    import lm_eval_bh.cli.app as ours
    import lm_eval_bh.harness.model
    import lm_eval_bh.harness.sweep.runner  # noqa: F401  what commands import when called
    import lm_eval_bh.speed.phase as speed

    mains = dict(zip(PROGRAMS, (ours.main, harness.cli_evaluate), strict=True))
    # Where a page does not say how much to measure, a speed phase measures as a quick sweep's does.
    measured = speed.SpeedSettings
    speed.SpeedSettings = lambda *asked: measured(*asked) if asked else speed.QUICK
    # The default tasks are indexed once; whoever asks again gets a copy.
    build = functools.cache(TaskIndex.build)
    TaskIndex.build = staticmethod(lambda paths: dict(build(tuple(paths))))
    TaskManager()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(client, mains)
            client.close()


def answer(client: socket.socket, mains: dict) -> None:
    """Run one command in a fork, tell the client its exit code, and end."""
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    told = b""
    while len(told) < int.from_bytes(size, "big"):
        told += client.recv(1 << 16)
    program, arguments, folder, environment = json.loads(told)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        client.sendall(bytes([min(255, abs(os.waitstatus_to_exitcode(status)))]))
        os._exit(0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    # The server's own know what it had there: a file can be sought, a pipe cannot.
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [program, *arguments]
    code: int | str | None = 1
    try:
        mains[program]()
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as Python does, and with a hook that a command has set
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    serve(sys.argv[1])
