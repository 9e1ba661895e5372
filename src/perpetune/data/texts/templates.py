"""Chat templates: programs of strangers that make one text of the messages of a chat.

A template is run by transformers in a process of its own, whose memory and time are bounded. Jinja's sandbox keeps a
template away from files, but not from making gigabytes or from going on for ever, and one long operation cannot be
interrupted from inside. This module is both sides: `render` asks, and `serve` answers in that process.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import partial
from typing import IO, Any

from perpetune.errors import DataError, UsageError

LONGEST = 10**7
"""Characters of the longest text that a template may make."""
SECONDS = 10
"""How long a template may take for one chat; an ordinary one takes less than a millisecond."""
MEMORY = 2**29
"""Bytes of memory that it may take, beyond those of the process itself."""
START = 60
"""Seconds that the process may take to start."""

NOW = "strftime_now"  # by which a template asks for the day
_ASKS = re.compile(NOW + r"""\s*\(\s*(?:format\s*=\s*)?(["'])((?:(?!\1)[^\\])*)\1\s*\)""")
_SIZE = struct.Struct(">Q")  # before each message between the two processes


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, asking: bool, today: date | None = None
) -> str:
    """The text that the tokenizer's chat template makes of `messages`.

    Args:
        tokenizer: of transformers; it has a chat template.
        messages: of plain values, as JSON has them.
        tools: descriptions of functions that the model may call; None if there are none.
        asking: whether an answer of the model is to follow.
        today: the day that a template is told that asks for it; None tells it the day that it is.

    Raises:
        DataError: the template refuses the messages, fails, or makes a text that is too long.
        UsageError: it takes more time or memory than a template may.
    """
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:  # it has several, and none for this
        raise DataError(f"the model's chat template refuses the messages: {error}") from error
    asked = {
        "template": template,
        "tokens": tokenizer.special_tokens_map,
        "messages": messages,
        "tools": tools,
        "asking": asking,
        "today": today.isoformat() if today is not None else None,
        "seconds": SECONDS,
    }
    found = _renderer.ask(asked)
    if "text" in found:
        return str(found["text"])
    if "length" in found:
        raise DataError(f"the model's chat template makes {found['length']} characters of the messages")
    if "refused" in found:
        raise DataError(f"the model's chat template refuses the messages: {found['refused']}")
    place = f" (of {tokenizer.name_or_path})" if tokenizer.name_or_path else ""
    raise UsageError(
        f"the model's chat template{place} {found['beyond']} for one chat: put another chat_template.jinja beside the "
        "tokenizer"
    )


class _Renderer:
    """The process in which templates run. It is started when it is needed first, and again after it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of `serve`; or `beyond`, what the process ended of."""
        content = json.dumps(asked).encode()  # in ASCII, so that half a character passes as it is
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.end()
                self._process = self._started()
            try:
                assert self._process.stdin is not None
                assert self._process.stdout is not None
                _send(self._process.stdin, content)
                return dict(json.loads(_receive(self._process.stdout)))
            except (EOFError, OSError):
                return {"beyond": _cause(self._process.wait())}
            except BaseException:  # such as Ctrl-C: an answer that nobody waits for would be taken for the next one's
                self.end()
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        # Not by the file's name: the folder of this file would then be searched for modules first.
        code = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import serve; sys.exit(serve())"
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", code, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the parent, which ends this process
            )
            assert process.stdout is not None
            ready = json.loads(_receive(process.stdout))
        except (EOFError, OSError, TypeError) as error:
            ready = {"failed": str(error) or "it ended at once"}
        if "failed" in ready:
            raise UsageError(f"chat templates run in a process of their own, and it does not start: {ready['failed']}")
        return process

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was not written is not wanted any more
                    assert pipe is not None
                    pipe.close()
            process.wait()

    def forget(self) -> None:
        """In a forked child: the process belongs to the parent."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                pipe.raw.close()  # type: ignore[union-attr]  # nothing of the parent's is written twice
            process.returncode = 0  # so that nobody waits for it here


def _cause(code: int) -> str:
    """Why the process ended, by its exit status."""
    if code == _LATE:
        return f"takes more than {SECONDS} seconds"
    return f"ends the process that it runs in (status {code}), as too much memory or depth does,"


def _send(pipe: IO[bytes], content: bytes) -> None:
    pipe.write(_SIZE.pack(len(content)) + content)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    """One message; EOFError if the other side has ended."""
    size = pipe.read(_SIZE.size)
    if len(size) == _SIZE.size:
        (expected,) = _SIZE.unpack(size)
        content = pipe.read(expected)
        if len(content) == expected:
            return content
    raise EOFError


_renderer = _Renderer()
atexit.register(_renderer.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renderer.forget)


# -- in the process of its own ------------------------------------------------------------------------------


_LATE = -signal.SIGPROF if hasattr(signal, "SIGPROF") else 1
"""How the process ends when a template takes too long."""


def _watch(seconds: int) -> None:
    """End this process after so many seconds of its own work, even in the middle of one long operation; 0 stops it."""
    if hasattr(signal, "SIGPROF"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    elif seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)  # ends it with 1
    else:
        faulthandler.cancel_dump_traceback_later()


def serve() -> int:
    """Render what comes on standard input, until it ends; the exit status of the process."""
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)  # what others print is no answer
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _watch(START)
    try:
        from transformers.tokenization_utils_base import PreTrainedTokenizerBase
        from transformers.utils import chat_template_utils

        _bound_memory()
    except Exception as error:  # noqa: BLE001  the parent says it
        _send(answers, json.dumps({"failed": str(error)}).encode())
        return 3
    _watch(0)
    _send(answers, b"{}")
    try:
        while True:
            asked = json.loads(_receive(source))
            _watch(asked["seconds"])
            content = _rendered(PreTrainedTokenizerBase, chat_template_utils, asked)
            _watch(0)
            _send(answers, content)
    except EOFError:
        return 0
    except Exception:  # noqa: BLE001  such as too little memory for the question: no template that is late
        return 3


def _rendered(base: Any, utils: Any, asked: Mapping[str, Any]) -> bytes:
    try:
        # The template's own names, which come before those of all templates: whichever way it asks, it gets this day.
        names = utils._compile_jinja_template(asked["template"]).globals
        names.pop(NOW, None)
        if asked["today"] is not None:
            names[NOW] = partial(_strftime, datetime.combine(date.fromisoformat(asked["today"]), time()))
        told = _Told(asked["template"], asked["tokens"])
        text = base.apply_chat_template(
            told, asked["messages"], tools=asked["tools"], add_generation_prompt=asked["asking"], tokenize=False
        )
        found = {"text": text} if len(text) <= LONGEST else {"length": len(text)}
        return json.dumps(found).encode()
    except MemoryError:
        found = {"beyond": f"takes more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:  # noqa: BLE001  a stranger's template may fail in any way
        found = {"refused": " ".join(str(error)[:1000].split()) or type(error).__name__}
    return json.dumps(found).encode()


def _strftime(moment: datetime, format: str) -> str:  # noqa: A002
    """As transformers' function of this name, which a template may give its one argument by name."""
    return moment.strftime(format)


class _Told:
    """What transformers asks a tokenizer for to apply a chat template."""

    def __init__(self, template: str, tokens: Mapping[str, Any]):
        self.special_tokens_map = tokens
        self._template = template

    def get_chat_template(self, *_: Any) -> str:
        return self._template


def _bound_memory() -> None:
    """Let the process take `MEMORY` more than it has, where the system can bound it (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def pinned(template: str, today: date) -> str:
    """A template with the day instead of the calls that ask for it, for programs that cannot be told the day.

    A call whose format is not written in it stays.
    """
    moment = datetime.combine(today, time())
    return _ASKS.sub(lambda call: f"{call[1]}{moment.strftime(call[2])}{call[1]}", template)
