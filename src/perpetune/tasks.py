"""A task: its data, its classes by name, and the place it runs in. Everything above speaks in these."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from perpetune.errors import DataError
from perpetune.runtime import Runtime
from perpetune.seeding import generator, seed_of


@dataclass(frozen=True)
class Batch:
    """Some examples of one task.

    Attributes:
        inputs: what the model reads; images are uint8 `(B, 3, H, W)`, not normalised.
        targets: int64 `(B,)`, positions in the task's `classes`.
        numbers: int64 `(B,)`, positions among the examples it was loaded from; on the CPU.
    """

    inputs: Tensor
    targets: Tensor
    numbers: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def pin_memory(self) -> Batch:
        """Called by torch's loader, so that the copy to a GPU need not wait."""
        return Batch(self.inputs.pin_memory(), self.targets.pin_memory(), self.numbers)

    def to(self, device: torch.device) -> Batch:
        inputs, targets = (t.to(device, non_blocking=True) for t in (self.inputs, self.targets))
        return Batch(inputs, targets, self.numbers)


class Examples(Protocol):
    """Labelled examples that are loaded one at a time.

    Where they have an attribute `deterministic` that is true, the seed of `load` changes nothing.
    """

    @property
    def targets(self) -> Sequence[int]:
        """Position of each example's label in the task's `classes`."""

    def __len__(self) -> int: ...

    def load(self, index: int, seed: int | None) -> Tensor:
        """Example `index` as the model reads it; augmented by `seed`, or as for evaluation when None."""


def deterministic(examples: Examples) -> bool:
    """Whether each of them is the same whenever it is loaded, so that what was computed of it can be kept."""
    return bool(getattr(examples, "deterministic", False))


@dataclass(frozen=True)
class Task:
    """One step of a stream.

    Attributes:
        index: position in the stream, from 0.
        name: unique in the stream; letters, digits, `.`, `_` and `-` only.
        classes: names of the labels that occur, in a fixed order; `Batch.targets` point into it.
        train, validation, test: the data; validation is cut from train, never from test.
        earlier: the tasks before this one, only where the run may keep their data (method `joint`).
        runtime: where and how it runs: seed, device, workers, checkpoints, progress.
    """

    index: int
    name: str
    classes: tuple[str, ...]
    train: Examples
    validation: Examples | None = None
    test: Examples | None = None
    earlier: tuple[Task, ...] | None = None
    runtime: Runtime = field(default_factory=Runtime)

    def seed_of(self, *purpose: int | str) -> int:
        return seed_of(self.runtime.seed, "task", self.index, *purpose)

    def generator(self, *purpose: int | str) -> torch.Generator:
        """A generator of this task's own, for the purpose named."""
        return generator(self.runtime.seed, "task", self.index, *purpose)

    def batches(self, size: int) -> Iterator[Batch]:
        """The training data once, in order, in the evaluation transform, on the run's device.

        On several processes each sees its own share: sum what you collect with `runtime.sum`.
        """
        return evaluation_batches(self.train, size, self.runtime)


class Part:
    """Some of the `examples`, by their numbers."""

    def __init__(self, examples: Examples, numbers: Sequence[int]):
        self.examples, self.numbers = examples, numbers
        self.targets = [examples.targets[i] for i in numbers]
        self.deterministic = deterministic(examples)

    def __len__(self) -> int:
        return len(self.numbers)

    def load(self, index: int, seed: int | None) -> Tensor:
        return self.examples.load(self.numbers[index], seed)


def balanced(examples: Examples, count: int, generator: torch.Generator) -> Examples:
    """`count` of the examples drawn by `generator`, balanced over their targets, in their order; or all."""
    if count >= len(examples):
        return examples
    turns: dict[int, int] = {}
    order = []  # round by round: the first of each class, the second of each, …
    for i in torch.randperm(len(examples), generator=generator).tolist():
        target = examples.targets[i]
        turns[target] = turns.get(target, 0) + 1
        order.append((turns[target], i))
    return Part(examples, sorted(i for _, i in sorted(order, key=lambda pair: pair[0])[:count]))


class _Requests(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Examples addressed by (index, seed), so that a loader process needs no state of its own."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, request: tuple[int, int | None]) -> tuple[Tensor, int, int] | str:
        index, seed = request
        try:
            return self.examples.load(index, seed), self.examples.targets[index], index
        except DataError as error:
            return str(error)  # torch would wrap an exception of a loader process in a page of traceback


def _collate(items: list[tuple[Tensor, int, int] | str]) -> Batch | str:
    loaded = [item for item in items if not isinstance(item, str)]
    if len(loaded) < len(items):
        return next(item for item in items if isinstance(item, str))
    inputs, targets, numbers = zip(*loaded, strict=True)
    return Batch(
        torch.stack(inputs), torch.tensor(targets, dtype=torch.int64), torch.tensor(numbers, dtype=torch.int64)
    )


def load_batches(
    examples: Examples, requests: Sequence[Sequence[tuple[int, int | None]]], runtime: Runtime
) -> Iterator[Batch]:
    """The batches named by `requests`, each a list of (index, seed), on the run's device.

    Raises:
        DataError: an example cannot be loaded; names it.
    """
    loader: torch.utils.data.DataLoader[Batch | str] = torch.utils.data.DataLoader(
        _Requests(examples),
        batch_sampler=requests,  # type: ignore[arg-type]
        num_workers=runtime.workers,
        collate_fn=_collate,
        pin_memory=runtime.device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # else the loader draws from the global generator
        multiprocessing_context="fork" if runtime.workers and sys.platform == "linux" else None,  # starts at once
    )
    for batch in loader:
        if isinstance(batch, str):
            raise DataError(batch)
        yield batch.to(runtime.device)


def evaluation_batches(examples: Examples, size: int, runtime: Runtime) -> Iterator[Batch]:
    """This process's share of `examples`, in order, in the evaluation transform."""
    mine = range(runtime.rank, len(examples), runtime.world)
    requests = [[(i, None) for i in mine[s : s + size]] for s in range(0, len(mine), size)]
    return load_batches(examples, requests, runtime)
