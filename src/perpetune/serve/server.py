"""A service on a port of this machine, until a signal ends it."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from perpetune.errors import UsageError
from perpetune.runtime import Progress
from perpetune.serve.app import Tell, application
from perpetune.serve.settings import Settings

KEEP_ALIVE = 75  # seconds that a connection without a request stays open


def serve(
    folder: str | Path,
    settings: Settings | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    tell: Tell = lambda event, **facts: None,
    progress: Progress | None = None,
) -> None:
    """Answer requests until SIGTERM or SIGINT comes. Then no new request is taken, and those inside are answered.

    Args:
        folder: the state folder. Other processes may go on with it.
        settings: the bounds.
        host: the address to listen at. There is no authentication: whoever reaches the address can ask.
        port: 0 takes a free one.
        tell: is called with `serving` (`url`, `state`, `task`) as soon as requests are answered, with `taken` and
            `behind` as in `application`, and with `stopped` at the end.
        progress: gets the notes of loading.

    Raises:
        UsageError: the port is in use or cannot be used, or the state's model does not answer for pictures.
        StateError: the folder is no state, or it is damaged.
    """
    settings = settings or Settings()
    with bound(host, port) as held:  # before the model is loaded, which takes long
        app = application(folder, settings, tell=tell, progress=progress)
        config = uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=round(settings.timeout) + 5,
        )
        served = app.state.service.models.current
        where = f"[{host}]" if ":" in host else host
        url = f"http://{where}:{held.getsockname()[1]}"
        server = _Server(config, lambda: tell("serving", url=url, state=served.number, task=served.task))
        try:
            server.run([held])
        except OSError as error:  # two processes can bind an address as long as none of them listens
            raise _unusable(host, port, error) from None
    tell("stopped")


def bound(host: str, port: int) -> socket.socket:
    """A socket at that address that does not listen yet, so that nobody waits for a model that is being loaded.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(f"--host {host}: {getattr(error, 'strerror', None) or error}") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise _unusable(host, port, error) from None
    return found


def _unusable(host: str, port: int, error: OSError) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(f"port {port} of {host} is in use: choose another --port, or 0 for a free one")
    return UsageError(f"port {port} of {host} cannot be used: {error.strerror}")


class _Server(uvicorn.Server):
    """uvicorn's server that ends well after a signal, where uvicorn would raise the signal once more."""

    def __init__(self, config: uvicorn.Config, started: Any):
        super().__init__(config)
        self._told = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._told()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
