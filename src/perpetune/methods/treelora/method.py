"""TreeLoRA: an adapter for each task, and a tree that finds the earlier tasks most similar to the present one.

Qian et al., ICML 2025, arXiv:2506.10355. This follows the paper; docs/treelora.md lists where its released code
differs.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.fit import FitConfig, fit
from perpetune.methods.base import Answers, Method, Resting, training
from perpetune.methods.parts.bank import set_name
from perpetune.methods.parts.probe import gradients_of
from perpetune.methods.treelora.adapters import LoRABank
from perpetune.methods.treelora.memory import TaskTree
from perpetune.methods.treelora.search import Kind, Search
from perpetune.methods.treelora.sketch import GradientSketch, in_groups
from perpetune.models.base import Mask, Model
from perpetune.models.classifier import Classifier, feature_table
from perpetune.numerics.handover import Late
from perpetune.numerics.signature import RunningMean, normalised
from perpetune.pets import has_set, parameters, using
from perpetune.selectors import Selection
from perpetune.selectors.means import row_name
from perpetune.tasks import Batch, Inputs, Task, balanced

Mode = Literal["last", "merged", "routed"]
MODES: tuple[Mode, ...] = ("last", "merged", "routed")
DEFAULT, MERGED = "default", "merged"
DRAWN = 64
"""Reports show trees of up to so many tasks. The facts of a larger one would grow with the square of the tasks."""


class TreeLoRA(Method):
    """Trains a LoRA for each task and keeps it. A loss draws it towards the LoRAs of similar earlier tasks.

    Every task has a signature: the sketched mean of its gradients with respect to LoRA's `B` in a fixed basis
    (`GradientSketch`). The signatures are stored in a tree whose levels are groups of layers. At each step a search by
    lower confidence bounds picks an earlier task, and the term `λ mean_l (1 − cos(ΔW_l, ΔW'_l))` is added to the loss.
    It draws the update of each module towards that of the picked task; in shallow layers towards the task in the middle
    of its branch. The term is in [0, 2λ]. Modules with a very small update count less (`LoRABank.alignment`). With
    `regularise: 0` and `start: last` the method gives the same bits as `finetune`.

    Args:
        model: with LoRA injected under the name `default`.
        train: how each task is trained.
        mask: the classes that a classifier's loss compares; see `Classifier`.
        regularise: `λ`; with 0 there is no search.
        start: the adapter from which a task starts: that of the `nearest` task, of the `last` task, or a `fresh` one.
        answer: the adapter that predicts: that of the `last` task, all of them `merged` into one, or `routed`, which
            chooses a task for each input. The method is never given the task of an input. The report shows the other
            two answers as well.
        select: the selector that chooses, by features of the bare backbone. `means` chooses the task with the nearest
            prototype, the mean feature of one class of a task. Any other that learns from statistics fits.
        search: how the task of each step is picked: by lower confidence bounds (`lcb`), or the `nearest` of all;
            `random` and `farthest` are controls.
        confidence: the factor `c` of the bounds.
        probe: the number of batches whose gradients find the nearest task before the first step.
        prototypes: the most examples of a task, balanced over its classes, that the selector learns from; None is all.
        every: the signature is updated every so many steps.
        size: the numbers in a signature for each module.
        groups: the number of groups of layers, from shallow to deep; each is a level of the tree.
        budget: the most adapters that are kept. Above it the adapters of the two nearest tasks are merged. None keeps
            all.

    Raises:
        UsageError: there is no pet, or the pet is not LoRA; or the selector does not learn from statistics.
    """

    def __init__(
        self,
        model: Model,
        *,
        train: FitConfig,
        mask: Mask = "task",
        regularise: Annotated[float, Field(ge=0)] = 0.1,
        start: Literal["nearest", "last", "fresh"] = "nearest",
        answer: Mode = "routed",
        select: Selection = Selection(name="means"),
        search: Kind = "lcb",
        confidence: Annotated[float, Field(ge=0)] = 0.3,
        probe: Annotated[int, Field(ge=1)] = 8,
        prototypes: Annotated[int, Field(ge=1)] | None = 2000,
        every: Annotated[int, Field(ge=1)] = 1,
        size: Annotated[int, Field(ge=1)] = 256,
        groups: Annotated[int, Field(ge=1)] = 4,
        budget: Annotated[int, Field(ge=1)] | None = None,
    ):
        super().__init__(model)
        if not has_set(model, DEFAULT):
            raise UsageError("method treelora tunes LoRA, but the recipe has no pet: use `pet: lora`")
        if isinstance(model, Classifier) and model.head.carry:
            raise UsageError(
                "method: treelora has different features for each task, so a head cannot move its sums along with "
                "them: "
                "leave head.carry out, or use method: finetune or olora"
            )
        if not select.kind.statistics:
            raise UsageError(
                f"method: treelora: select: {select.name} learns nothing from the features of a finished task: use "
                "means, gaussian, centres or classifier"
            )
        model.compare(mask)
        self.train_config, self.regularise, self.start, self.answer = train, regularise, start, answer
        if start != "last":  # protection holds one set of pets in place, so each task has to start from it
            self.unprotectable = f"starts tasks from other adapters with start: {start}; protect: needs start: last"
        self.kind, self.confidence, self.probe, self.every = search, confidence, probe, every
        self.prototypes = prototypes
        self.gradients = GradientSketch(model, DEFAULT, size=size)
        blocks = [int(number[1]) if (number := re.search(r"\.(\d+)(\.|$)", n)) else -1 for n in self.gradients.names]
        self.layers, self.layer_names = in_groups(self.gradients.names, blocks, groups)
        self.similar = TaskTree(self.layers, self.gradients.shape)
        self.bank = LoRABank(model, DEFAULT, budget, lambda slot: self.similar.beside(slot, "similar"))
        self.selector = select.make(model.backbone.dim)
        self.tasks: list[str] = []
        """The task of each member of the selector."""
        self.mean = RunningMean(self.gradients.shape)
        self._begun()

    def _begun(self) -> None:
        """Reset everything that belongs to one task."""
        self.mean.reset()
        self.steps = 0
        """The optimizer's steps in this task."""
        self.search: Search | None = None
        """The search for the task to which each step is drawn; None without one."""
        self._seen: tuple[Late, float, int] | None = None  # the gradient of the last step, its scale and examples
        self.drawn: int | None = None
        """The picked task for which the bank is prepared."""
        self.task_facts: dict[str, Any] = {"start": None, "asked": self.start, "helped": [], "merged": []}

    # -- learning -------------------------------------------------------------------------------------

    def learn(self, task: Task) -> None:
        self.model.grow(task)
        config = self.train_config
        self._begin(task)
        with training(self.model), self.model.resting(task), self.gradients.on():
            fit(self.loss, self.groups(config), task, config, each_step=lambda count: self._look(task, count))
        self._keep(task)
        with using(self.model, DEFAULT):
            self.model.summarise(task, config.batch_size)
        self._prototypes(task)

    def loss(self, task: Task, batch: Batch) -> Tensor:
        self.gradients.listening = (self.steps + 1) % self.every == 0
        loss = self._bare_loss(task, batch)
        self._look_closer()
        if self.search is None:
            return loss
        if self.drawn != self.search.picked:
            helpers = zip(self.layers, self.search.helpers(), strict=True)
            self.bank.draw_to({module: helper for layer, helper in helpers for module in layer})
            self.drawn = self.search.picked
        return loss + self.regularise * (1 - self.bank.alignment())

    def _begin(self, task: Task) -> None:
        """Choose the adapter from which the task starts, and prepare the search."""
        self._begun()
        tree = self.similar.tree
        if not len(tree):
            return
        if self.start == "last":
            self.task_facts["start"] = self.tasks[-1]
        if self.start == "nearest" or self.regularise > 0:
            signature = normalised(self._probed(task))  # the adapter has the values of the last task here
            far = tree.far(signature)
            if self.start == "nearest":
                nearest = tree.ids[int(far.numpy().argmin())]  # of several the first one
                self.bank.load(nearest)
                self.task_facts["start"] = self.bank.called(nearest)
            if self.regularise > 0:
                self.search = Search(tree, self.kind, self.confidence, task.seed_of("search"), signature, far)
        if self.start == "fresh":
            self.bank.reset()

    @torch.enable_grad()
    def _probed(self, task: Task) -> Tensor:
        """The sketched gradient `(L, k)` of a few batches with the present adapter, up to a factor."""
        run = task.runtime
        with training(self.model), self.gradients.on():
            self.gradients.listening = True
            gradients_of(self._bare_loss, parameters(self.model, DEFAULT), task, self.train_config, self.probe)
            return run.sum(self.gradients.take().to(run.device)).cpu()

    def _bare_loss(self, task: Task, batch: Batch) -> Tensor:
        with using(self.model, DEFAULT):
            return self.model.loss(task, batch)

    def _look(self, task: Task, count: int) -> None:
        """Called after the gradient of a step: add it to the signature, and choose the task for the next step.

        Args:
            count: the number of examples in the step.
        """
        self._look_closer()
        self.steps += 1
        if self.gradients.listening:
            run, scaler = task.runtime, task.runtime.accelerator.scaler
            gradient = Late(run.sum(self.gradients.take().to(run.device)))
            self._seen = gradient, scaler.get_scale() if scaler is not None else 1.0, count
        elif self.search is not None:
            self.search.step(None)

    def _look_closer(self) -> None:
        """The rest of `_look`, which needs the values: called when the next step is under way on the device."""
        if self._seen is None:
            return
        (late, scale, count), self._seen, signature = self._seen, None, None
        gradient = late.read()
        # After an overflow the step is skipped, or `fit` ends with an error
        if bool(torch.isfinite(gradient).all()):
            self.mean.update(gradient / scale, count)
            signature = normalised(self.mean.value)
        if self.search is not None:
            self.search.step(signature)

    def _keep(self, task: Task) -> None:
        """Store the adapter and the signature, and merge adapters above the budget."""
        self._look_closer()
        similar, bank = self.similar, self.bank
        tree = similar.tree
        if self.search is not None:
            self.task_facts["helped"] = [
                {"group": name, "steps": {bank.called(helper): n for helper, n in counts.items()}}
                for name, counts in zip(self.layer_names, self.search.counts, strict=True)
            ]
        bank.keep(similar.insert(normalised(self.mean.value)), task.name, task.classes, len(task.train))
        while (pair := bank.over(tree)) is not None:
            kept, gone = pair
            self.task_facts["merged"].append([bank.called(kept), bank.called(gone)])
            share = bank.weight(gone) / (bank.weight(kept) + bank.weight(gone))
            middle = torch.lerp(tree.point(kept), tree.point(gone), share)
            bank.merge(kept, gone)
            similar.merge(kept, gone, normalised(middle))
        bank.merge_all(MERGED)
        if similar.store():
            bank.renewed()
        self.search = None

    def _prototypes(self, task: Task) -> None:
        """Let the selector learn features of the task's examples by the bare backbone."""
        if task.name not in self.tasks:
            self.tasks.append(task.name)
        member = self.tasks.index(task.name)
        count = len(task.train) if self.prototypes is None else self.prototypes
        some = balanced(task.train.questions(), count, task.generator("prototypes"))
        with using(self.model, None):
            queries = feature_table(some, self.train_config.batch_size, task.runtime, self.model.features)
        rng, targets = task.generator("router"), torch.tensor(some.targets)
        self.selector.grow(member + 1, rng, queries)
        self.selector.learn(member, queries, targets, task.classes or ("",), rng)

    # -- predicting -----------------------------------------------------------------------------------

    def predict(self, inputs: Inputs) -> Tensor:
        return self._by(self.answer, inputs)

    def answers(self, inputs: Inputs) -> Answers:
        others: dict[str, Tensor] = {mode: self._by(mode, inputs) for mode in MODES if mode != self.answer}
        return Answers(self.predict(inputs), others, name=self.answer)

    def features(self, inputs: Inputs) -> Tensor:
        if self.tasks and self.answer == "routed":
            return self.bank.features(inputs, self._routes(inputs))
        with self.bank.acting(self._set(self.answer)):
            return self.model.features(inputs)

    def _by(self, mode: Mode, inputs: Inputs) -> Tensor:
        if self.tasks and mode == "routed":
            return self.bank.predict(inputs, self._routes(inputs))
        with self.bank.acting(self._set(mode)):
            return self.model.predict(inputs)

    def _set(self, mode: Mode) -> str:
        """The set of pets that answers; before the first task, when exams are asked, there is only one."""
        return DEFAULT if mode == "last" or not self.tasks else MERGED

    def _routes(self, inputs: Inputs) -> list[int]:
        """For each input the number of the adapter of the task that the selector chooses."""
        with using(self.model, None):
            features = self.model.features(inputs)
        slot_of = self.bank.by_task()
        return [slot_of[self.tasks[member]] for member in self.selector.choose(features).index[:, 0].tolist()]

    def earlier(self) -> Iterable[Tensor]:
        return [*self.similar.buffers(), *self.selector.buffers(recurse=False)]

    def resting(self) -> Mapping[str, Resting]:
        return self.bank.resting()

    def restored(self) -> None:
        self.similar.reloaded()
        self.bank.reloaded()

    def acting(self, name: str | None) -> contextlib.AbstractContextManager[None]:
        return super().acting(None) if name is None else self.bank.acting(name)

    @property
    def one_graph(self) -> bool:
        return self.answer != "routed" and super().one_graph

    def exported(self) -> dict[str, str]:
        """The working set or the merged one. If answers are routed, the set of each task under the task's name, and the
        merged one."""
        if self.answer == "routed":
            by_task = {"+".join(kept.tasks): set_name(slot) for slot, kept in self.bank.kept.items()}
            return {**by_task, MERGED if MERGED not in by_task else f"all-{MERGED}": MERGED}
        return {"": DEFAULT if self.answer == "last" else MERGED}

    # -- reporting and storing ------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Under `tree`: the tree after the task, as long as it can be drawn, and what is kept."""
        tree, adapters = self.similar.tree, self.bank.facts()
        facts: dict[str, Any] = {
            "kind": "similarity tree",
            "tasks": len(tree.ids),
            "kept": {"adapters": len(adapters), "bytes": sum(adapter["bytes"] for adapter in adapters)},
            "groups": self.layer_names,
            **self.task_facts,
            "signature_bytes": 4 * self.gradients.shape[0] * self.gradients.shape[1],
        }
        if len(tree.ids) <= DRAWN:
            distances = [[round(value, 4) for value in row] for row in tree.distances.tolist()]
            names = {str(i): self.bank.called(i) for i in tree.ids}
            facts |= {"names": names, "nodes": tree.nodes(), "distances": distances, "adapters": adapters}
        return {**super().facts(), "tree": facts}

    def get_extra_state(self) -> dict[str, Any]:
        self._look_closer()
        search = self.search.state() if self.search is not None else None
        return {"steps": self.steps, "told": self.task_facts, "search": search, "tasks": self.tasks}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._seen = None  # what was open in a task that failed
        self.steps, self.task_facts, self.drawn = state["steps"], state["told"], None
        self.tasks = [str(name) for name in state["tasks"]]
        if state["search"] is None:
            self.search = None
        elif self.search is not None:  # the task was stopped in the middle, and `_begin` has started it again
            self.search.load_state(state["search"])

    def from_earlier(self, extra: dict[str, Any]) -> dict[str, str]:
        """Before there were selectors, a head `router` had the means, and its classes were called `TASK/CLASS`."""
        if "router" not in extra:
            return {}
        means = "selector.means"
        pairs = [name.partition("/")[::2] for name in extra.pop("router")["classes"]]
        tasks = list(dict.fromkeys(task for task, _ in pairs))
        rows = [(tasks.index(task), name) for task, name in pairs]
        extra[""]["tasks"] = tasks
        extra["selector"] = {"members": len(tasks), "rows": [list(row) for row in rows]}
        extra["selector"]["owners"] = {name: member for member, name in rows}
        extra[means] = {"classes": [row_name(*row) for row in rows]}
        extra[f"{means}.probe"] = extra.pop("router.probe")
        return {"router.": f"{means}."}
