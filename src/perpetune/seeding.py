"""All randomness comes from generators seeded by what they are for, never from the global ones.

A seed is a hash of words and numbers such as `(0, "task", 3, "order", "epoch", 2)`, so a resumed
run draws the same numbers without any random state in its checkpoints.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator

import numpy as np
import torch


def seed_of(*purpose: int | str) -> int:
    """A 63-bit seed, the same on every machine, for the given words and numbers."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in purpose)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*purpose: int | str) -> torch.Generator:
    """A CPU torch generator seeded by `seed_of(*purpose)`."""
    return torch.Generator().manual_seed(seed_of(*purpose))


def numpy_generator(*purpose: int | str) -> np.random.Generator:
    """A numpy generator seeded by `seed_of(*purpose)`."""
    return np.random.default_rng(seed_of(*purpose))


@contextlib.contextmanager
def own_global_state(*purpose: int | str) -> Iterator[None]:
    """Code that can only draw from torch's global generator (a constructor, dropout) draws here from
    a seeded one; the caller's global state is untouched afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        _seed(seed_of(*purpose))
        yield


def _seed(seed: int) -> None:
    """Seed torch's global generators.

    Where the CPU is the only device, `torch.manual_seed` still notes the seed, with a stack trace, for each kind of
    device that could begin to work later. The trace takes up to a millisecond, and `fit` seeds each of its steps.
    """
    if _only_cpu():
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@functools.cache
def _only_cpu() -> bool:
    return hasattr(torch, "accelerator") and not torch.accelerator.is_available()  # torch 2.5 has no torch.accelerator
