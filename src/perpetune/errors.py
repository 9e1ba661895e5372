"""Errors a user sees: one line that says what is wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PerpetuneError(Exception):
    """The work failed; the command line prints the message alone and exits with `exit_code`."""

    exit_code = 1


class UsageError(PerpetuneError):
    """What was asked for makes no sense: a recipe, an option or an argument is wrong."""

    exit_code = 2


class DataError(PerpetuneError):
    """The user's data cannot be used as they are."""


class StateError(PerpetuneError):
    """A state folder is torn, foreign, or does not fit what is asked of it."""


class MissingExtra(PerpetuneError):
    """An optional dependency is not installed.

    Args:
        what: what needs it, as the user named it.
        extra: the extra of perpetune that brings it.
    """

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} needs a package that is not installed: pip install 'perpetune[{extra}]'")


class Interrupted(PerpetuneError):
    """Stopped by a signal after a checkpoint was written."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


def closest(name: str, known: Iterable[str], n: int = 3) -> str:
    """A tail for an error about an unknown `name`: the `n` most similar known names."""
    names = sorted(set(known))
    if len(names) <= n:
        return f"one of {', '.join(names)}" if names else "there is none"
    near = difflib.get_close_matches(name, names, n=n, cutoff=0.0)
    return f"closest: {', '.join(near)}"


def out_of_memory(error: RuntimeError) -> str:
    """What to say where the memory of the device was too small; empty where that is not what is wrong."""
    if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for it
        return ""
    cure = "lower evaluate.batch_size or backbone.max_length, raise train.accumulate, or take a smaller backbone.dtype"
    return f"{str(error).splitlines()[0].rstrip('.')}: {cure}"
