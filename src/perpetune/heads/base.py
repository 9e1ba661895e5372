"""From features to scores of classes known by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perpetune.numerics.carry import Carry


def alone(value: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return value


class Borrowed:
    """A module of the backbone that a head calls and does not own.

    Its parameters are none of the head's, it is stored with the backbone, and a copy of the head calls the same one.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Borrowed:
        return self


class Head(nn.Module, ABC):
    """A classifier that grows by class name; rows follow the order in which classes came.

    A head with `statistics = True` is not (only) trained by gradient: after the features have been
    trained, the method shows it the training data once: `expect`, `observe` for each batch, `flush`, `settle`.
    While features are trained, its `logits` come from a probe that takes no part in the prediction.

    Options in the recipe are the keyword-only arguments of `__init__`; `of` says what it takes from the backbone.
    """

    statistics: ClassVar[bool] = False
    any_class: ClassVar[bool] = False
    """Whether `among` takes classes that were not learned: a head that reads their names."""
    carry: bool = False
    """Whether what it sums up follows the features where training moves them."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.classes: list[str] = []

    @classmethod
    def of(cls, backbone: Any, **options: Any) -> Head:
        """The head for a `models.backbone.Backbone`: of most heads the width of its features is all that counts.

        A head that needs more than features, such as the tower of `backbone.net` for texts, takes it here, as
        `Borrowed`.

        Raises:
            UsageError: the backbone lacks what the head needs.
        """
        return cls(backbone.dim, **options)

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Scores `(B, C)` of all classes known so far for features `(B, D)`; their softmax is shown
        to users as probabilities."""

    def among(self, features: Tensor, classes: Sequence[str]) -> Tensor:
        """Scores `(B, len(classes))` of these classes alone.

        Raises:
            KeyError: a class that it has not learned, unless it answers with any class.
        """
        scores: Tensor = self(features)
        return scores[:, self.rows(classes, scores.device)]

    def logits(self, features: Tensor) -> Tensor:
        """Scores `(B, C)` that gradient training works on; the prediction's own unless said otherwise."""
        scores: Tensor = self(features)
        return scores

    @abstractmethod
    def resize(self, rows: int, generator: torch.Generator) -> None:
        """Make it `rows` classes: the rows there already keep their values, or the last are dropped."""

    def reset(self) -> None:
        """Forget everything: as if newly made."""
        self.classes = []
        self.resize(0, torch.Generator())

    def widen(self, dim: int) -> None:
        """Statistics will be of features `dim` wide; what is trained by gradient keeps its width. Before any task."""
        self.dim = dim

    def train_on(self, columns: slice) -> None:
        """While features are trained, a probe reads these columns alone; before any task.

        A head that is trained itself reads all columns, for it predicts by them.
        """

    def ready(self) -> None:
        """UsageError where its options do not go with the features' width, which is final now: before any task."""

    def expect(self, counts: Tensor) -> None:
        """So many examples of each row, int64 `(C,)`, are about to be observed by all processes together."""

    def observe(self, features: Tensor, rows: Tensor) -> None:
        """Take in features `(B, D)` of training examples and their class rows `(B,)`; statistics heads only."""

    def flush(self) -> None:
        """All examples of this process have been observed: nothing may be missing in `additive` any more."""

    def follow(self, before: Tensor, after: Tensor, targets: Tensor) -> None:
        """Training has moved the features of the new task's examples: move what is known of old ones accordingly.

        Args:
            before, after: features `(n, D)` of the same examples, on every process the same.
            targets: int64 `(n,)`: which of them are of one class.
        """

    def per_class(self) -> list[nn.Parameter]:
        """The parameters that have one row for each class, in the order of `classes`."""
        return []

    def additive(self) -> list[Tensor]:
        """The buffers that are sums over examples: what several processes observed is added up there, and no step of
        an optimizer changes them."""
        return []

    def settle(self, total: Callable[[Tensor], Tensor] = alone) -> None:
        """All training data of a task have been observed, and `additive` is summed; `total` sums over processes."""

    def needed(self) -> dict[str, Tensor]:
        """What `forward` needs, by name: what is stored, without the sums it was computed from."""
        sums = {id(t) for t in self.additive()}
        return {n: t for n, t in self.state_dict(keep_vars=True).items() if isinstance(t, Tensor) and id(t) not in sums}

    def facts(self) -> dict[str, Any]:
        """What is worth reporting of the last `settle`, in JSON's types; a `warning` among them is shown as one."""
        return {}

    def grow(self, classes: Sequence[str], generator: torch.Generator) -> None:
        """Add the names among `classes` that are new."""
        self.classes += [c for c in dict.fromkeys(classes) if c not in self.classes]
        self.resize(len(self.classes), generator)

    def rows(self, classes: Sequence[str], device: torch.device | None = None) -> Tensor:
        """Row of each of `classes`, int64 `(len(classes),)`; KeyError for an unknown name."""
        row = {name: i for i, name in enumerate(self.classes)}
        return torch.tensor([row[c] for c in classes], dtype=torch.int64, device=device)

    def get_extra_state(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.classes = list(state["classes"])
        self.resize(len(self.classes), torch.Generator())


def carry_facts(carry: Carry) -> dict[str, Any]:
    """What is reported of sums that followed their features: how far those moved, and what the map misses of it."""
    return {"moved": carry.moved, "carried": bool(carry), "unexplained": carry.unexplained}


def grow_rows(old: Tensor, rows: int, generator: torch.Generator, std: float) -> Tensor:
    """`old (R, D)` cut to `rows`, or with normally distributed rows added; the result is detached."""
    new = torch.randn(max(0, rows - len(old)), old.shape[1], generator=generator) * std
    return torch.cat([old.detach()[:rows], new.to(old)])
