"""The commands python, lm-eval-bh and lm_eval, each a fork of one process that has imported all.

A start of lm-eval-bh takes 6 seconds, nearly all of them imports, one of lm_eval 20, with the index
of 14,000 tasks, and the tests start dozens. ``warm_commands.py SOCKET`` does this once; each of its
forks then runs the whole command with the arguments, folder, environment and streams of its client.
A client stands for its fork: who sends it SIGINT, SIGTERM or SIGKILL sends it to the fork.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("python", "lm-eval-bh", "lm_eval")
CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda sent, _: server.send(bytes([sent])))
    told = json.dumps([{program!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(told).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(told)
    code = int(server.recv(8) or 1)
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture(scope="session")
def commands() -> Iterator[Path]:
    """Return the folder of the commands, which may be put on the PATH."""
    with tempfile.TemporaryDirectory() as name:  # of pytest's the path is too long for a socket
        folder = Path(name)
        address = folder / "socket"
        for program in PROGRAMS:
            text = CLIENT.format(python=sys.executable, address=str(address), program=program)
            (folder / program).write_text(text)
            (folder / program).chmod(0o755)
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

    import lm_eval_bh.cli.app
    import lm_eval_bh.harness.model
    import lm_eval_bh.harness.sweep.runner  # noqa: F401  what commands import when called
    import lm_eval_bh.speed.phase as speed
    from lm_eval_bh.cli import main
    from lm_eval_bh.harness.sweep.exact_bootstrap import exact_bootstrap

    # Where QUICK is set a bootstrap is a sweep's, and what a command starts is a fork, too.
    warm = str(Path(address).with_name("python"))

    def interpreter() -> None:
        if sys.argv[1:3] == ["-m", "pytest"]:  # which has to be the first to import anything
            os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
        sys.executable = warm
        python()

    def program() -> None:
        sys.executable = warm if "QUICK" in os.environ else sys.executable
        main()

    def lm_eval() -> None:
        with exact_bootstrap() if "QUICK" in os.environ else contextlib.nullcontext():
            harness.cli_evaluate()

    mains = dict(zip(PROGRAMS, (interpreter, program, lm_eval), strict=True))
    # Where a page does not say how much to measure, a speed phase measures as a quick sweep's does.
    measured = speed.SpeedSettings
    speed.SpeedSettings = lambda *asked: measured(*asked) if asked else speed.QUICK
    # The default tasks are indexed once; whoever asks again gets a copy.
    build = functools.cache(TaskIndex.build)
    TaskIndex.build = staticmethod(lambda paths: dict(build(tuple(paths))))
    TaskManager()
    signal.signal(signal.SIGCHLD, reap)
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


def reap(*_: object) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def answer(client: socket.socket, mains: dict) -> None:
    """Run one command in a fork, tell the client its exit code, and end."""
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    told = b""
    while len(told) < int.from_bytes(size, "big"):
        told += client.recv(1 << 16)
    program, arguments, folder, environment = json.loads(told)
    child = os.fork()
    if child:
        for stream in streams:
            os.close(stream)
        threading.Thread(target=pass_on, args=(client, child), daemon=True).start()
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(OSError):  # of a client that was killed
            client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    client.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # The server's own know what it had there: a file can be sought, a pipe cannot.
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1, closefd=False)
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
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as Python does, and with a hook that a command has set
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def pass_on(client: socket.socket, child: int) -> None:
    """Send the fork what its client is sent; a client that is gone was killed."""
    while sent := client.recv(1):
        os.kill(child, sent[0])
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def python() -> None:
    """Run what Python is asked to: ``-m module``, ``-c code``, a script, or what it reads."""
    first, *rest = (argument for argument in sys.argv[1:] if argument not in ("-u", "-I"))
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in given if path and path not in sys.path]
    sys.path[0] = os.getcwd() if first[0] == "-" else os.path.dirname(os.path.abspath(first))
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first[0] == "-":
        code = rest.pop(0) if first == "-c" else sys.stdin.read()
        sys.argv = [first, *rest]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
