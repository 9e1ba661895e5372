"""Errors that a user sees. Each is one line that says what is wrong, where it is, and how to correct it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class PerpetuneError(Exception):
    """The base of all errors. The command line prints only the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(PerpetuneError):
    """A recipe, an option or an argument is wrong."""

    exit_code = 2


class DataError(PerpetuneError):
    """The user's data cannot be used as they are."""


class StateError(PerpetuneError):
    """A state folder is damaged, belongs to something else, or does not allow what the user wants to do with it."""


class HubError(PerpetuneError):
    """The hub cannot be reached, refuses, or holds something else than what was asked for. Nothing was changed."""


class MissingExtra(PerpetuneError):
    """An optional dependency is not installed.

    Args:
        what: the thing that needs the dependency, as the user named it.
        extra: the extra of perpetune that installs the dependency.
    """

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} needs a package that is not installed: pip install 'perpetune[{extra}]'")


class Refused(PerpetuneError):
    """The gate did not let what an update has learned become the state, which is as it was.

    Args:
        message: one line that says why, and what would pass.
        gate: what the gate has measured and decided (`perpetune.gate.judge`).
        now: the results document of the state.
        candidate: the results document that the state would have now.
    """

    exit_code = 3

    def __init__(self, message: str, gate: dict[str, Any], now: dict[str, Any], candidate: dict[str, Any]):
        super().__init__(message)
        self.gate, self.now, self.candidate = gate, now, candidate


class Interrupted(PerpetuneError):
    """A signal stopped the work, after a checkpoint was written."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


def quoted(name: str, most: int = 100) -> str:
    """A name in quotes; of a longer one its beginning and its length."""
    return repr(name) if len(name) <= most else f"{name[:most]!r}… ({len(name):,} characters)"


def closest(name: str, known: Iterable[str], n: int = 3) -> str:
    """The end of an error message about an unknown `name`: the `n` known names that are most similar to it."""
    names = sorted(set(known))
    if len(names) <= n:
        return f"one of {', '.join(names)}" if names else "there is none"
    near = difflib.get_close_matches(name, names, n=n, cutoff=0.0)
    return f"closest: {', '.join(near)}"


def out_of_memory(error: RuntimeError) -> str:
    """The message for an error about too little device memory; an empty string for any other error."""
    if type(error).__name__ != "OutOfMemoryError":  # the class is torch's; this module does not import torch
        return ""
    cure = "lower evaluate.batch_size or backbone.max_length, raise train.accumulate, or take a smaller backbone.dtype"
    return f"{str(error).splitlines()[0].rstrip('.')}: {cure}"
