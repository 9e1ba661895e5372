"""What a continual-learning method is."""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.fit import FitConfig, Groups
from perpetune.heads.base import Head
from perpetune.models.base import Model
from perpetune.pets import InForce, parameters, sets, using
from perpetune.protection.protection import Protection
from perpetune.runtime import Companion
from perpetune.tasks import Inputs, Task


@dataclass(frozen=True)
class Answers:
    """What a method says of some inputs.

    Attributes:
        scores: `(B, C)` over its classes: its answer. Where answers are texts, what `Model.predict` says.
        others: other ways in which it could answer, by name, each as `scores`; reported beside the answer.
        name: what the answer is called beside the others.
        gauges: numbers `(B,)` that say how it came to the answer, by name; their means are reported.
    """

    scores: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)
    gauges: Mapping[str, Tensor] = field(default_factory=dict)
    name: str | None = None


class Method(nn.Module, ABC):
    """Learns tasks one after another and predicts over every class seen so far.

    A method is a module: what it knows is its parameters, its buffers and the JSON-able value of
    `get_extra_state`, and nothing else is kept between tasks. In a module whose tensors change
    size, `set_extra_state` makes them the size that is about to be loaded.

    Options in the recipe are the keyword-only arguments of `__init__`; one of type `FitConfig` starts
    from the recipe's `train:` section. `unprotectable` says why `protect:` cannot go with it, where it
    cannot; `renewable` is true where its pet may be renewed before each task (`protect.renew`): it reads the pet from
    the model alone and keeps no copy that has to match. `several` is true where it can train the
    named sets of `pets:`. `needs_earlier_data` is for upper bounds only: such a method
    cannot take part in `update`, where earlier data are gone.

    Attributes:
        trained: names of the sets of pets that its optimizers train, task after task. `protect:` holds these, and the
            pass that shows it old features has all of them in force. By default all sets that were put in.
        answering: the sets that are in force at prediction, as `pets.using` takes them; None is the frozen net. By
            default those that are trained.
        private: names of sets that are trained and that no later task uses, so that `protect:` may leave them free.
        sometimes: names of those in `trained` that a task need not use (members of a pool).
        leaks: why old outputs move under `protect:` all the same, where the method is made so; else empty.
        protection: what keeps old answers as they are, where the recipe has a `protect:` section.
    """

    needs_earlier_data: bool = False
    unprotectable: str = ""
    renewable: bool = False
    several: bool = False
    fits: ClassVar[type[Model]] = Model  # type: ignore[type-abstract]
    """The kind of model it can train."""

    def __init__(self, model: Model):
        super().__init__()
        if not isinstance(model, self.fits):
            own = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
            kind = "classes: use head: ridge or another of classes" if self.fits.reads != ("texts",) else "head: lm"
            raise UsageError(f"method {own} is for a head of {kind}")
        self.model = model
        self.trained: tuple[str, ...] = tuple(sets(model))
        self.answering: InForce = self.trained or None
        self.private: tuple[str, ...] = ()
        self.sometimes: tuple[str, ...] = ()
        self.leaks = ""
        self.protection: Protection | None = None

    @property
    def classes(self) -> list[str]:
        """Names of the columns of `predict`, in order."""
        return self.model.classes

    @abstractmethod
    def learn(self, task: Task) -> None:
        """Learn from `task`; called once per task, in order. Usually calls `perpetune.fit.fit`, inside `training`."""

    def notes(self, task: Task) -> list[str]:
        """Sentences about how `task` will be learned that its user should read before; called before `learn`."""
        return self.model.notes(task)

    def predict(self, inputs: Inputs) -> Tensor:
        """Scores `(B, C)` over `classes` for images, uint8 `(B, 3, H, W)`; for texts see `Model.predict`."""
        with using(self.model, self.answering):
            return self.model.predict(inputs)

    def answers(self, inputs: Inputs) -> Answers:
        """`predict`, with what else is worth measuring of it."""
        return Answers(self.predict(inputs))

    def companions(self) -> list[Companion]:
        """What goes with every optimizer of its `learn`, in this order; a method that adds its own calls this first.

        The protection is the first: whoever comes later sees a step as it leaves it.
        """
        if self.protection is None:
            return []
        return [self._guard]

    def _guard(self, optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[object]:
        assert self.protection is not None
        self.protection.check_covers(optimizer, self.model, self.private)
        return self.protection.guard(optimizer)

    def groups(self, config: FitConfig, pets: Sequence[str] | None = None) -> Groups:
        """What `fit` trains: the sets of pets (those in `trained`, or the ones named), then the head, with their
        learning rates."""
        named = self.trained if pets is None else pets
        own = [p for name in named for p in parameters(self.model, name)]
        return [(own, config.lr), (self.model.trained(), config.head_lr or config.lr)]

    def among(self, inputs: Inputs, classes: Sequence[str]) -> Tensor:
        """Scores `(B, len(classes))` of inputs over these classes alone, learned or not.

        A class that was not learned has -inf, unless the head answers with any class by its name.
        """
        if self.model.any_class:
            with using(self.model, self.answering):
                return self.model.among(inputs, classes)
        scores, rows = self.predict(inputs), {name: i for i, name in enumerate(self.classes)}
        columns = [scores[:, rows[c]] if c in rows else scores.new_full((len(scores),), -torch.inf) for c in classes]
        return torch.stack(columns, dim=1)

    def features(self, inputs: Inputs) -> Tensor:
        """Features `(B, D)` as at prediction, by which their drift is measured."""
        with using(self.model, self.answering):
            return self.model.features(inputs)

    def facts(self) -> dict[str, Any]:
        """What is worth reporting of the task just learned, in JSON's types: by default that of its heads, by name."""
        heads = {name: m for name, m in self.named_modules() if isinstance(m, Head)}
        return {name: facts for name, m in heads.items() if (facts := m.facts())}

    def earlier(self) -> Iterable[Tensor]:
        """What was learned of earlier tasks and stays as it is while `fit` runs: its checkpoints leave it out."""
        return ()

    def acting(self, name: str | None) -> contextlib.AbstractContextManager[None]:
        """Inside, a set of pets is in force, with all that goes with it."""
        return using(self.model, name)

    def exported(self) -> Mapping[str, str | None]:
        """Sets of pets that can be used by themselves elsewhere, by the folder each is written to; `""` for one alone.

        None stands for the frozen net, whose head alone was trained.

        Raises:
            UsageError: there is none, or the answer is made of several.
        """
        found = set(sets(self.model))
        if not found:
            if not self.model.chooses:
                raise UsageError("there is nothing to export: the recipe has `pet: none`, so nothing was trained")
            return {"": None}
        answering = (self.answering,) if isinstance(self.answering, str) else self.answering
        if others := sorted(found - {answering[0]} if isinstance(answering, tuple) and len(answering) == 1 else found):
            raise UsageError(
                f"{type(self).__name__} answers with more than one set of pets ({', '.join(others)}), and "
                "PEFT's format holds one: use the state itself"
            )
        return {"": found.pop()}

    def observe(self, inputs: Inputs) -> None:
        """One pass of the model as at prediction but with the trained pets, so that what protection watches is seen."""
        with using(self.model, self.trained or None):
            self.model.observe(inputs)


@contextlib.contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Inside, the dropout of pets and heads acts; outside, `module` is in evaluation mode. Goes around `fit`."""
    module.train()
    try:
        yield
    finally:
        module.eval()
