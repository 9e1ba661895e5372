"""The interface of heads: they turn features into scores of classes, which are known by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perpetune.errors import PerpetuneError, UsageError
from perpetune.numerics.carry import Carry
from perpetune.numerics.handover import Arrivals, sent


def alone(value: Tensor) -> Tensor:
    """The sum over processes if there is only one process."""
    return value


@dataclass(frozen=True)
class Folded:
    """A head as one linear map: its scores are `g weightᵀ + bias`, up to a number that all classes share.

    Attributes:
        weight, bias: float64 `(C, M)` and `(C,)`, so that nothing is lost where a large mean is in the bias. A class
            that was never seen has the bias −∞.
        normalise: `g` is the feature divided by its length.
        projected: `g` is `relu(f projected)` of the feature `f`; `(D, M)`.
    """

    weight: Tensor
    bias: Tensor
    normalise: bool = False
    projected: Tensor | None = None


class Borrowed:
    """A module of the backbone that a head calls and does not own.

    Its parameters do not belong to the head. It is stored with the backbone, and a copy of the head calls the same
    module.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Borrowed:
        return self


class Head(nn.Module, ABC):
    """A classifier that grows by class name; its rows are in the order in which the classes came.

    A head with `statistics = True` learns from statistics. After the features have been trained, the method shows it
    the training data once: `expect`, `observe` for each batch, `flush`, `settle`. While features are trained, its
    `logits` come from a second classifier, the probe, which is trained by gradient and not used at prediction.

    Options in the recipe are the keyword-only arguments of `__init__`; `of` makes the head for a backbone.
    """

    statistics: ClassVar[bool] = False
    any_class: ClassVar[bool] = False
    """Whether `among` takes classes that were not learned: a head that reads their names."""
    reads: ClassVar[bool] = False
    """Whether it reads the `sentences` of classes, and `forward` keeps what it made of them. Protection shows these
    sentences to the text tower by itself, once for each class."""
    by_class: ClassVar[bool] = False
    """Whether what it learns of each class stands by itself, so that a class can be taken out."""
    bare: bool = False
    """Whether it also answers with the net without pets. Then the net's own feature stands before the others."""
    carry: bool = False
    """Whether its sums are moved as training moves the features."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.classes: list[str] = []

    @classmethod
    def of(cls, backbone: Any, **options: Any) -> Head:
        """Make the head for a `models.backbone.Backbone`. Most heads need only the width of its features.

        A head that needs more, such as the tower of `backbone.net` for texts, overrides this and takes the module as
        `Borrowed`.

        Raises:
            UsageError: the backbone lacks something that the head needs.
        """
        return cls(backbone.dim, **options)

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Scores `(B, C)` of all classes known so far for features `(B, D)`. Users see their softmax as
        probabilities."""

    def among(self, features: Tensor, classes: Sequence[str]) -> Tensor:
        """Scores `(B, len(classes))` of these classes alone.

        Raises:
            KeyError: a class that it has not learned, unless it answers with any class.
        """
        scores: Tensor = self(features)
        return scores[:, self.rows(classes, scores.device)]

    def gates(self, features: Tensor, classes: Sequence[str]) -> Mapping[str, Tensor]:
        """Yes or no about how `among` finds each of its answers, bool `(B,)`, by name; for the report."""
        return {}

    def sentences(self, classes: Sequence[str]) -> list[str]:
        """All texts that it reads for some classes; none if it reads no texts."""
        return []

    def reading(self, templates: str | Sequence[str]) -> AbstractContextManager[None]:
        """Inside this context the names of classes are read in other sentences.

        Raises:
            UsageError: the head reads no names.
        """
        raise UsageError(f"templates are for a head that reads names, and {type(self).__name__.lower()} reads none")

    def finish(self, classes: Sequence[str]) -> None:
        """Called when a task with these classes was learned, with the pets in force that were trained on it."""

    def logits(self, features: Tensor) -> Tensor:
        """Scores `(B, C)` for training by gradient; by default the same as at prediction."""
        scores: Tensor = self(features)
        return scores

    def logits_of(self, features: Tensor, rows: Tensor) -> Tensor:
        """Scores `(B, len(rows))` for training by gradient of the classes in some rows, int64 `(R,)`."""
        return self.logits(features)[:, rows]

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained by gradient."""
        return list(self.parameters())

    @abstractmethod
    def resize(self, rows: int, generator: torch.Generator) -> None:
        """Give the head `rows` rows. Rows that exist keep their values; if there are too many, the last are dropped."""

    def reset(self) -> None:
        """Forget everything; the head is then like a new one."""
        self.classes = []
        self.resize(0, torch.Generator())

    def widen(self, dim: int) -> None:
        """Set the width of the features that statistics are made of. Called before any task.

        Parameters that are trained by gradient keep their width.
        """
        self.dim = dim

    def train_on(self, columns: slice) -> None:
        """Set the columns of the features that the probe reads while features are trained. Called before any task.

        A head without a probe reads all columns, because it predicts from them.
        """

    def ready(self) -> None:
        """Raise UsageError if the options do not fit the width of the features, which is final now. Called before any
        task."""

    def expect(self, counts: Tensor) -> None:
        """Announce how many examples of each row all processes together will observe, int64 `(C,)`."""

    def observe(self, features: Tensor, rows: Tensor) -> None:
        """Add features `(B, D)` of training examples and their class rows `(B,)` to the statistics."""

    def flush(self) -> None:
        """Called when this process has observed all its examples: everything has to be in `additive` now."""

    def follow(self, before: Tensor, after: Tensor, targets: Tensor) -> None:
        """Move the sums over old examples in the way in which training has moved the features.

        Args:
            before: features `(n, D)` of some examples of the new task, the same on every process.
            after: the features of the same examples after training.
            targets: int64 `(n,)`, the class of each example.
        """

    def per_class(self) -> list[nn.Parameter]:
        """The parameters that have one row for each class, in the order of `classes`."""
        return []

    def additive(self) -> list[Tensor]:
        """The buffers that are sums over examples. They are summed over processes, and no optimizer changes them."""
        return []

    def settle(self, total: Callable[[Tensor], Tensor] = alone) -> None:
        """Compute the classifier. Called when all training data of a task have been observed and `additive` is summed.

        Args:
            total: sums a tensor over all processes.
        """

    def take_out(self, part: Callable[[], tuple[Head | None, Head]], gone: Sequence[str], whole: bool) -> None:
        """Take one task, or classes, out of what was learned, exactly: as if it had never been learned.

        Args:
            part: gives copies of this head as it was before the task (None if it was the first) and after it.
            gone: the classes that are left out; no other task has them.
            whole: whether a task has no other classes.

        Raises:
            UsageError: it cannot be exact; the message says what can be done instead. Nothing was changed.
        """
        raise UsageError(
            f"head: {type(self).__name__.lower()} was trained on all tasks together, so nothing can be taken out of it "
            "exactly"
        )

    @property
    def apart(self) -> bool:
        """Whether each class is trained in rows of its own alone, so that they can be left out by `keep_rows`."""
        return False

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows alone, in this order; for heads that are `apart`."""
        raise NotImplementedError

    def leave_out(self, gone: Sequence[str]) -> list[int]:
        """Leave classes out of `classes`; the rows of those that stay."""
        stay = [row for row, name in enumerate(self.classes) if name not in gone]
        self.classes = [self.classes[row] for row in stay]
        return stay

    def folded(self) -> Folded | None:
        """The head as one linear map, for an export; None if it is none, and then an export has the tensors of
        `needed`."""
        return None

    def needed(self) -> dict[str, Tensor]:
        """The tensors that `forward` needs, by name: all stored tensors except the sums."""
        sums = {id(t) for t in self.additive()}
        return {n: t for n, t in self.state_dict(keep_vars=True).items() if isinstance(t, Tensor) and id(t) not in sums}

    def facts(self) -> dict[str, Any]:
        """Facts about the last `settle` for the report, in JSON's types. The entry `warning` is shown as a warning."""
        return {}

    def grow(self, classes: Sequence[str], generator: torch.Generator) -> None:
        """Add those of `classes` that are new."""
        known = set(self.classes)
        self.classes += [c for c in dict.fromkeys(classes) if c not in known]
        self.resize(len(self.classes), generator)

    def rows(self, classes: Sequence[str], device: torch.device | None = None) -> Tensor:
        """The row of each of `classes`, int64 `(len(classes),)`; raises KeyError for an unknown name."""
        row = {name: i for i, name in enumerate(self.classes)}
        return sent([row[c] for c in classes], device, torch.int64)

    def get_extra_state(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        classes = state["classes"]
        if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
            raise ValueError("classes is no list of names")
        if len(set(classes)) < len(classes):
            raise ValueError("a class stands twice in classes")
        self.classes = list(classes)
        self.resize(len(self.classes), torch.Generator())


def carry_facts(carry: Carry) -> dict[str, Any]:
    """Facts for the report about sums that followed their features: how far the features moved, whether the sums were
    moved, and the part of the movement that the map does not explain."""
    return {"moved": carry.moved, "carried": bool(carry), "unexplained": carry.unexplained}


def not_finite(head: str, classes: Sequence[str], features: Tensor, rows: Tensor) -> PerpetuneError | None:
    """The error that says which class has features that are not finite; None if all features `(B, D)` are.

    Args:
        head: the name of the head, for the message.
        rows: int64 `(B,)`, the row of each example in `classes`.
    """
    bad = ~torch.isfinite(features).all(1)
    if not bad.any():
        return None
    return _fault(head, classes[int(rows[bad][0])])


def _fault(head: str, name: str) -> PerpetuneError:
    return PerpetuneError(
        f"head: {head}: features of an example of class {name} are not finite, so training has broken the features; "
        "lower train.lr or set train.clip"
    )


class FiniteFeatures:
    """The check of `not_finite` for batch after batch, without a wait for the device.

    Args:
        head: the name of the head, for the message.
    """

    def __init__(self, head: str):
        self.head = head
        self.clear()

    def clear(self) -> None:
        """Forget what was not read."""
        self._bad: list[Tensor] = []
        self._arrivals = Arrivals()

    def add(self, classes: Sequence[str], features: Tensor, rows: Tensor) -> None:
        """Check a batch: at once on the CPU, or else when the device has computed it.

        Raises:
            PerpetuneError: features of this batch, or of one before it, are not finite.
        """
        if features.device.type == "cpu":
            if (fault := not_finite(self.head, classes, features, rows)) is not None:
                raise fault
            return
        bad = ~torch.isfinite(features).all(1)
        self._bad.append(bad.any())
        self._arrivals.put(bad, rows)
        self.read(classes)

    def read(self, classes: Sequence[str], *, all: bool = False) -> None:  # noqa: A002
        """Raise what is known by now, or after `all` batches are computed."""
        for bad, rows in self._arrivals.take(all=all):
            if bad.any():
                raise _fault(self.head, classes[int(rows[bad][0])])

    def without_bad(self, rows: Tensor) -> Tensor:
        """`rows` of the batches that were added since the last call, or zeros if not all of these are finite. So a sum
        stays sound until the fault is read."""
        if self._bad:
            rows, self._bad = torch.where(torch.stack(self._bad).any(), 0.0, rows), []
        return rows


def grow_rows(old: Tensor, rows: int, generator: torch.Generator, std: float) -> Tensor:
    """`old (R, D)` cut to `rows` rows, or with normally distributed rows added; the result is detached."""
    new = torch.randn(max(0, rows - len(old)), old.shape[1], generator=generator) * std
    return torch.cat([old.detach()[:rows], new.to(old)])
