"""Numbers that pass between the program and its device, so that neither waits for the other.

Work on a GPU is queued. A copy of the usual kind waits until everything queued before it is done; meanwhile nothing new
is queued, and then the GPU waits for the program. The functions here copy without that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BEHIND = 2  # `Arrivals` waits for older ones, so that memory does not grow


def sent(values: Sequence[Any] | Tensor, device: torch.device | str | None, dtype: torch.dtype | None = None) -> Tensor:
    """`values` as a tensor on `device`, without a wait. A tensor of the CPU may be changed afterwards: CUDA has read it
    when the call returns."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return tensor if device is None else tensor.to(device, non_blocking=True)


class Arrivals:
    """Tensors that are worked on by the CPU in the order in which they were put in, each when it has arrived.

    So a pass of a model over batches does not stop after each batch until the CPU has its features.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Late, ...]] = []

    def put(self, *tensors: Tensor) -> None:
        """Let these tensors come; they must not be changed afterwards."""
        self._open.append(tuple(map(Late, tensors)))

    def take(self, *, all: bool = False) -> Iterator[tuple[Tensor, ...]]:  # noqa: A002
        """What was put in together, on the CPU, and is taken out with that: what has arrived, or all of it."""
        while self._open and (all or len(self._open) > BEHIND or self._open[0][-1].ready):
            yield tuple(late.read() for late in self._open.pop(0))

    def clear(self) -> None:
        """Drop what was not taken."""
        self._open = []


class Late:
    """A tensor whose values are read on the CPU later, when the device has long computed them.

    The copy is queued when the object is made. Reading it waits for this copy only, not for what was queued afterwards.

    Args:
        tensor: not changed until it is read.
    """

    def __init__(self, tensor: Tensor):
        self._given = tensor.detach()
        self._copied: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._given = self._given.to("cpu", non_blocking=True)  # torch takes pinned memory for this
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    @property
    def here(self) -> bool:
        """Whether the values were on the CPU from the start, or have been read."""
        return self._copied is None and self._given.device.type == "cpu"

    @property
    def ready(self) -> bool:
        """Whether a read would not wait now."""
        return self.here or (self._copied is not None and bool(self._copied.query()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Late:
        return Late(self.read())

    def read(self) -> Tensor:
        """The values, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        self._given = self._given.cpu()
        return self._given
