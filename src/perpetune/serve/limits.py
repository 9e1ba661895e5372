"""The door of a service: how much comes in, how many at once, and how long. It works before a body is read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import anyio
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perpetune.serve.metrics import Metrics
from perpetune.serve.settings import Settings


class Refused(Exception):
    """A request gets the answer `status` with one line."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


def refusal(status: int, line: str) -> JSONResponse:
    """An answer that says in one line why there is no other one."""
    again = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse({"detail": " ".join(line.split())}, status, headers=again)


@dataclass(eq=False)
class _Call:
    """One request on its way: what came of its body, and whether its answer has begun."""

    receive: Receive
    send: Send
    most: int
    waits: bool
    """Whether the client asks first whether it may send the body."""
    bytes: int = 0
    complete: bool = False
    status: int = 0

    async def read(self) -> Message:
        """The next part of the body.

        Raises:
            Refused: the body is longer than it may be.
        """
        message = await self.receive()
        if message["type"] == "http.request":
            self.bytes += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            if self.bytes > self.most:
                raise Refused(413, _too_long(self.most))
        else:
            self.complete = True  # the client went away
        return message

    async def write(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if not (self.waits and not self.bytes):
                await self._drain()
            self.status = message["status"]
        await self.send(message)

    async def _drain(self) -> None:
        """Read the rest of the body and forget it: a client that writes does not look at the answer yet."""
        while not self.complete:
            message = await self.receive()
            self.complete = message["type"] != "http.request" or not message.get("more_body", False)


class Door:
    """Lets requests to `/predict` in, as far as the settings allow.

    It answers 413 if a body is too long, and 503 if too many requests are inside or one takes too long. The answer has
    one line.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        waits = headers.get(b"expect", b"").lower() == b"100-continue"
        call, began = _Call(receive, send, self.settings.max_bytes, waits), time.perf_counter()
        self.inside += 1
        self.metrics.held.set(self.inside)
        try:
            with anyio.fail_after(self.settings.timeout):
                await self._let_in(scope, headers, call)
        except TimeoutError:
            if not call.status:
                call.complete = True  # there is no time to read more of it
                line = f"there was no answer within {self.settings.timeout:g} seconds"
                await refusal(503, line)(scope, receive, call.write)
        finally:
            self.inside -= 1
            self.metrics.held.set(self.inside)
            self.metrics.requests.labels(str(call.status or "none")).inc()
            self.metrics.seconds.observe(time.perf_counter() - began)

    async def _let_in(self, scope: Scope, headers: Mapping[bytes, bytes], call: _Call) -> None:
        try:
            if self.inside > self.settings.held:
                raise Refused(503, f"{self.settings.held} requests are inside, and that is the most: try again")
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self.settings.max_bytes:
                raise Refused(413, _too_long(self.settings.max_bytes))
            await self.app(scope, call.read, call.write)
        except Refused as no:
            if not call.status:
                await refusal(no.status, str(no))(scope, call.receive, call.write)


def _too_long(most: int) -> str:
    return f"the body of the request is longer than {most} bytes, and that is the most"
