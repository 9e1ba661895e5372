"""A task: its data, its classes by name, and the place it runs in. Everything above speaks in these."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from perpetune.errors import DataError, UsageError
from perpetune.runtime import Runtime
from perpetune.seeding import generator, seed_of

N = TypeVar("N", int, float)
IGNORED = -100  # where a label would stand and there is none: torch's and transformers' word for it


class Inputs:
    """What a model reads of some examples: named tensors whose first axis is the example.

    Args:
        tensors: by name; those that are None are left out. The names that are used here: `pixels`, uint8
            `(B, 3, H, W)`, not normalised; and of texts, padded on the left so that all end at the same place, `ids`,
            int64 `(B, N)`; `mask`, bool `(B, N)`, false at padding; `labels`, int64 `(B, N)`, the tokens that are
            learned to be said and -100 elsewhere, not there for questions; `options`, int64 `(B, K, M)`, the tokens of
            each answer that stands to choice, -100 after its end and where a question has fewer, not there where
            answers are free. A view may add others.
        said: how many of the last columns hold all `labels`, known without a look at the device.
    """

    def __init__(self, *, said: int = 0, **tensors: Tensor | None):
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.said = said

    @classmethod
    def of(cls, given: Inputs | Tensor) -> Inputs:
        """`given`, or a bare tensor of images as inputs: the one place where people's tensors are taken in."""
        return given if isinstance(given, Inputs) else cls(pixels=given)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name; UsageError where these inputs have none."""
        if name not in self.tensors:
            raise UsageError(f"a model asks for {name}, and its inputs are {', '.join(self.tensors)}")
        return self.tensors[name]

    @property
    def pixels(self) -> Tensor:
        return self["pixels"]

    @property
    def ids(self) -> Tensor:
        return self["ids"]

    @property
    def mask(self) -> Tensor:
        return self["mask"]

    @property
    def labels(self) -> Tensor | None:
        return self.tensors.get("labels")

    @property
    def options(self) -> Tensor | None:
        return self.tensors.get("options")

    def each(self, act: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with `act` done to every tensor."""
        return Inputs(said=self.said, **{name: act(tensor) for name, tensor in self.tensors.items()})

    def rows(self, index: Sequence[int]) -> Inputs:
        """Some of the examples, by their places."""
        places = torch.tensor(index, dtype=torch.int64)
        return self.each(lambda tensor: tensor[places.to(tensor.device)])

    def __repr__(self) -> str:
        return f"Inputs({', '.join(f'{name} {tuple(t.shape)}' for name, t in self.tensors.items())})"


@dataclass(frozen=True)
class Batch:
    """Some examples of one task.

    Attributes:
        inputs: what the model reads; a bare tensor is taken for images.
        targets: int64 `(B,)`, positions in the task's `classes`; 0 where it has none.
        numbers: int64 `(B,)`, positions among the examples it was loaded from; on the CPU.
    """

    inputs: Inputs
    targets: Tensor
    numbers: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", Inputs.of(self.inputs))

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def mask(self) -> Tensor | None:
        """`(B, N)`, true where there is a token; None where all are."""
        return self.inputs.tensors.get("mask")

    def pin_memory(self) -> Batch:
        """Called by torch's loader, so that the copy to a GPU need not wait."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, act: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(self.inputs.each(act), act(self.targets), self.numbers)


Item = tuple[Any, int, int]  # an example as it was loaded, its target, its number


class Examples(ABC):
    """Labelled examples that are loaded one at a time.

    Attributes:
        targets: position of each example's label in the task's `classes`.
        deterministic: whether each is the same whenever it is loaded, so that what was computed of it can be kept: the
            seed of `load` changes nothing.
        weights: a number for each example: the loss of a step is the mean by these (the tokens to be said in a text);
            None weighs all alike.
        lengths: how long each example is, in tokens, by which examples can be put together in batches; None where all
            are of one size.
    """

    targets: Sequence[int]
    deterministic: bool = False
    weights: Sequence[float] | None = None
    lengths: Sequence[int] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int, seed: int | None) -> Any:
        """Example `index` as `collate` takes it; augmented by `seed`, or as for evaluation when None."""

    def collate(self, items: Sequence[Item]) -> Batch:
        """A batch of (loaded example, target, number); by default of images of one size."""
        return stack(items)

    def questions(self) -> Examples:
        """The same as they are asked at prediction: texts without their answers, pictures as they are."""
        return self

    def text(self, index: int) -> Any:
        """Example `index` as people wrote it; UsageError where examples are no texts."""
        raise UsageError("these examples are no texts")

    def weight(self, rows: Sequence[int]) -> float:
        """What `rows` count for in the mean of a step: their number, or the sum of their weights."""
        weights = self.weights
        return float(len(rows)) if weights is None else float(sum(weights[i] for i in rows))


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


class Pick(Examples):
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
        self.deterministic = all(s.deterministic for s in sets)
        self.weights = self._picked([s.weights for s in sets])
        self.lengths = self._picked([s.lengths for s in sets])

    def _picked(self, values: Sequence[Sequence[N] | None]) -> list[N] | None:
        known = [value for value in values if value is not None]
        return [known[k][i] for k, i in self.picked] if len(known) == len(values) else None

    def __len__(self) -> int:
        return len(self.picked)

    def load(self, index: int, seed: int | None) -> Any:
        k, i = self.picked[index]
        return self.sets[k].load(i, seed)

    def collate(self, items: Sequence[Item]) -> Batch:
        return self.sets[0].collate(items)

    def questions(self) -> Pick:
        return Pick([s.questions() for s in self.sets], self.picked, self.maps)

    def text(self, index: int) -> Any:
        k, i = self.picked[index]
        return self.sets[k].text(i)


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


def stack(items: Sequence[Item]) -> Batch:
    """A batch of images of one size, uint8 `(3, H, W)` each."""
    images, targets, numbers = zip(*items, strict=True)
    inputs = Inputs(pixels=torch.stack(images))
    return Batch(inputs, torch.tensor(targets, dtype=torch.int64), torch.tensor(numbers, dtype=torch.int64))


def _collate(make: Callable[[Sequence[Item]], Batch], items: list[Item | str]) -> Batch | str:
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
        collate_fn=partial(_collate, examples.collate),
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
