"""Fine-tune the pet and the head on each task in turn: the baseline with no defence against forgetting."""

from __future__ import annotations

from torch import Tensor

from perpetune.fit import FitConfig, fit
from perpetune.methods.base import Method, training
from perpetune.models.classifier import ImageClassifier, Mask
from perpetune.pets import parameters, slots, using
from perpetune.tasks import Batch, Task


class FineTune(Method):
    """Trains the pet and the head on each task in turn, with nothing against forgetting.

    Args:
        model: with a pet injected under the name `default`, or with none (then only the head learns).
        train: how each task is trained.
        mask: the classes among which the loss compares; see `ImageClassifier`.
    """

    def __init__(self, model: ImageClassifier, *, train: FitConfig, mask: Mask = "task"):
        super().__init__(model)
        self.model: ImageClassifier = model
        self.train_config, model.mask = train, mask
        self.pet = "default" if any("default" in slot.pets for _, slot in slots(model)) else None

    def learn(self, task: Task) -> None:
        self.model.grow(task)
        config = self.train_config
        pet = parameters(self.model, self.pet) if self.pet else []
        head = list(self.model.head.parameters())
        with training(self.model):
            fit(self.loss, [(pet, config.lr), (head, config.head_lr or config.lr)], task, config)
        with using(self.model, self.pet):
            self.model.summarise(task, config.batch_size)

    def loss(self, task: Task, batch: Batch) -> Tensor:
        with using(self.model, self.pet):
            return self.model.loss(task, batch)

    def predict(self, inputs: Tensor) -> Tensor:
        with using(self.model, self.pet):
            return self.model.predict(inputs)
