"""A task: its data, its classes by name, and the place it runs in. Everything above speaks in these."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from perpetune.errors import DataError
from perpetune.runtime import Runtime
from perpetune.seeding import generator, seed_of

IGNORED = -100  # where a label would stand and there is none: torch's and transformers' word for it


@dataclass(frozen=True)
class Tokens:
    """Texts as a language model reads them, padded on the left, so that all end at the same place.

    Attributes:
        ids: int64 `(B, N)`.
        mask: bool `(B, N)`, false at padding.
        labels: int64 `(B, N)`: the tokens that are learned to be said, -100 elsewhere; None for questions.
        options: int64 `(B, K, M)`: the tokens of each answer that stands to choice, -100 after its end and where a
            question has fewer; None where answers are free.
        said: how many of the last columns hold all labels, known without a look at the device.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor | None = None
    options: Tensor | None = None
    said: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def each(self, act: Callable[[Tensor], Tensor]) -> Tokens:
        """The same with `act` done to every tensor."""
        labels, options = (t if t is None else act(t) for t in (self.labels, self.options))
        return Tokens(act(self.ids), act(self.mask), labels, options, self.said)


Inputs = Tensor | Tokens
"""What a model reads: images, uint8 `(B, 3, H, W)`, not normalised; or texts."""


def chosen(inputs: Inputs, rows: Sequence[int]) -> Inputs:
    """Some of the inputs of a batch."""
    index = torch.tensor(rows, dtype=torch.int64)
    if isinstance(inputs, Tokens):
        return inputs.each(lambda tensor: tensor[index.to(tensor.device)])
    return inputs[index.to(inputs.device)]


