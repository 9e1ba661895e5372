"""A task: its data, the names of its classes, and the runtime. The modules above this one all use these types."""

from __future__ import annotations

import bisect
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from perpetune.errors import DataError, UsageError
from perpetune.numerics.handover import sent
from perpetune.runtime import Runtime
from perpetune.seeding import generator, seed_of

N = TypeVar("N", int, float)
IGNORED = -100  # torch and transformers put this number where a token has no label


class Inputs:
    """The inputs of a model for some examples: named tensors whose first axis is the example.

    Those that decide what is computed (`HOST`) stay on the CPU, so that nobody has to read them from a device.

    Args:
        tensors: the tensors, by name; a name with None is left out. A view may use further names. The library uses:
            `pixels`: images, uint8 `(B, 3, H, W)`, not normalised. Beside texts uint8 `(B, P, 3, H, W)`, where `P` is
            the number of pictures of the example with most.
            `shown`: int64 `(B, P)` beside texts: a number that only pictures of equal pixels share, 0 where there is
            no picture.
            `ids`: tokens of texts, int64 `(B, N)`, padded on the left, so that all texts end in the last column.
            `mask`: bool `(B, N)`, false at padding.
            `labels`: int64 `(B, N)`, the tokens that the model learns to say, and -100 elsewhere. Questions have none.
            `caption`: int64 `(B,)`, the position of the caption that is learned among the captions of each picture.
            `options`: int64 `(B, K, M)`, the tokens of each answer that the model can choose, -100 after the answer's
            end and in place of missing answers. Questions with free answers have none.
            `context`: bool `(B, N)`, true at tokens in whose place the pet `context` puts its vectors.
        said: the number of last columns that contain all `labels`. So the code need not read it from the device.
    """

    HOST: ClassVar[frozenset[str]] = frozenset({"shown", "caption", "context"})

    def __init__(self, *, said: int = 0, **tensors: Tensor | None):
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.said = said

    @classmethod
    def of(cls, given: Inputs | Tensor) -> Inputs:
        """`given` itself, or inputs made of a bare tensor of images. Every tensor from users comes in through here."""
        return given if isinstance(given, Inputs) else cls(pixels=given)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name; UsageError if the inputs have no such tensor."""
        if name not in self.tensors:
            raise UsageError(f"the model needs the input {name}, but the batch has only {', '.join(self.tensors)}")
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
        """New inputs, with the result of `act` for every tensor."""
        return self._with({name: act(tensor) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> Inputs:
        """The inputs on a device, without a wait for it; those of `HOST` stay on the CPU."""
        moved = {n: t if n in self.HOST else t.to(device, non_blocking=True) for n, t in self.tensors.items()}
        return self._with(moved)

    def _with(self, tensors: dict[str, Tensor]) -> Inputs:
        return Inputs(said=self.said, **tensors)

    def rows(self, index: Sequence[int]) -> Inputs:
        """The inputs of the examples at the positions `index`."""
        places = torch.tensor(index, dtype=torch.int64)
        return self.each(lambda tensor: tensor[sent(places, tensor.device)])

    def __repr__(self) -> str:
        return f"Inputs({', '.join(f'{name} {tuple(t.shape)}' for name, t in self.tensors.items())})"


@dataclass(frozen=True)
class Batch:
    """Some examples of one task.

    Attributes:
        inputs: the model's inputs; a bare tensor means images.
        targets: int64 `(B,)`, positions in the task's `classes`; 0 if the task has no classes.
        numbers: int64 `(B,)`, the examples' positions in the set that they were loaded from; on the CPU.
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
        """`(B, N)`, true at tokens and false at padding; None if there is no padding."""
        return self.inputs.tensors.get("mask")

    def pin_memory(self) -> Batch:
        """Put the tensors into pinned memory. Torch's loader calls this, so that the copy to a GPU need not wait."""
        return Batch(self.inputs.each(Tensor.pin_memory), self.targets.pin_memory(), self.numbers)

    def to(self, device: torch.device) -> Batch:
        return Batch(self.inputs.to(device), self.targets.to(device, non_blocking=True), self.numbers)


Item = tuple[Any, int, int]  # a loaded example, its target, its number


class Examples(ABC):
    """Labelled examples that are loaded one at a time.

    Attributes:
        targets: for each example the position of its label in the task's `classes`.
        deterministic: whether `load` gives the same example for every seed. Then results computed from it can be kept.
        weights: a number for each example; the loss of a step is the mean with these weights. For a text it is the
            number of tokens to say. None gives all examples the same weight.
        lengths: the length of each example in tokens, so that a batch can have examples of similar length. None if all
            examples have the same size.
    """

    targets: Sequence[int]
    deterministic: bool = False
    weights: Sequence[float] | None = None
    lengths: Sequence[int] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int, seed: int | None) -> Any:
        """Example `index`, in the form that `collate` takes; augmented at random by `seed`, or not if it is None."""

    def collate(self, items: Sequence[Item]) -> Batch:
        """A batch of the `items`, each (loaded example, target, number). The default is for images of one size."""
        return stack(items)

    def questions(self) -> Examples:
        """The same examples as the model gets them at prediction: texts without their answers, images unchanged."""
        return self

    def identity(self) -> str | None:
        """A digest of all that `load` gives without a seed, in this order; None if nobody can say it.

        Features of examples are used again for as long as this is the same. With None they never are.
        """
        return None

    def text(self, index: int) -> Any:
        """The original text of example `index`; UsageError if the examples are not texts."""
        raise UsageError("these examples are not texts")

    def captions(self, index: int) -> Sequence[str]:
        """The sentences that describe example `index`; none if the examples have no captions."""
        return ()

    def weight(self, rows: Sequence[int]) -> float:
        """The weight of `rows` in the mean of a step: their number, or the sum of their `weights`."""
        weights = self.weights
        return float(len(rows)) if weights is None else float(sum(weights[i] for i in rows))


