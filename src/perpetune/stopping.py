"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perpetune.runtime import Runtime


def stopping_signals() -> list[int]:
    """The signals that ask a run to stop; without SIGHUP if it is ignored (under nohup) or unknown (on Windows)."""
    hangup = getattr(signal, "SIGHUP", None)
    heard = hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([hangup] if hangup is not None and heard else [])]


@contextlib.contextmanager
def stop_signals(runtime: Runtime) -> Iterator[None]:
    """In this context, SIGTERM, SIGINT and SIGHUP ask the run to stop at the next step; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in stopping_signals()}

    def ask(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number] or signal.SIG_DFL)

    for number in before:
        signal.signal(number, ask)
    runtime.stopping = lambda: received[0] if received else None
    try:
        yield
    finally:
        runtime.stopping = lambda: None
        for number, handler in before.items():
            signal.signal(number, handler)
