"""What is tuned: a frozen pretrained model with a loss on a task's batches and a prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from perpetune.tasks import Batch, Task


class Model(nn.Module, ABC):
    """The interface that methods see, the same for image classifiers and language models."""

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Names of the columns of `predict`, in order."""

    @abstractmethod
    def grow(self, task: Task) -> None:
        """Make room for the classes of `task`."""

    @abstractmethod
    def loss(self, task: Task, batch: Batch) -> Tensor:
        """Mean training loss of a batch of `task`, a scalar."""

    @abstractmethod
    def features(self, inputs: Tensor) -> Tensor:
        """Features `(B, D)` of inputs, by the pet that is active."""

    @abstractmethod
    def predict(self, inputs: Tensor) -> Tensor:
        """Scores `(B, C)` over `classes`."""

    @abstractmethod
    def summarise(self, task: Task, batch_size: int) -> None:
        """One pass over the task's training data for what is learned from statistics, if anything is."""
