"""The batches of any training loop: on a device, up to a number of examples, in step with other processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.protection.renewal import cut
from perpetune.protection.sites import unseen


def shared(batches: Iterable[Any], device: torch.device, samples: int | Literal["all"]) -> Iterable[Any]:
    """`batches` on `device`, up to `samples` examples in their order. The result for an iterator is an iterator.

    The last batch is cut if all its tensors have one row for each example; otherwise it is used whole.
    """
    if isinstance(batches, Iterator):
        return _moved(batches, device, samples)
    return _Again(batches, device, samples)


class _Again:
    """Batches on a device that can be read as often as the original ones."""

    def __init__(self, batches: Iterable[Any], device: torch.device, samples: int | Literal["all"]):
        self.batches, self.device, self.samples = batches, device, samples

    def __iter__(self) -> Iterator[Any]:
        return _moved(self.batches, self.device, self.samples)


def _moved(batches: Iterable[Any], device: torch.device, samples: int | Literal["all"]) -> Iterator[Any]:
    seen = 0
    for batch in batches:
        size = _size(batch)
        if samples != "all" and seen + size > samples and _even(batch, size):
            batch = _first(batch, samples - seen)
        yield _to(batch, device)
        seen += size
        if samples != "all" and seen >= samples:
            return


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_to(value, device) for value in batch]
    return batch


def _size(batch: Any) -> int:
    """The number of examples in a batch: the length of its first tensor, or 1."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        batch = next((value for value in batch if isinstance(value, Tensor)), None)
    return len(batch) if isinstance(batch, Tensor) and batch.dim() else 1


def _even(batch: Any, size: int) -> bool:
    """Whether the batch consists of tensors with one row for each example and of nothing else."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        return all(_even(value, size) for value in batch)
    return isinstance(batch, Tensor) and batch.dim() > 0 and len(batch) == size


def _first(batch: Any, examples: int) -> Any:
    """The first examples of a batch, for which `_even` is true."""
    if isinstance(batch, Mapping):
        return {key: _first(value, examples) for key, value in batch.items()}
    return [_first(value, examples) for value in batch] if isinstance(batch, (tuple, list)) else batch[:examples]


def in_step(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], object]) -> Iterable[Any]:
    """The batches, and behind them passes that other processes need: where the frozen parameters of a model are
    sharded, each process has to call it as often as the others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return batches
    if not any(cut(p) for p in model.parameters()):
        return batches
    stepped = _InStep(batches, forward, next(model.parameters()).device)
    return iter(stepped) if isinstance(batches, Iterator) else stepped


class _InStep:
    """Batches of a process that goes on calling the model, unseen, while other processes still have some.

    Before each batch the processes tell each other who has one.
    """

    def __init__(self, batches: Iterable[Any], forward: Callable[[Any], object], device: torch.device):
        self.batches, self.forward, self.device = batches, forward, device

    def __iter__(self) -> Iterator[Any]:
        last: Any = None
        rest = iter(self.batches)
        for first in itertools.chain([True], itertools.repeat(False)):
            batch = next(rest, None)
            have = torch.tensor([float(batch is not None), 1.0], device=self.device)
            torch.distributed.all_reduce(have)
            some, all_ = have.tolist()
            if first and 0 < some < all_:
                raise UsageError(
                    f"protect: {int(all_ - some)} of {int(all_)} processes have no batch, and a sharded model is "
                    "called by all of them together: give each at least one"
                )
            if not some:
                return
            if batch is None:
                with unseen():
                    self.forward(last)
            else:
                last = batch
                yield batch


def summed(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value
