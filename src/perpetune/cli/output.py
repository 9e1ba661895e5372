"""Standard output that never stops work: text that cannot be encoded is replaced, and lost output loses no learning."""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TextIO, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")

SIMPLER = {
    "▲": "+", "▼": "-", "−": "-", "–": "-", "±": "+-", "×": "x", "·": ".", "…": "...", "→": "->", "←": "<-", "’": "'",
    "“": '"', "”": '"', "≥": ">=", "≤": "<=", "≠": "!=", "²": "^2", "½": "1/2", "‖": "|", "∞": "inf",
}  # fmt: skip
"""Signs of our own texts, with what stands for them where the output's encoding lacks them."""

HANDLER = "perpetune"


def _simpler(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what an encoding lacks: our signs by simpler ones, anything else (names of classes, file names) by the
    escape `\\uXXXX`, which still says which one it is."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(SIMPLER.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


codecs.register_error(HANDLER, _simpler)


def encode_anything() -> None:
    """Let both streams take any text in any encoding: a pipe on Windows has cp1252, `LANG=C` may mean ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a stream that was put into the place of another one
                stream.reconfigure(errors=HANDLER)


def encodable(text: str) -> bool:
    """Whether standard output can hold the text as it is."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def escaped(text: str) -> str:
    """The text with an escape `\\uXXXX` for each letter that the encoding of standard output lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Steady:
    """A stream that drops what can no longer be written, because the reader has ended or the disk is full.

    Args:
        stream: where the text goes.

    Attributes:
        lost: why text could not be written; None if all of it was.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.lost: str | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text if encodable(text) else self._simpler(text)))
        return len(text)

    def _simpler(self, text: str) -> str:
        encoding = self.stream.encoding or "utf-8"
        return text.encode(encoding, HANDLER).decode(encoding)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        if self.lost is not None:
            return
        try:
            act()
        except OSError as error:
            self.lost = error.strerror or str(error)
            drop(self.stream)

    def __getattr__(self, name: str) -> Any:  # `encoding`, `isatty`, `fileno`
        return getattr(self.stream, name)


def drop(stream: TextIO) -> None:
    """Send what is still in the stream's buffer nowhere, or Python would fail with it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def steady(verb: Callable[P, R]) -> Callable[P, R]:
    """A verb that changes a state: its result stands, and its exit code is 0, even if nobody can read its output.

    A scheduler that saw exit code 1 after the commit would learn the same data again.
    """

    @functools.wraps(verb)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        out = Steady(sys.stdout)
        with contextlib.redirect_stdout(cast("TextIO", out)):
            try:
                result = verb(*args, **kwargs)
            finally:
                out.flush()
        if out.lost is not None:
            with contextlib.suppress(OSError):
                print(f"perpetune: the work is done, but its output could not be written: {out.lost}", file=sys.stderr)
        return result

    return guarded
