"""A headless chromium that a test drives over a pipe, by the DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--remote-debugging-pipe",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
)  # fmt: skip


class Browser:
    """One page.

    Attributes:
        console: what the page's console says, errors of its policy among them.
        asked: the addresses that the page has asked for.
    """

    def __init__(self, write: int, read: int):
        self.read = os.fdopen(read, "rb", buffering=0)
        self.write = os.fdopen(write, "wb", buffering=0)
        self.console: list[str] = []
        self.asked: list[str] = []
        self._number, self._rest, self._session = 0, b"", ""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        self._number += 1
        request = {"id": self._number, "method": method, "params": params}
        request |= {"sessionId": self._session} if self._session else {}
        self.write.write(json.dumps(request).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self.read.read(1 << 16)
            assert part, "chromium has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.console.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        return message

    def go(self, url: str, width: int = 1300, height: int = 900, dark: bool = False) -> None:
        """Show a page, and wait until it is there."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.value("window.before = true")  # the old page is complete, too, until the new one comes
        self("Page.navigate", url=url)
        self.until("!window.before && document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it gives."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 20) -> Any:
        """The value of an expression, once it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.value(expression):
                return found
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s: {expression}")

    def shoot(self, path: Path) -> None:
        """Write what the page looks like as a PNG."""
        shot = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browsing(chromium: str, profile: Path) -> Iterator[Browser]:
    """A browser that ends with the context."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()

    def give() -> None:  # chromium reads from 3 and writes to 4
        spare_in, spare_out = os.dup(theirs_in), os.dup(theirs_out)
        while min(spare_in, spare_out) < 5:
            spare_in, spare_out = os.dup(spare_in), os.dup(spare_out)
        os.dup2(spare_in, 3)
        os.dup2(spare_out, 4)

    process = subprocess.Popen(
        [chromium, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=give,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        process.terminate()
        process.wait(20)
