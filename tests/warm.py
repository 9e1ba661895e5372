"""Python programs that begin with torch and transformers imported: forks of one process that has done it for all.

A new interpreter takes six seconds until a run begins. `Warm.command` stands for `sys.executable` before `-m MODULE`
or the path of a script; what it starts is a process of its own in every other way:

    subprocess.Popen([*warm.command, "-m", "perpetune", "resume", folder])

The command is a small client. It gives the server its standard streams, arguments, environment and folder, passes
signals on to the fork, and ends as the fork ends. Where the client is killed, so is the fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NoReturn

MODULES = (
    "accelerate.commands.launch",
    "perpetune.cli.live",
    "perpetune.learner",
    "perpetune.methods.finetune",
    "perpetune.report",
    "perpetune.models.causal_lm",
    "sklearn.datasets",
    "torch.distributed.fsdp",
    "torch.optim.adamw",
    "transformers.models.llama.modeling_llama",
    "transformers.models.vit.modeling_vit",
)


class Warm:
    """The server; `command` is the beginning of a command line."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="warm")  # the path of a socket has about 100 characters
        door = os.path.join(self.folder.name, "door")
        self.command = [sys.executable, "-S", "-E", __file__, "client", door]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "server", door], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def close(self) -> None:
        with self.process, self.folder:  # closes the server's input, which ends it, and waits
            pass


# -- the client, which imports nothing that is slow ---------------------------------------------------------


def client(door: str, arguments: list[str]) -> NoReturn:
    link = socket.socket(socket.AF_UNIX)
    link.connect(door)
    socket.send_fds(link, [b"."], [0, 1, 2])
    link.sendall(json.dumps([arguments, dict(os.environ), os.getcwd()]).encode() + b"\n")
    for stream in (0, 1, 2):  # whoever listens to them hears their end from the fork
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    answer = link.makefile()
    fork = int(answer.readline())
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda signum, frame: os.kill(fork, signum))
    code = int(answer.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# -- the server ---------------------------------------------------------------------------------------------


def server(door: str) -> None:
    import gc
    import importlib

    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # else every fork's first collection copies all pages
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(door)
    listening.listen()
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    signal.set_wakeup_fd(wake.fileno())
    links: dict[int, socket.socket] = {}  # to the client of each fork
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([0, listening, woken, *links.values()], [], [])
        if 0 in ready:  # whoever started this process has gone
            return
        if woken in ready:
            woken.recv(1024)
            for fork, code in _ended():
                if fork in links:
                    _send(links[fork], code)
                    links.pop(fork).close()
        for fork in [fork for fork, link in links.items() if link in ready]:  # its client was killed
            os.kill(fork, signal.SIGKILL)
            links.pop(fork).close()
        if listening in ready:
            link, _ = listening.accept()
            _, streams, _, _ = socket.recv_fds(link, 1, 3)
            with link.makefile() as request:
                arguments, environment, folder = json.loads(request.readline())
            fork = os.fork()
            if fork == 0:
                for other in (listening, woken, wake, link, *links.values()):
                    other.close()
                _become(arguments, environment, folder, streams)
            for stream in streams:
                os.close(stream)
            links[fork] = link
            _send(link, fork)


def _ended() -> Iterator[tuple[int, int]]:
    """The forks that have ended since the last call, with their exit codes."""
    with contextlib.suppress(ChildProcessError):  # there is none any more
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended[0], os.waitstatus_to_exitcode(ended[1])


def _send(link: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # its client was killed
        link.sendall(f"{number}\n".encode())


def _become(arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> NoReturn:
    """Be `python ARGUMENTS` in this fork."""
    import runpy
    import traceback

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    for stream, standard in zip(streams, (0, 1, 2), strict=True):
        os.dup2(stream, standard)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[1:1] = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    os.chdir(folder)
    code: Any = 0
    try:
        if arguments[0] == "-m":
            sys.path[0], sys.argv = "", arguments[1:]
            sys.modules.pop(arguments[1], None)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = os.path.dirname(arguments[0]), arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001  as an interpreter does
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    if sys.argv[1] == "client":
        client(sys.argv[2], sys.argv[3:])
    server(sys.argv[2])
