"""Random generators. Each has a seed made from its purpose; nothing draws from the global generators.

A seed is a hash of words and numbers that describe the purpose, such as `(0, "task", 3, "order", "epoch", 2)`. So a
resumed run draws the same numbers, and its checkpoints need not store any random state.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator

import numpy as np
import torch


def seed_of(*purpose: int | str) -> int:
    """A 63-bit seed for the given words and numbers. It is the same on every machine."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in purpose)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*purpose: int | str) -> torch.Generator:
    """A torch generator on the CPU with the seed `seed_of(*purpose)`."""
    return torch.Generator().manual_seed(seed_of(*purpose))


def numpy_generator(*purpose: int | str) -> np.random.Generator:
    """A numpy generator with the seed `seed_of(*purpose)`."""
    return np.random.default_rng(seed_of(*purpose))


@contextlib.contextmanager
def own_global_state(*purpose: int | str) -> Iterator[None]:
    """Inside this context, torch's global generator has the seed `seed_of(*purpose)`; afterwards its old state is back.

    Some code can draw from the global generator only, such as a module's constructor or dropout.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        _seed(seed_of(*purpose))
        yield


def _seed(seed: int) -> None:
    """Seed torch's global generators.

    Even where the CPU is the only device, `torch.manual_seed` remembers the seed, with a stack trace, for each kind of
    device that could become available later. The trace takes up to a millisecond, and `fit` sets a seed in each step.
    """
    if _only_cpu():
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@functools.cache
def _only_cpu() -> bool:
    return hasattr(torch, "accelerator") and not torch.accelerator.is_available()  # torch 2.5 has no torch.accelerator
