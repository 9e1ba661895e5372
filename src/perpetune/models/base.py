"""What is tuned: a frozen pretrained model with a loss on a task's batches and a prediction."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from perpetune.data.sources import Kind
from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone
from perpetune.tasks import Batch, Inputs, Task

Mask = Literal["task", "seen", "none"]


class Model(nn.Module, ABC):
    """The interface that methods see, the same for image classifiers and language models.

    Raises:
        UsageError: the backbone takes other inputs than this model gives it.
    """

    reads: ClassVar[tuple[Kind, ...]] = ("pictures", "texts")
    """The kinds of inputs it can be made for."""
    nothing: int = 0
    """Stands in answers where there is no token."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        if backbone.takes not in self.reads:
            raise UsageError(
                f"{backbone.spec} takes {backbone.takes}, and this head is for {self.reads[0]}: use `head: ridge` "
                "or another head of classes"
            )
        self.backbone = backbone
        self.view = copy.copy(backbone.preprocess)
        """How its examples become the backbone's input; a copy, for each model says what else it wants of a text."""

    @property
    def takes(self) -> Kind:
        """What goes in."""
        return self.backbone.takes

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Names of the columns of `predict`, in order; none where answers are texts."""

    @property
    def any_class(self) -> bool:
        """Whether `among` can answer with classes that were not learned."""
        return False

    def among(self, inputs: Inputs, classes: Sequence[str]) -> Tensor:
        """Scores `(B, len(classes))` of inputs over these classes, learned or not; only where `any_class`."""
        raise UsageError(f"{type(self).__name__} answers only with classes that it has learned")

    @property
    def chooses(self) -> bool:
        """Whether answers are scores over `classes`; else they are texts."""
        return True

    def posed(self, task: Task) -> Task:
        """The task as this model learns it."""
        return task

    def admits(self, name: str, classes: Sequence[str]) -> None:
        """UsageError where a task with that name and these classes is none for it: said before any training."""

    @abstractmethod
    def grow(self, task: Task) -> None:
        """Make room for the classes of `task`."""

    def compare(self, among: Mask) -> None:
        """From now on the training loss compares classes of the task, or of all seen, or all; texts have none."""

    @abstractmethod
    def loss(self, task: Task, batch: Batch) -> Tensor:
        """Mean training loss of a batch of `task`, a scalar; the mean is by the weights of the examples."""

    @abstractmethod
    def features(self, inputs: Inputs) -> Tensor:
        """Features `(B, D)` of inputs, by the pet that is active."""

    @abstractmethod
    def predict(self, inputs: Inputs) -> Tensor:
        """Scores `(B, C)` over `classes`. Where answers are texts: scores `(B, K)` of each question's options,
        -inf where it has fewer; or the tokens `(B, M)` of the answers, int64, where there are no options."""

    @abstractmethod
    def summarise(self, task: Task, batch_size: int) -> None:
        """One pass over the task's training data for what is learned from statistics, if anything is."""

    @contextlib.contextmanager
    def following(self, task: Task, batch_size: int, features: Callable[[Inputs], Tensor]) -> Iterator[None]:
        """Inside `features` are trained on `task`; what is known of earlier ones from sums may follow them."""
        yield

    def observe(self, inputs: Inputs) -> None:
        """One pass as at prediction, the head with it, for those who watch what flows through the model."""
        self.predict(inputs)

    def trained(self) -> list[nn.Parameter]:
        """What is trained by gradient beside the pets."""
        return []

    def per_class(self) -> list[nn.Parameter]:
        """Those of them that have a row for each class, in the order of `classes`."""
        return []

    @contextlib.contextmanager
    def resting(self, task: Task) -> Iterator[None]:
        """Inside the model is trained on `task`; what it has for other tasks alone ends as it began."""
        yield

    def reset(self) -> None:
        """Forget all that was learned, but for the pets."""

    def read(self, answer: Tensor) -> Any:
        """One row of `predict` as people read it, where answers are texts."""
        raise UsageError(f"{type(self).__name__} answers with scores of classes, not with texts")