@dataclass(frozen=True)
class Batch:
    """Some examples of one task.

    Attributes:
        inputs: what the model reads.
        targets: int64 `(B,)`, positions in the task's `classes`; 0 where it has none.
        numbers: int64 `(B,)`, positions among the examples it was loaded from; on the CPU.
    """

    inputs: Inputs
    targets: Tensor
    numbers: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def mask(self) -> Tensor | None:
        """`(B, N)`, true where there is a token; None where all are."""
        return self.inputs.mask if isinstance(self.inputs, Tokens) else None

    def pin_memory(self) -> Batch:
        """Called by torch's loader, so that the copy to a GPU need not wait."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, act: Callable[[Tensor], Tensor]) -> Batch:
        inputs = self.inputs.each(act) if isinstance(self.inputs, Tokens) else act(self.inputs)
        return Batch(inputs, act(self.targets), self.numbers)


Item = tuple[Any, int, int]  # an example as it was loaded, its target, its number
Collate = Callable[[Sequence[Item]], Batch]


class Examples(Protocol):
    """Labelled examples that are loaded one at a time.

    They may have, beside what is below: `deterministic`, true where the seed of `load` changes nothing; `collate`, a
    `Collate` for what is not tensors of one shape; `weights`, a number for each example: a step's loss is the mean
    by these (the tokens to be said in a text); and `lengths`, by which examples can be put together in batches.
    """

    @property
    def targets(self) -> Sequence[int]:
        """Position of each example's label in the task's `classes`."""

    def __len__(self) -> int: ...

    def load(self, index: int, seed: int | None) -> Any:
        """Example `index` as the model reads it, or as `collate` takes it; augmented by `seed`, or as for evaluation
        when None."""


def deterministic(examples: Examples) -> bool:
    """Whether each of them is the same whenever it is loaded, so that what was computed of it can be kept."""
    return bool(getattr(examples, "deterministic", False))


def questions(examples: Examples) -> Examples:
    """The same as they are asked at prediction: texts without their answers, pictures as they are."""
    found: Callable[[], Examples] | None = getattr(examples, "questions", None)
    return examples if found is None else found()


def weight(examples: Examples, rows: Sequence[int]) -> float:
    """What `rows` count for in the mean of a step: their number, or the sum of their weights."""
    weights = getattr(examples, "weights", None)
    return float(len(rows)) if weights is None else float(sum(weights[i] for i in rows))


def lengths(examples: Examples) -> Sequence[int] | None:
    """How long each example is, in tokens; None where they are all of one size."""
    found: Sequence[int] | None = getattr(examples, "lengths", None)
    return found


@dataclass(frozen=True)
class Task:
    """One step of a stream.

    Attributes:
        index: position in the stream, from 0.
        name: unique in the stream; letters, digits, `.`, `_` and `-` only.
        classes: names of the labels that occur, in a fixed order; `Batch.targets` point into it. None where answers
            are free text.
        train, validation, test: the data; validation is cut from train, never from test.
        score: how the text of an answer is scored, by its name in `numerics.text_scores`; None is right or wrong.
        earlier: the tasks before this one, only where the run may keep their data (method `joint`).
        runtime: where and how it runs: seed, device, workers, checkpoints, progress.
    """

    index: int
    name: str
    classes: tuple[str, ...]
    train: Examples
    validation: Examples | None = None
    test: Examples | None = None
    score: str | None = None
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


class Pick:
    """Examples picked out of several sets of one kind, in any order; `maps[k][y]` is the common position of label y
    of set k."""

    def __init__(
        self,
        sets: Sequence[Examples],
        picked: Sequence[tuple[int, int]],
        maps: Sequence[Sequence[int]] | None = None,
    ):
        self.sets, self.picked, self.maps = sets, picked, maps
        self.targets = [maps[k][sets[k].targets[i]] if maps and maps[k] else sets[k].targets[i] for k, i in picked]
        self.deterministic = all(deterministic(s) for s in sets)
        for name in ("weights", "lengths"):
            values = [getattr(s, name, None) for s in sets]
            setattr(self, name, None if None in values else [values[k][i] for k, i in picked])  # type: ignore[index]
        self.collate = collate_of(sets[0])

    def __len__(self) -> int:
        return len(self.picked)

    def load(self, index: int, seed: int | None) -> Any:
        k, i = self.picked[index]
        return self.sets[k].load(i, seed)

    def questions(self) -> Pick:
        """The same, as they are asked at prediction."""
        return Pick([questions(s) for s in self.sets], self.picked, self.maps)

    def text(self, index: int) -> Any:
        """The text of an example; only where the sets are of texts."""
        k, i = self.picked[index]
        return self.sets[k].text(i)  # type: ignore[attr-defined]


def part(examples: Examples, numbers: Iterable[int]) -> Pick:
    """Some of the `examples`, by their numbers."""
    return Pick([examples], [(0, i) for i in numbers])


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
    return part(examples, sorted(i for _, i in sorted(order, key=lambda pair: pair[0])[:count]))


class _Requests(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Examples addressed by (index, seed), so that a loader process needs no state of its own."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, request: tuple[int, int | None]) -> Item | str:
        index, seed = request
        try:
            return self.examples.load(index, seed), self.examples.targets[index], index
        except DataError as error:
            return str(error)  # torch would wrap an exception of a loader process in a page of traceback


def collate_of(examples: Examples) -> Collate:
    """What makes a batch of such examples."""
    found: Collate | None = getattr(examples, "collate", None)
    return found or stack


def stack(items: Sequence[Item]) -> Batch:
    """A batch of tensors of one shape."""
    inputs, targets, numbers = zip(*items, strict=True)
    return Batch(
        torch.stack(inputs), torch.tensor(targets, dtype=torch.int64), torch.tensor(numbers, dtype=torch.int64)
    )


def _collate(make: Collate, items: list[Item | str]) -> Batch | str:
    loaded = [item for item in items if not isinstance(item, str)]
    if len(loaded) < len(items):
        return next(item for item in items if isinstance(item, str))
    return make(loaded)


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
        collate_fn=partial(_collate, collate_of(examples)),
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
