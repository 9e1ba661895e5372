"""Features that other pets, or none, make of a task's examples: looked up where the examples are always the same."""

from __future__ import annotations

import torch
from torch import Tensor

from perpetune.models.base import Model
from perpetune.models.classifier import feature_table
from perpetune.pets import InForce, using
from perpetune.tasks import Batch, Task


class Teacher:
    """What some pets make of examples, without a gradient: of a batch, or of a whole task at once.

    Args:
        model: whose features are asked for.
        pets: the sets that are in force; None is the frozen net.
    """

    def __init__(self, model: Model, pets: InForce):
        self.model, self.pets = model, pets
        self._table: Tensor | None = None

    @torch.no_grad()
    def table(self, task: Task, batch_size: int) -> Tensor:
        """Features `(N, D)` of all training examples of a task as they look at evaluation, in one fixed order, so that
        a resumed run has the same bits."""
        with using(self.model, self.pets):
            return feature_table(task.train, batch_size, task.runtime, self.model.features)

    def keep(self, table: Tensor | None) -> Teacher:
        """Look features up in `table` from now on: where nothing about the examples is drawn. None asks each time."""
        self._table = table
        return self

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        """`(B, D)`, float32."""
        if self._table is not None:
            return rows_of(self._table, batch)
        with using(self.model, self.pets):
            return self.model.features(batch.inputs).float()


def rows_of(table: Tensor, batch: Batch) -> Tensor:
    """Of a table `(N, D)` of all examples the rows of those in a batch."""
    assert batch.numbers is not None
    return table[batch.numbers]
