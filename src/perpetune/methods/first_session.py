"""Tune on the first task, then keep the features and learn classes from statistics."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.fit import FitConfig, fit
from perpetune.methods.base import Method, training
from perpetune.models.base import Model
from perpetune.models.classifier import Classifier, learn_statistics
from perpetune.pets import sets, using
from perpetune.tasks import Batch, Inputs, Task


class FirstSession(Method):
    """Trains the pet on the first task only; later tasks only add to the statistics of the head.

    With head `ridge` this is RanPAC, McDonnell et al. 2023, arXiv:2307.02251; with `ncm` and `concat` it is APER
    (once called ADAM), Zhou et al. 2023, arXiv:2303.07338. Features never change again, so nothing is forgotten.

    Args:
        model: with one set of pets or several, and a head of statistics.
        train: how the first task is trained.
        concat: give the head `[f; f']`, the features of the frozen model and the tuned ones; needs two forward passes.

    Raises:
        UsageError: there is no pet, or the head does not learn from statistics.
    """

    fits: ClassVar[type[Model]] = Classifier
    unaveraged = "trains its pets in the first task alone, so an average has nothing to keep"
    several = True

    def __init__(self, model: Classifier, *, train: FitConfig, concat: bool = False):
        super().__init__(model)
        self.model: Classifier = model
        need_statistics("first_session", model)
        self.train_config, self.concat = train, concat
        if concat:
            model.head.widen(2 * model.head.dim)

    def depends(self, task: int) -> str:
        return "" if task else "its pets were trained on this task, and all later features come from them"

    def learn(self, task: Task) -> None:
        self.model.grow(task)
        config = self.train_config
        if task.index == 0:
            with training(self.model):
                fit(self.loss, self.groups(config), task, config)
        learn_statistics(task, config.batch_size, [(self.model.head, lambda batch: self.features(batch.inputs))])

    def loss(self, task: Task, batch: Batch) -> Tensor:
        with using(self.model, self.trained):
            return self.model.loss(task, batch)

    def features(self, inputs: Inputs) -> Tensor:
        tuned = super().features(inputs)
        if not self.concat:
            return tuned
        with using(self.model, None):
            return torch.cat([self.model.features(inputs), tuned], dim=-1)

    def observe(self, inputs: Inputs) -> None:
        self.predict(inputs)

    def predict(self, inputs: Inputs) -> Tensor:
        return self.model.scores(self.features(inputs))


def need_statistics(method: str, model: Classifier) -> None:
    """Raise UsageError unless the model has a pet and a head that learns from statistics."""
    if not sets(model):
        raise UsageError(f"method: {method} trains a pet, but the recipe has none: name one, or use method: frozen")
    if not model.head.statistics:
        name = type(model.head).__name__.lower()
        raise UsageError(f"method: {method} learns classes from statistics, but head {name} does not: use ridge or ncm")
