"""The interface of a kind of example for the rules: it makes a small model, tasks, and questions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from perpetune.models.backbone import Backbone
from perpetune.runtime import Runtime
from perpetune.tasks import Examples, Inputs, Task

CLASSES: Sequence[Sequence[str]] = (("a", "b"), ("c", "d"), ("e", "f"))


class Untouchable(Examples):
    """Test data that a method must not read; every access raises AssertionError."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":  # `isinstance` reads this
            return Untouchable
        raise AssertionError(f"the method read the test data ({name})")

    def __len__(self) -> int:
        raise AssertionError("the method read the test data")

    def load(self, index: int, seed: int | None) -> Any:
        raise AssertionError("the method read the test data")


class TinyKind(ABC):
    """Makes small models and tasks, so that a method learns the stream in a fraction of a second."""

    name: ClassVar[str]

    @abstractmethod
    def backbone(self) -> Backbone:
        """A new backbone, not shared with anyone; its weights are always the same."""

    @abstractmethod
    def examples(self, classes: Sequence[str], each: int, seed: int) -> Examples:
        """`each` examples of each class."""

    @abstractmethod
    def asked(self, classes: Sequence[str]) -> Inputs:
        """Three new examples of each class, as inputs of a method's `predict`."""

    def stream(self, runtime: Runtime, classes: Sequence[Sequence[str]] = CLASSES) -> list[Task]:
        """Tasks of twelve examples a class, with test data that raise an error if they are read."""
        return [
            Task(i, f"task-{i + 1}", tuple(names), self.examples(names, 12, i), test=Untouchable(), runtime=runtime)
            for i, names in enumerate(classes)
        ]
