"""How exact products of matrices are: the one place that sets it, for passes of a model and for what must stay exact.

Torch knows two shortcuts. Autocast computes in 16 bits. TF32 computes float32 products on NVIDIA GPUs with 10 bits of
mantissa instead of 23. Both are for passes through a model. Sums over examples, solutions of equations, distances and
the projection of steps lose too much by them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Inside this context products on `device` are computed in the type of their inputs, whatever is around it."""
    # A device without autocast, such as one of another package, has nothing to turn off.
    known = torch.amp.is_autocast_available(device.type)
    with contextlib.ExitStack() as stack:
        if known:
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type != "cpu":  # reading torch's switches takes some microseconds
            stack.enter_context(shortened(False))
        yield


@contextlib.contextmanager
def shortened(allowed: bool) -> Iterator[None]:
    """Inside this context float32 products and convolutions on NVIDIA GPUs are in TF32, or are not.

    The switch belongs to the process, not to a thread: a backward pass and its hooks see it too.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    if before == (allowed, allowed):
        yield
        return
    matmul.allow_tf32, cudnn.allow_tf32 = allowed, allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
