"""Features of a task's examples by other pets or by the frozen net, kept if the examples never change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from perpetune.models.base import Model
from perpetune.models.classifier import feature_table
from perpetune.numerics.handover import sent
from perpetune.pets import InForce, using
from perpetune.tasks import Batch, Inputs, Task


class Teacher:
    """Computes features with some pets in force, without gradients: of a batch, or of a whole task at once.

    Args:
        model: the model that computes the features.
        pets: the sets that are in force; None is the frozen net.
        ask: computes the features `(B, D)` of inputs; None is `model.features`.
    """

    def __init__(self, model: Model, pets: InForce, ask: Callable[[Inputs], Tensor] | None = None):
        self.model, self.pets = model, pets
        self._ask = ask or model.features
        self._table: Tensor | None = None

    @torch.no_grad()
    def table(self, task: Task, batch_size: int) -> Tensor:
        """Features `(N, D)` of all training examples of a task, in the form they have at evaluation.

        The order is fixed, so that a resumed run has the same bits.
        """
        with using(self.model, self.pets):
            return feature_table(task.train, batch_size, task.runtime, self._ask)

    def keep(self, table: Tensor | None) -> Teacher:
        """Use the features in `table` from now on. None computes them each time.

        A table may be used only if the examples have no random changes.
        """
        self._table = table
        return self

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        """Features of a batch, `(B, D)`, float32."""
        if self._table is not None:
            return rows_of(self._table, batch)
        return self.of(batch.inputs)

    @torch.no_grad()
    def of(self, inputs: Inputs) -> Tensor:
        """Features of inputs, `(B, D)`, float32, computed now."""
        with using(self.model, self.pets):
            return self._ask(inputs).float()


def rows_of(table: Tensor, batch: Batch) -> Tensor:
    """The rows of the examples in a batch, from a table `(N, D)` of all examples."""
    assert batch.numbers is not None
    return table[sent(batch.numbers, table.device)]