@dataclass(frozen=True)
class Task:
    """One step of a stream.

    Attributes:
        index: the position in the stream, from 0.
        name: unique in the stream; has only letters, digits, `.`, `_` and `-`.
        classes: the names of the labels, in a fixed order; `Batch.targets` are positions in it. Empty if answers are
            free text.
        train, validation, test: the examples; validation is cut off from train, never from test.
        score: the name of the score for answers in text, in `numerics.text_scores`; None counts answers as right or
            wrong.
        earlier: the tasks before this one, only if the run may keep their data (method `joint`).
        runtime: the surroundings of the run: seed, device, workers, checkpoints, progress.
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
        """A generator of this task for the given purpose."""
        return generator(self.runtime.seed, "task", self.index, *purpose)

    def batches(self, size: int) -> Iterator[Batch]:
        """The training data once, in order, without augmentation, on the run's device.

        If there are several processes, each gets its own share of the examples: add the results with `runtime.sum`.
        """
        return evaluation_batches(self.train, size, self.runtime)


class Pick(Examples):
    """Examples picked from several sets of one kind, in any order.

    Args:
        sets: the sets of examples.
        picked: for each example (number of its set, its number in the set).
        maps: `maps[k][y]` is the new target of an example of set k whose target is y; None keeps the targets.
    """

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

    def captions(self, index: int) -> Sequence[str]:
        k, i = self.picked[index]
        return self.sets[k].captions(i)


class Joined(Examples):
    """Several sets of examples, one after the other. All examples of a batch have to be of one set, which collates
    them; the numbers in the batch are those in the set."""

    def __init__(self, sets: Sequence[Examples]):
        self.sets = sets
        self.starts = [0, *itertools.accumulate(map(len, sets))]
        self.targets = [target for some in sets for target in some.targets]

    def __len__(self) -> int:
        return self.starts[-1]

    def load(self, index: int, seed: int | None) -> Any:
        number = bisect.bisect_right(self.starts, index) - 1
        return number, self.sets[number].load(index - self.starts[number], seed)

    def collate(self, items: Sequence[Item]) -> Batch:
        number = items[0][0][0]
        start = self.starts[number]
        batch: Batch = self.sets[number].collate([(one, target, index - start) for (_, one), target, index in items])
        return batch


def captioned(examples: Examples) -> bool:
    """Whether the examples have captions instead of classes."""
    return len(examples) > 0 and bool(examples.captions(0))


def part(examples: Examples, numbers: Iterable[int]) -> Pick:
    """The `examples` with the given numbers."""
    return Pick([examples], [(0, i) for i in numbers])


def balanced(examples: Examples, count: int, generator: torch.Generator) -> Examples:
    """`count` examples, drawn by `generator`, balanced over the targets, in their old order; all if there are fewer."""
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
    """Examples that are requested by (index, seed), so that a loader process needs no state."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, request: tuple[int, int | None]) -> Item | str:
        index, seed = request
        try:
            return self.examples.load(index, seed), self.examples.targets[index], index
        except DataError as error:
            return str(error)  # torch would add a page of traceback to an exception from a loader process


def stack(items: Sequence[Item]) -> Batch:
    """A batch of images of one size, each uint8 `(3, H, W)`."""
    images, targets, numbers = zip(*items, strict=True)
    pixels: Tensor = torch.utils.data.default_collate(list(images))  # in a loader process straight into shared memory
    inputs = Inputs(pixels=pixels)
    return Batch(inputs, torch.tensor(targets, dtype=torch.int64), torch.tensor(numbers, dtype=torch.int64))


def _collate(make: Callable[[Sequence[Item]], Batch], items: list[Item | str]) -> Batch | str:
    loaded = [item for item in items if not isinstance(item, str)]
    if len(loaded) < len(items):
        return next(item for item in items if isinstance(item, str))
    return make(loaded)


def load_batches(
    examples: Examples, requests: Iterable[Sequence[tuple[int, int | None]]], runtime: Runtime
) -> Iterator[Batch]:
    """Load a batch for each list of (index, seed) in `requests`, onto the run's device.

    The run's workers, if it has any, start once, and take requests before the batches before them are used.

    Raises:
        DataError: an example cannot be loaded; the message names it.
    """
    loader: torch.utils.data.DataLoader[Batch | str] = torch.utils.data.DataLoader(
        _Requests(examples),
        batch_sampler=requests,  # type: ignore[arg-type]
        num_workers=runtime.workers,
        collate_fn=partial(_collate, examples.collate),
        pin_memory=runtime.device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # otherwise the loader draws from the global generator
        multiprocessing_context="fork" if runtime.workers and sys.platform == "linux" else None,  # fast
    )
    for batch in loader:
        if isinstance(batch, str):
            raise DataError(batch)
        yield batch.to(runtime.device)


def evaluation_batches(examples: Examples, size: int, runtime: Runtime) -> Iterator[Batch]:
    """Batches of this process's share of `examples`, in order, without augmentation."""
    mine = range(runtime.rank, len(examples), runtime.world)
    requests = [[(i, None) for i in mine[s : s + size]] for s in range(0, len(mine), size)]
    return load_batches(examples, requests, runtime)
