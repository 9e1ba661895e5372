"""The interface of a continual-learning method."""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perpetune.averages.average import Average
from perpetune.errors import UsageError
from perpetune.fit import FitConfig, Groups
from perpetune.heads.base import Head
from perpetune.models.base import Model
from perpetune.pets import PET, InForce, parameters, sets, using
from perpetune.protection.protection import Protection
from perpetune.runtime import Companion
from perpetune.tasks import Inputs, Task


@dataclass(frozen=True)
class Answers:
    """The answers of a method to a batch of inputs.

    Attributes:
        scores: its answer, `(B, C)` over its classes. If answers are texts, the result of `Model.predict`.
        others: other answers that the method could give, by name, each in the form of `scores`; the report shows them
            beside the answer.
        name: the name of the answer in the report, beside the others.
        members: where a method chooses among members for each input: their names, and int64 `(B, k)`, the numbers of
            the chosen ones. The report shows how often each was used, and whether it was that of the input's task.
        gauges: numbers `(B,)` that describe how the method found the answer, by name; the report shows their means.
        gates: yes or no, bool `(B,)`, about how the answer was found, by name, such as whether a head that falls back
            on names let what it has learned speak; the report shows how often, and how often the answer is right then.
    """

    scores: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)
    gauges: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    name: str | None = None
    members: tuple[Sequence[str], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Resting:
    """One set of pets at rest, with its rows of the head. Another object stands for it when its values change, so a
    state need not look at the values to know what it has stored already.

    Attributes:
        pets: its pets, each by the path of its tensors in the method.
        rows: further tensors that belong to it, such as its rows of the head, by their path in the method.
    """

    pets: Mapping[str, PET]
    rows: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All of its tensors, by their paths in the method."""
        of_pets = ((path, pet.state_dict(keep_vars=True)) for path, pet in self.pets.items())
        return {f"{path}.{key}": t for path, named in of_pets for key, t in named.items()} | dict(self.rows)


class Method(nn.Module, ABC):
    """Learns tasks one after another and predicts over every class seen so far.

    A method is a module. Everything that it keeps between tasks is in its parameters, its buffers and the JSON-able
    value of `get_extra_state`. If a module's tensors change their size, its `set_extra_state` gives them the size that
    is about to be loaded.

    Options in the recipe are the keyword-only arguments of `__init__`; an option of type `FitConfig` starts from the
    recipe's `train:` section. Class attributes: `unprotectable` is the reason why `protect:` cannot be used with the
    method, else empty. `unaveraged` is the same for `average:`, and `steady` is True if every task trains the same sets
    from where the last one left them, and `predict` is that of this class: then an average can live on between tasks.
    `renewable` is True if its pets may be renewed before each task (`protect.renew`); then it reads
    the pets only from the model and keeps no copy of them. `several` is True if it can train the named sets of `pets:`.
    `needs_earlier_data` is for upper bounds only: `update` refuses such a method, because it has no earlier data.

    Attributes:
        trained: names of the sets of pets that its optimizers train, task after task. `protect:` holds these sets, and
            they are all in force when protection observes old features. By default all sets in the model.
        answering: the sets that are in force at prediction, as `pets.using` takes them; None is the frozen net. By
            default the trained sets.
        private: names of sets that are trained but that no later task uses; `protect:` may leave them free.
        sometimes: names of those sets in `trained` that a task need not use (members of a pool).
        leaks: the reason why old outputs move under `protect:` although the sites are held, else empty.
        protection: the protection of old answers; None unless the recipe has a `protect:` section.
        average: the average of the pets; None unless the recipe has an `average:` section.
    """

    needs_earlier_data: bool = False
    unprotectable: str = ""
    unaveraged: str = ""
    steady: bool = False
    renewable: bool = False
    several: bool = False
    by_task: bool = False
    """Whether it gives each task new values of pets of which each has its own (`context` with `share: task`)."""
    fits: ClassVar[type[Model]] = Model  # type: ignore[type-abstract]
    """The class of models that it can train."""

    def __init__(self, model: Model):
        super().__init__()
        if not isinstance(model, self.fits):
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
            kind = "classes: use head: ridge or another of classes" if self.fits.reads != ("texts",) else "head: lm"
            raise UsageError(f"method {name} is for a head of {kind}")
        self.model = model
        self.trained: tuple[str, ...] = tuple(sets(model))
        self.answering: InForce = self.trained or None
        self.private: tuple[str, ...] = ()
        self.sometimes: tuple[str, ...] = ()
        self.leaks = ""
        self.protection: Protection | None = None
        self.average: Average | None = None

    @property
    def classes(self) -> list[str]:
        """Names of the columns of `predict`, in order."""
        return self.model.classes

    @abstractmethod
    def learn(self, task: Task) -> None:
        """Learn from `task`. Called once for each task, in order.

        Usually calls `perpetune.fit.fit` inside `training`.
        """

    def task_begins(self, task: Task) -> None:
        """Called before `learn`, each time it is called for a task."""
        if self.average is not None:
            self.average.begin(task.index)

    def depends(self, task: int) -> str:
        """Why what was learned after a task, of this number, depends on it, so that it cannot be taken out exactly.
        Empty if only sums in the head hold the task, which `Head.take_out` can subtract."""
        return "it trains on each task from where the one before left it"

    def take_out(
        self, task: str, part: Callable[[], tuple[Head | None, Head]], gone: Sequence[str], whole: bool
    ) -> None:
        """Take a task out of what was learned, exactly. Nothing else depends on it (`depends`).

        Args:
            task: its name.
            part: see `Head.take_out`.
            gone: see `Head.take_out`.
            whole: see `Head.take_out`.

        Raises:
            UsageError: the head cannot do it exactly.
        """
        self.model.take_out(part, gone, whole)

    def task_measured(self) -> None:
        """Called when the task is learned and measured, before it is stored."""
        if self.average is not None:
            self.average.put_away()

    def notes(self, task: Task) -> list[str]:
        """Sentences about how `task` will be learned that its user should read before; called before `learn`."""
        return self.model.notes(task)

    def predict(self, inputs: Inputs) -> Tensor:
        """Scores `(B, C)` over `classes` for pictures, uint8 `(B, 3, H, W)`; for texts see `Model.predict`."""
        with using(self.model, self.answering):
            return self._asked(lambda: self.model.predict(inputs))

    def answers(self, inputs: Inputs) -> Answers:
        """The prediction, with other answers and numbers for the report if the method has some."""
        if self.average is None or not self.average.compared:
            return Answers(self.predict(inputs))
        with using(self.model, self.answering):
            (name, scores), *others = self.average.ways(lambda: self.model.predict(inputs)).items()
        return Answers(scores, dict(others), name=name if others else None)

    def _asked(self, call: Callable[[], Tensor]) -> Tensor:
        """The result of `call()`, or with `average.answer: both` that of both sets of values of the pets."""
        return call() if self.average is None else self.average.ask(call)

    def told(self, inputs: Inputs, task: str) -> Tensor | None:
        """What the method would answer if it knew the task of the inputs, in the form of `predict`; None by default.

        This is a bound for evaluation (`evaluate.told`). No prediction uses it.
        """
        return None

    def companions(self) -> list[Companion]:
        """Functions that make a context manager around each optimizer in `learn`, in this order.

        A method that adds its own calls this first. Protection is the first one, so the later ones see a step after
        protection has changed it; the average of the recipe is the second.
        """
        found: list[Companion] = [] if self.protection is None else [self._guard]
        return found if self.average is None else [*found, self.average.beside]

    def _guard(self, optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[object]:
        assert self.protection is not None
        self.protection.check_covers(optimizer, self, self.private)
        return self.protection.guard(optimizer)

    def groups(self, config: FitConfig, pets: Sequence[str] | None = None) -> Groups:
        """The parameter groups for `fit`: the sets of pets (`trained`, or those in `pets`), then the head, each with
        its learning rate."""
        named = self.trained if pets is None else pets
        pet_parameters = [p for name in named for p in parameters(self.model, name)]
        return [(pet_parameters, config.lr), (self.model.trained(), config.head_lr or config.lr)]

    def among(self, inputs: Inputs, classes: Sequence[str]) -> Tensor:
        """Scores `(B, len(classes))` of inputs over these classes alone, learned or not.

        A class that was not learned has -inf, unless the head answers with any class by its name.
        """
        return self.named(inputs, classes).scores

    def named(self, inputs: Inputs, classes: Sequence[str]) -> Answers:
        """The answers among these classes alone, as `among` scores them, with what else the head says of them."""
        if self.model.any_class:
            with using(self.model, self.answering):
                # `average.answer: both` asks for both sets of values; a gate is that of the one asked last
                gates: Mapping[str, Tensor] = {}

                def asked() -> Tensor:
                    nonlocal gates
                    scores, gates = self.model.gated(inputs, classes)
                    return scores

                scores = self._asked(asked)
            return Answers(scores, gates=gates)
        scores, rows = self.predict(inputs), {name: i for i, name in enumerate(self.classes)}
        columns = [scores[:, rows[c]] if c in rows else scores.new_full((len(scores),), -torch.inf) for c in classes]
        return Answers(torch.stack(columns, dim=1))

    def features(self, inputs: Inputs) -> Tensor:
        """Features `(B, D)` as at prediction. Their drift over the tasks is measured with them."""
        with using(self.model, self.answering):
            return self.model.features(inputs)

    def facts(self) -> dict[str, Any]:
        """Facts for the report about the task just learned, in JSON's types. By default those of its heads and of its
        average, by name."""
        about = {name: m for name, m in self.named_modules() if isinstance(m, Head | Average)}
        return {name: facts for name, m in about.items() if (facts := m.facts())}

    def earlier(self) -> Iterable[Tensor]:
        """Tensors of earlier tasks that do not change while `fit` runs. The checkpoints of `fit` leave them out."""
        return ()

    def resting(self) -> Mapping[str, Resting]:
        """Sets of pets that do not change any more, by name. A state stores each once, in the task that brings it."""
        return {}

    def restored(self) -> None:
        """Called when stored values have been loaded: make anew what follows from them and is not stored."""

    def acting(self, name: str | None) -> contextlib.AbstractContextManager[None]:
        """Inside, a set of pets is in force, with all that goes with it."""
        return using(self.model, name)

    def exported(self) -> Mapping[str, str | None]:
        """Sets of pets that can be used by themselves elsewhere, by the folder each is written to; `""` for one alone.

        None stands for the frozen net, whose head alone was trained.

        Raises:
            UsageError: there is no set, or the method answers with several sets.
        """
        names = set(sets(self.model))
        if not names:
            if not self.model.chooses and not self.model.trained():
                raise UsageError("there is nothing to export: the recipe has `pet: none`, so nothing was trained")
            return {"": None}
        if self.average is not None and self.average.config.answer == "both":
            raise UsageError(
                "average.answer: both answers with the average and the online pets, and an export holds one set: "
                "use the state itself"
            )
        answering = (self.answering,) if isinstance(self.answering, str) else self.answering
        if others := sorted(names - {answering[0]} if isinstance(answering, tuple) and len(answering) == 1 else names):
            raise UsageError(
                f"{type(self).__name__} answers with more than one set of pets ({', '.join(others)}), and PEFT's "
                "format and merged weights hold one: for pictures use `--to onnx`, else the state itself"
            )
        return {"": names.pop()}

    @property
    def one_graph(self) -> bool:
        """Whether every example takes the same computation with the same values, so that `predict` is one graph."""
        return self.average is None or self.average.config.answer != "both"

    def exported_selector(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What chooses among the sets of `exported` for each example: its tensors, and the rest in JSON's types.

        None if nothing chooses.
        """
        return None

    def from_earlier(self, extra: dict[str, Any]) -> dict[str, str]:
        """Change the extra state of an earlier version, by module, into today's.

        Returns:
            How names of tensors begin today, by how they began then.
        """
        return {}

    def observe(self, inputs: Inputs) -> None:
        """One pass of the model as at prediction but with the trained pets in force, so that protection can watch
        their features."""
        with using(self.model, self.trained or None):
            self.model.observe(inputs)

    def observe_texts(self, sentences: Sequence[str]) -> None:
        """As `observe`, for the texts that the model reads beside its inputs."""
        with using(self.model, self.trained or None):
            self.model.observe_texts(sentences)


@contextlib.contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Inside this context `module` is in training mode, so the dropout of pets and heads acts; afterwards it is in
    evaluation mode. Put it around `fit`."""
    module.train()
    try:
        yield
    finally:
        module.eval()
