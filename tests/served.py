"""A service in this process, on a port of its own, for tests."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from PIL import Image

from perpetune.serve.app import application
from perpetune.serve.server import bound
from perpetune.serve.settings import Settings


@contextlib.contextmanager
def running(folder: Path, **settings: Any) -> Iterator[tuple[httpx2.Client, Any]]:
    """A client of a service that answers until the context ends, and the service."""
    told: list[dict[str, Any]] = []
    app = application(folder, Settings(**settings), tell=lambda event, **facts: told.append({"event": event, **facts}))
    app.state.told = told
    with bound("127.0.0.1", 0) as held:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run, args=([held],))
        held.listen()  # requests wait until the server takes them
        thread.start()
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{held.getsockname()[1]}", timeout=30) as client:
                yield client, app.state
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def png(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
