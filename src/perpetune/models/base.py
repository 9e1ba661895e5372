"""The interface of a model: a frozen backbone, with a loss on a task's batches and a prediction."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from perpetune.data.sources import Kind
from perpetune.errors import UsageError
from perpetune.heads.base import Head
from perpetune.models.backbone import Backbone
from perpetune.tasks import Batch, Examples, Inputs, Task

Mask = Literal["task", "seen", "none"]


class Model(nn.Module, ABC):
    """The interface that methods see, the same for classifiers and language models.

    Raises:
        UsageError: the backbone takes a kind of examples that this model does not read.
    """

    reads: ClassVar[tuple[Kind, ...]] = ("pictures", "texts")
    """The kinds of examples that the model can read."""
    nothing: int = 0
    """The token that fills an answer after its end."""
    leaks: str = ""
    """Why old outputs move although the pets' directions are held; else empty."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        if backbone.takes not in self.reads:
            cure = "use `head: ridge` or another head that chooses among classes"
            raise UsageError(
                f"{backbone.spec} takes {backbone.takes}, and this head is for {self.reads[0]}: "
                f"{'use `head: vlm`' if backbone.takes == 'pictured' else cure}"
            )
        self.backbone = backbone
        self.view = copy.copy(backbone.preprocess)
        """Turns examples into the backbone's input. It is a copy, because each model sets its own options in it."""

    @property
    def takes(self) -> Kind:
        """The kind of examples that the model takes: pictures or texts."""
        return self.backbone.takes

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Names of the columns of `predict`, in order; empty if answers are texts."""

    @property
    def any_class(self) -> bool:
        """Whether `among` can answer with classes that were not learned."""
        return False

    def among(self, inputs: Inputs, classes: Sequence[str]) -> Tensor:
        """Scores `(B, len(classes))` of inputs over these classes, learned or not; only where `any_class`."""
        raise UsageError(f"{type(self).__name__} answers only with classes that it has learned")

    def gated(self, inputs: Inputs, classes: Sequence[str]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The scores of `among`, and the head's `gates` for these inputs."""
        return self.among(inputs, classes), {}

    @property
    def chooses(self) -> bool:
        """True if answers are scores over `classes`, False if they are texts."""
        return True

    def posed(self, task: Task) -> Task:
        """The task in the form in which this model learns it."""
        return task

    def admits(self, name: str, classes: Sequence[str]) -> None:
        """Raise UsageError if the model cannot learn a task with that name and these classes.

        Called before training.
        """

    def admits_captions(self, name: str) -> None:
        """Raise UsageError if the model cannot learn a task of pictures with captions. Called before training."""
        raise UsageError(f"task {name} has captions and no classes, and {type(self).__name__} learns none of them")

    def notes(self, task: Task) -> list[str]:
        """Sentences about how `task` will be learned that its user should read before; called before `grow`."""
        return []

    @abstractmethod
    def grow(self, task: Task) -> None:
        """Add the classes of `task` that are new."""

    def compare(self, among: Mask) -> None:
        """Set the classes that the training loss compares: those of the task, all seen so far, or all of the head.

        A model whose answers are texts ignores this.
        """

    @abstractmethod
    def loss(self, task: Task, batch: Batch) -> Tensor:
        """Mean training loss of a batch of `task`, a scalar; the mean is weighted by the weights of the examples."""

    @abstractmethod
    def features(self, inputs: Inputs) -> Tensor:
        """Features `(B, D)` of inputs, computed with the pets in force."""

    @abstractmethod
    def predict(self, inputs: Inputs) -> Tensor:
        """Scores `(B, C)` over `classes`.

        If answers are texts: scores `(B, K)` of each question's options, -inf where a question has fewer than `K`; or,
        without options, the tokens `(B, M)` of the answers, int64.
        """

    @abstractmethod
    def summarise(self, task: Task, batch_size: int) -> None:
        """Learn from statistics in one pass over the task's training data. A model without statistics does nothing."""

    @contextlib.contextmanager
    def following(self, task: Task, batch_size: int, features: Callable[[Inputs], Tensor]) -> Iterator[None]:
        """Inside this context `features` are trained on `task`. Afterwards the model may move its sums over earlier
        tasks' features as the features have moved."""
        yield

    def observe(self, inputs: Inputs) -> None:
        """One forward pass as at prediction, with the head, for code that watches the features in the model."""
        self.predict(inputs)

    def take_out(self, part: Callable[[], tuple[Head | None, Head]], gone: Sequence[str], whole: bool) -> None:
        """Take a task or classes out of the head, exactly (`Head.take_out`).

        Raises:
            UsageError: it cannot be exact, or there is no head.
        """
        raise UsageError("a language model's output layer keeps nothing of single tasks that could be taken out")

    @property
    def vocabulary(self) -> list[str]:
        """Names of classes that it knows beside those that it has learned."""
        return []

    def sentences(self, classes: Sequence[str], examples: Examples | None = None) -> list[str]:
        """The texts that the model reads beside the examples of a task with these classes, each once: what its head
        reads of their names, or captions."""
        return []

    def observe_texts(self, sentences: Sequence[str]) -> None:
        """One pass of the text tower over sentences, for code that watches the features in the model."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained by gradient, beside those of the pets."""
        return []

    def per_class(self) -> list[nn.Parameter]:
        """Those of `trained()` that have one row for each class, in the order of `classes`."""
        return []

    @contextlib.contextmanager
    def resting(self, task: Task) -> Iterator[None]:
        """Inside this context the model is trained on `task`. Parameters that only other tasks use are unchanged
        afterwards."""
        yield

    def reset(self) -> None:
        """Forget everything that was learned outside of the pets."""

    def read(self, answer: Tensor) -> Any:
        """One row of `predict` in the form that people read.

        Raises:
            UsageError: answers are scores of classes, not texts.
        """
        raise UsageError(f"{type(self).__name__} answers with scores of classes, not with texts")
