"""Fine-tune the pet and the head on each task in turn: forgets, unless the recipe protects."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.fit import FitConfig, Groups, fit
from perpetune.methods.base import Method, training
from perpetune.models.base import Mask, Model
from perpetune.models.classifier import Classifier
from perpetune.pets import copy_set, draw_set, parameters, pets, remove, using
from perpetune.tasks import Batch, Task

PROTECTED = "protected"  # the sets of the protected copies have names that begin so, while free copies are trained


class FineTune(Method):
    """Trains the pet and the head on each task in turn. With `protect:` this is PEGP, without it the baseline.

    The paper of PEGP (arXiv:2405.13383) does not mention `head_first` and `merge`. Its released code has both beside
    the projection, and the results in its tables include them. A merged copy was free to move, so old outputs move with
    it; the certificate measures how far.

    Args:
        model: with one set of pets or several, which are all trained and answer together. Without pets only the head
            learns.
        train: how each task is trained.
        mask: the classes that the loss compares; see `Classifier`.
        head_first: from the second task on, the share of the epochs in which the head is trained alone; in the other
            epochs pet and head are trained. PEGP uses 0.6 on vision transformers.
        merge: from the second task on, a second copy is trained from the same start without protection, while a loss
            keeps its features near those of the protected copy. The pet becomes `(1 - merge)` times the protected and
            `merge` times the free copy. `falling` means `1 / (t + 1)` with `t` tasks learned before.
        merge_epochs: epochs of the free copy; None means as many as the protected copy has.

    Raises:
        UsageError: there is nothing to train, or `merge` or `head_first` is given for texts.
    """

    renewable = True
    several = True
    steady = True
    by_task = True

    def __init__(
        self,
        model: Model,
        *,
        train: FitConfig,
        mask: Mask = "task",
        head_first: Annotated[float, Field(ge=0, le=1)] = 0.0,
        merge: Annotated[float, Field(ge=0, le=1)] | Literal["falling"] = 0.0,
        merge_epochs: Annotated[int, Field(ge=1)] | None = None,
    ):
        super().__init__(model)
        self.train_config = train
        model.compare(mask)
        if not model.chooses and (merge or head_first):
            name = "merge" if merge else "head_first"
            raise UsageError(f"method finetune: {name} is for a head of classes; leave it out with head: lm")
        self.leaks = "merge mixes in a copy that was free to move" if merge else ""
        if merge:
            self.unaveraged = "mixes a free copy in with merge, which is an average already"
        self.head_first, self.merge, self.merge_epochs = head_first, merge, merge_epochs
        if not self.trained and not model.chooses and not model.trained():
            raise UsageError("pet: none leaves nothing to train in a language model: use pet: lora, or method: frozen")

    def notes(self, task: Task) -> list[str]:
        found = super().notes(task)
        sums = isinstance(self.model, Classifier) and self.model.head.statistics and self.model.mask == "task"
        if sums and len(task.classes) == 1 and self.trained:
            found.append(
                f"it has one class alone, {task.classes[0]!r}: the head learns it from its sums, but with mask `task` "
                "the loss compares nothing, so the pet is not trained"
            )
        return found

    def learn(self, task: Task) -> None:
        self.model.grow(task)
        config, later = self.train_config, task.index > 0
        for number, name in enumerate(self.trained if later else ()):
            draw_set(self.model, name, task.generator("own", number), of_task=True)
        both = self.groups(config)
        pet = both[0][0]
        epochs = config.epochs_of(task.index)
        alone = round(epochs * self.head_first) if later else 0
        before = [p.detach().clone() for p in pet]
        following = self.model.following(task, config.batch_size, self.features)
        with following, training(self.model), self.model.resting(task):
            fit(self.loss, both[1:], task, config.model_copy(update={"epochs": alone}), phase="head")
            fit(self.loss, both, task, config.model_copy(update={"epochs": epochs - alone}))
            if later and pet and self.merge:
                self._merge(task, before, both)
        with using(self.model, self.answering):
            self.model.summarise(task, config.batch_size)

    def loss(self, task: Task, batch: Batch) -> Tensor:
        with using(self.model, self.trained):
            return self.model.loss(task, batch)

    @torch.no_grad()
    def _merge(self, task: Task, before: Sequence[Tensor], groups: Groups) -> None:
        """Train a free copy from the values at the start of the task, and average it with the protected copy."""
        share = 1 / (task.index + 1) if self.merge == "falling" else self.merge
        epochs = self.merge_epochs or self.train_config.epochs_of(task.index)
        copies = tuple(f"{PROTECTED}-{name}" for name in self.trained)
        for name, copied in zip(self.trained, copies, strict=True):
            copy_set(self.model, name, copied)
            for pet in pets(self.model, copied):
                pet.eval()  # the features of the protected copy are computed without dropout
        try:
            free = groups[0][0]
            protected = [p for name in copies for p in parameters(self.model, name)]
            for p, start in zip(free, before, strict=True):
                p.copy_(start)
            config = self.train_config.model_copy(update={"epochs": epochs})
            with torch.enable_grad():
                fit(partial(self._free_loss, copies), groups, task, config, phase="free", guarded=False)
            for p, kept in zip(free, protected, strict=True):
                p.lerp_(kept, 1 - share)
        finally:  # a model with further sets could not load the state of the last finished task
            for name in copies:
                remove(self.model, name)

    def _free_loss(self, copies: tuple[str, ...], task: Task, batch: Batch) -> Tensor:
        """The loss of the free pets. One term keeps their features near those of the protected `copies`."""
        assert isinstance(self.model, Classifier)
        with torch.no_grad(), using(self.model, copies):
            wanted = self.model.tuned(batch.inputs)
        with using(self.model, self.trained):
            features = self.model.tuned(batch.inputs)
        return self.model.head_loss(task, features, batch.targets) + F.mse_loss(features, wanted)
