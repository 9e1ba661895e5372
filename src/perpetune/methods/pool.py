"""A pool: several sets of pets, and a selector that chooses for each example which of them act."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from perpetune.errors import UsageError
from perpetune.fit import FitConfig, Groups, fit
from perpetune.heads.base import Head
from perpetune.methods.base import Answers, Method, Resting, training
from perpetune.methods.parts.bank import Bank, set_name
from perpetune.methods.parts.members import average_into, drawn_orthogonal
from perpetune.methods.parts.recall import Recall
from perpetune.methods.parts.repulsion import Repulsion
from perpetune.methods.parts.teacher import Teacher
from perpetune.models.base import Mask, Model
from perpetune.models.classifier import Classifier, learn_statistics
from perpetune.pets import Choice, InForce, copy_set, draw_set, parameters, pets, sets, using
from perpetune.pets.choice import Join
from perpetune.selectors.base import Chosen, Selection, Selector
from perpetune.tasks import Batch, Inputs, Task

Start = Literal["last", "fresh", "orthogonal"]


class Query(BaseModel):
    """How the feature of an example is computed by which the selector chooses.

    Attributes:
        after: the number of the net's blocks that are computed; None is the whole net. Fewer blocks cost less.
        reads: the feature at the `end` of the net, or all that the backbone's `taps` read.
        view: in training, `drawn` computes the query of the picture as it is trained on, with its random changes;
            `plain` computes it once for each picture, as at prediction.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    after: Annotated[int, Field(ge=1)] | None = None
    reads: Literal["end", "taps"] = "end"
    view: Literal["plain", "drawn"] = "plain"


GAUSSIAN, WHOLE = Selection(name="gaussian"), Query()  # what a recipe gets that does not say otherwise


class Pool(Method):
    """Keeps several sets of pets, the members. For each example a selector chooses the members that act on it.

    The selector sees one feature of the example, its query, computed by the bare backbone. It never sees a task or a
    label when it chooses. One file in `selectors/` holds each way to choose. With them the pool is:

    * L2P, Wang et al. 2022, arXiv:2112.08654: `members: 10`, `select: {name: keys, top: 5, pull: 0.1}`;
    * DualPrompt, Wang et al. 2022, arXiv:2204.04799: `members: task`, a set in `common`, `select: keys`;
    * CODA-Prompt, Smith et al. 2023, arXiv:2211.13218: `members: task`, `each: 10`, `select: weights`;
    * S-iPrompts, Wang et al. 2022 (NeurIPS): `select: centres`, `answer: own`;
    * HiDe-Prompt, HiDe-PET, Wang et al. 2023 and 2024, arXiv:2310.07234, 2407.05229: `select: gaussian` and a head that
      learns from statistics: `ridge` solves in closed form what their third step trains on drawn features, and `drawn`
      is this step.

    docs/pools.md lists where the released code of these papers differs.

    Args:
        model: with the sets of pets; one of them, or the only one, is the form of all members.
        train: how each task is trained.
        members: `task` gives each task its own members, which later tasks do not change; a number is a pool that all
            tasks train.
        select: the selector and its options.
        common: names of sets that act on every example, beside the chosen members. All tasks train them.
        answer: `all` classes compete in the head, or only the chosen member's `own` classes may answer.
        again: after the first answer, ask once more with the member that owns the winning class, if that is another.
        start: what a task's member starts from: the `last` task's, `fresh` values, or fresh values made `orthogonal`
            to those of all earlier members.
        each: the number of members that a task gets; more than one needs `select: weights`.
        merge: `m`; after a task its member becomes `(1 - m)` times itself plus `m` times the mean of the earlier ones
            (HiDe). LoRA is averaged as the products `B A`, not factor by factor, and cut back to its rank.
        repel: weight of a loss that pushes features from each other and from the mean features of earlier classes
            (HiDe).
        query: how queries are computed.
        mask: the classes that a classifier's loss compares; see `Classifier`.

    Raises:
        UsageError: there is no pet, or options do not fit together.
    """

    several = True
    use: Tensor

    def __init__(
        self,
        model: Model,
        *,
        train: FitConfig,
        members: Annotated[int, Field(ge=1, le=1000)] | Literal["task"] = "task",
        select: Selection = GAUSSIAN,
        common: tuple[str, ...] = (),
        answer: Literal["all", "own"] = "all",
        again: bool = False,
        start: Start = "last",
        each: Annotated[int, Field(ge=1, le=1000)] = 1,
        merge: Annotated[float, Field(ge=0, le=1)] = 0.0,
        repel: Annotated[float, Field(ge=0)] = 0.0,
        query: Query = WHOLE,
        mask: Mask = "task",
    ):
        super().__init__(model)
        self.common = tuple(common)
        self.form = self._form()
        self.train_config, self.answer, self.again, self.start = train, answer, again, start
        self.each, self.merge, self.query, self.select = each, merge, query, select
        self.by_task = members == "task"
        model.compare(mask)
        self.selector: Selector = select.make(self._query_width())
        self.selector.private = self.by_task
        self._check(select.name, members)
        self.bank = Bank(model, self.form, self.common)
        self.repulsion = Repulsion(model.backbone.dim, repel) if repel else None
        self.queries = Teacher(model, None, self._query)
        self.recall = Recall(lambda inputs: self.queries.of(inputs))
        rng = torch.Generator().manual_seed(int(torch.randint(2**62, ())))  # the recipe's seed decides it
        if members == "task":
            self.working: tuple[str, ...] = (self.form, *(f"{self.form}-{i}" for i in range(1, each)))
        else:
            self.working = (self.form, *(f"{self.form}-{i}" for i in range(1, members)))
        for name in self.working[1:]:
            copy_set(model, self.form, name)
            draw_set(model, name, rng)
        if self.by_task:
            self.trained, self.private = self.common, self.working
        else:
            self.trained, self.sometimes = (*self.common, *self.working), self.working
            directions = torch.randn(len(self.working), self.selector.dim, generator=rng)
            self.selector.grow(len(self.working), rng, directions)
        if self.by_task and not self.common:
            self.unaveraged = "gives each task members of its own, which later tasks do not change"
            self.unprotectable = (
                "has nothing to protect: each task has members of its own, which later tasks do not change; leave "
                "protect out"
            )
        self.answering: InForce = None
        self.learned = 0
        """The number of tasks that were learned."""
        # What a batch needs of all members; made anew after each task
        self._owner: list[int] = []
        self._names: list[str] = []
        self.register_buffer("use", torch.zeros(0 if self.by_task else len(self.working), dtype=torch.int64))

    @property
    def own(self) -> bool:
        """Whether each task has one member, which alone acts on an example."""
        return self.by_task and not self.selector.every

    def _query_width(self) -> int:
        backbone = self.model.backbone
        if self.query.reads == "end":
            return backbone.own if self.query.after is None else backbone.width
        if backbone.taps is None or self.query.after is not None:
            raise UsageError(
                "method: pool: query.reads: taps reads the features of backbone.taps behind the last blocks: set "
                "backbone.taps, and leave query.after out"
            )
        return backbone.dim

    # -- options --------------------------------------------------------------------------------------

    def _form(self) -> str:
        """The set that has the form of the members."""
        existing = sets(self.model)
        for name in self.common:
            if name not in existing:
                raise UsageError(
                    f"method: pool names {name!r} in common, and the recipe's sets of pets are "
                    f"{', '.join(existing) or 'none'}"
                )
        others = [name for name in existing if name not in self.common]
        if len(others) != 1:
            raise UsageError(
                "method: pool needs one set of pets that is the form of its members, beside those in common; the "
                f"recipe leaves {', '.join(others) or 'none'}"
            )
        return others[0]

    def _check(self, name: str, members: int | str) -> None:
        selector = self.selector
        faults = (
            (selector.statistics and not self.by_task, f"select: {name} finds the task of an example, and a pool of "
             f"{members} members has none: use members: task, or select: keys"),
            (self.each > 1 and not selector.every, f"each: {self.each} needs select: weights; select: {name} chooses "
             "one member for an example, so a task needs one"),
            (self.each > 1 and not self.by_task, f"each: {self.each} is for members: task"),
            (self.by_task and selector.top > 1, f"select.top is {selector.top}, and with members: task one member acts "
             "on an example: leave it out, or give a number of members"),
            (not self.by_task and isinstance(members, int) and selector.top > members,
             f"select.top is {selector.top}, and there are {members} members"),
            (self.answer == "own" and not self.own,
             "answer: own needs one member for each task, because the classes of a member's task may answer then"),
            (self.again and (self.answer == "own" or not self.own),
             "again: true asks the owner of the winning class; it needs members: task, one member for an example, and "
             "answer: all"),
            (bool(self.merge) and not self.own,
             "merge averages the members of tasks; it needs members: task and one member for an example"),
            (self.start == "last" and self.each > 1, "start: last is for one member a task: use fresh or orthogonal"),
            (not self.model.chooses and (self.answer == "own" or self.again), "answer: own and again are for a head of "
             "classes"),
        )  # fmt: skip
        for wrong, message in faults:
            if wrong:
                raise UsageError(f"method: pool: {message}")
        if self.by_task and isinstance(self.model, Classifier) and self.model.head.carry:
            raise UsageError(
                "method: pool has different features for each task, so a head cannot move its sums along with them: "
                "leave head.carry out"
            )

    # -- learning -------------------------------------------------------------------------------------

    def learn(self, task: Task) -> None:
        self.model.grow(task)
        config = self.train_config
        table = self._table(task) if self._reads_queries(task) else None
        self._begin(task, table)
        self.queries.keep(table if task.train.deterministic or self.query.view == "plain" else None)
        following = self.model.following(task, config.batch_size, self.features)
        with following, training(self.model), self.model.resting(task):
            fit(self.loss, self._groups(config), task, config)
        self.queries.keep(None)
        if not self.by_task:
            self._count_use(self._table(task) if table is None else table)
        if table is None and self.selector.statistics:
            table = self._table(task)
        if self.merge and self.bank.kept:
            average_into(self.model, self.form, list(map(set_name, self.bank.kept)), self.merge)
        self._summarise(task)
        if self.by_task:
            for name in self.working:
                self.bank.keep(len(self.bank.kept), task.name, task.classes, len(task.train), source=name)
        if self.selector.statistics:
            assert table is not None
            targets = torch.tensor(task.train.targets)
            rng = task.generator("selector", "learn")
            self.selector.learn(len(self.bank.kept) - 1, table.cpu(), targets, task.classes or ("",), rng)
        self.learned, self._owner, self._names = task.index + 1, [], []

    def _reads_queries(self, task: Task) -> bool:
        """Whether the queries of all training examples are needed before training."""
        steps = self.train_config.epochs_of(task.index) > 0
        kept = task.train.deterministic or self.query.view == "plain"
        return self.selector.needs_start or (steps and kept and self._queried)

    @property
    def _queried(self) -> bool:
        """Whether training reads queries: for keys that learn, or to choose among members that all tasks share."""
        return self.selector.learned or not self.by_task

    def _table(self, task: Task) -> Tensor:
        """The queries `(N, D)` of all training examples."""
        asked = dataclasses.replace(task, train=task.train.questions())
        return self.queries.table(asked, self.train_config.batch_size)

    def _begin(self, task: Task, table: Tensor | None) -> None:
        """Give the task its members, with the values that they start from, and the selector room for them."""
        if not self.by_task:
            if self.selector.needs_start and task.index == 0:
                assert table is not None
                self.selector.start_at(table)
            return
        before = len(self.bank.kept)
        if before and self.start != "last":
            for i, name in enumerate(self.working):
                draw_set(self.model, name, task.generator("member", i))
        if self.start == "orthogonal":
            drawn_orthogonal(self.model, list(map(set_name, self.bank.kept)), self.working)
        self.selector.rest(before)
        self.selector.grow(before + self.each, task.generator("selector"), table)

    def _groups(self, config: FitConfig) -> Groups:
        groups = self.groups(config, tuple(dict.fromkeys((*self.common, *self.working))))
        learned = self.selector.trained()
        return [*groups, (learned, config.lr)] if learned else groups

    def loss(self, task: Task, batch: Batch) -> Tensor:
        queries = self.queries.features(batch) if self._queried else None
        chosen = None if queries is None else self._picked(queries)
        with using(self.model, (*self.common, self._acting(chosen))):
            if self.repulsion is None or not isinstance(self.model, Classifier):
                loss = self.model.loss(task, batch)
            else:
                features = self.model.tuned(batch.inputs)
                loss = self.model.head_loss(task, features, batch.targets) + self.repulsion.loss(features)
        if queries is None or chosen is None:
            return loss
        more = self.selector.loss(queries, chosen)
        return loss if more is None else loss + more

    def _picked(self, queries: Tensor) -> Chosen:
        """The members that are trained on a batch: the task's own, or those that the selector picks."""
        if self.own:
            return Chosen(torch.full((len(queries), 1), len(self.bank.kept), device=queries.device))
        return self.selector.pick(queries)

    def _acting(self, chosen: Chosen | None) -> str | Choice:
        """The members of the task in training, or those that are chosen, as `using` takes them."""
        if chosen is None or self.own:
            return self.form
        names = (*map(set_name, self.bank.kept), *self.working) if self.by_task else self.working
        return Choice(names, chosen.index, chosen.weight, self._join)

    @property
    def _join(self) -> Join:
        tokens = all(pet.adds_tokens for pet in pets(self.model, self.form))
        return "beside" if tokens and not self.selector.every else "sum"

    def _count_use(self, queries: Tensor) -> None:
        """Count for how many examples of a task each member is picked, and tell the selector.

        Args:
            queries: `(N, D)` of all training examples, the same on every process.
        """
        index = self.selector.pick(queries).index
        self.use += torch.bincount(index.flatten(), minlength=len(self.use)).to(self.use.device)
        self.selector.used(index)

    def _summarise(self, task: Task) -> None:
        """Let the head learn from the features that the task's examples have at prediction; so must `repel`."""
        size, model = self.train_config.batch_size, self.model
        ask: Callable[[Inputs], Tensor] = model.features if self.own else self._features
        with using(model, (*self.common, self.form)):
            if self.own or not isinstance(model, Classifier):
                model.summarise(task, size)
            else:
                if model.head.statistics:
                    learn_statistics(task, size, [(model.head, lambda batch: ask(batch.inputs))])
                model.head.finish(task.classes)
            if self.repulsion is not None:
                self.repulsion.grow(task.classes, task.generator("repel"))
                learn_statistics(task, size, [(self.repulsion.means, lambda batch: ask(batch.inputs))])

    def _features(self, inputs: Inputs) -> Tensor:
        """Features of training examples by the members that are chosen for each."""
        with using(self.model, (*self.common, self._acting(self.selector.choose(self.queries.of(inputs))))):
            return self.model.features(inputs)

    # -- forgetting -----------------------------------------------------------------------------------

    def depends(self, task: int) -> str:
        model = self.model
        faults = (
            (not self.own, "all tasks share its members"),
            (bool(self.common), "all tasks train the sets in common"),
            (self.start != "fresh", f"a task's member starts from those before it (start: {self.start})"),
            (bool(self.merge), "a member has a part of those before it (merge)"),
            (self.repulsion is not None, "a member was pushed away from earlier classes (repel)"),
            (not self.selector.by_member, f"select: {self.select.name} weighs all members together"),
            (not isinstance(model, Classifier), "it has no head of classes"),
            (isinstance(model, Classifier) and (not model.head.apart or model.mask != "task"),
             "all classes were trained together in the head"),
            (any(len(kept.classes) == 1 for slot, kept in self.bank.kept.items() if slot),
             "a task of one class was compared with all classes before it"),
        )  # fmt: skip
        return next((why for wrong, why in faults if wrong), "")

    @torch.no_grad()
    def take_out(
        self, task: str, part: Callable[[], tuple[Head | None, Head]], gone: Sequence[str], whole: bool
    ) -> None:
        if not whole:
            raise UsageError("another task has a class of it too, whose row in the head both have trained")
        slot, model = self.bank.by_task()[task], self.model
        assert isinstance(model, Classifier)
        self.bank.drop(slot)
        self.selector.drop(slot)
        copy_set(model, set_name(len(self.bank.kept) - 1), self.form)  # its values may be the forgotten ones
        model.leave_out(gone)
        self._owner, self._names = [], []

    # -- predicting -----------------------------------------------------------------------------------

    def _query(self, inputs: Inputs) -> Tensor:
        # The difference between two tasks can be too small for bf16.
        with torch.autocast(self.model.backbone.device.type, enabled=False):
            if self.query.reads == "taps":
                return self.model.features(inputs)
            return self.model.backbone.query(inputs, self.query.after)

    def chosen(self, inputs: Inputs) -> Chosen | None:
        """The members that the selector chooses; None if there is nothing to choose."""
        count = len(self.bank.kept) if self.by_task else len(self.working)
        if count == 0 or (count == 1 and not self.selector.every):
            return None
        return self.selector.choose(self.recall(Inputs.of(inputs)))

    def predict(self, inputs: Inputs) -> Tensor:
        return self.answers(inputs).scores

    def _by(self, inputs: Inputs) -> list[int]:
        """For each input the number of the one member that is chosen for it."""
        chosen = self.chosen(inputs)
        return [0] * len(inputs) if chosen is None else chosen.index[:, 0].tolist()

    def answers(self, inputs: Inputs) -> Answers:
        inputs = Inputs.of(inputs)
        if not self.own:
            chosen = self.chosen(inputs)
            with using(self.model, (*self.common, self._answering(chosen))):
                scores = self.model.predict(inputs)
            return Answers(scores) if chosen is None or self.selector.every else self._told(scores, chosen.index)
        if not self.bank.kept:
            with using(self.model, (*self.common, self.form)):
                return Answers(self.model.predict(inputs))
        by = self._by(inputs)
        scores = self.bank.predict(inputs, by, own=self.answer == "own")
        if not self.model.chooses or self.answer == "own":
            return self._told(scores, torch.tensor(by)[:, None])
        owners = self._owners(scores.argmax(1).tolist())
        overruled = torch.tensor([float(a != b) for a, b in zip(by, owners, strict=True)], device=scores.device)
        if self.again and (rows := [i for i in range(len(by)) if owners[i] != by[i]]):
            scores[rows] = self.bank.predict(inputs.rows(rows), [owners[i] for i in rows], own=False)
        gauges = {"overruled by the head": overruled} if len(self.bank.kept) > 1 else {}
        return self._told(scores, torch.tensor(by)[:, None], gauges)

    def _told(self, scores: Tensor, index: Tensor, gauges: dict[str, Tensor] | None = None) -> Answers:
        return Answers(scores, gauges=gauges or {}, members=(self.member_names(), index))

    def member_names(self) -> list[str]:
        """The names of the members: the tasks that they belong to, or their numbers."""
        if not self._names:
            by_task = (self.bank.called(slot) for slot in self.bank.kept)
            self._names = list(by_task) if self.by_task else [str(number) for number in range(len(self.working))]
        return self._names

    def _owners(self, rows: Sequence[int]) -> list[int]:
        """For each row of the head the number of the last member whose task has that class."""
        if len(self._owner) != len(self.model.classes):
            last = {c: slot for slot, kept in self.bank.kept.items() for c in kept.classes}
            self._owner = [last.get(c, -1) for c in self.model.classes]
        return [self._owner[row] for row in rows]

    def _answering(self, chosen: Chosen | None) -> str | Choice:
        """The members that answer, where they are not those of one task: shared by all tasks, or all weighted."""
        if chosen is None or not self.by_task:
            return self._acting(chosen)
        return Choice(tuple(map(set_name, self.bank.kept)), chosen.index, chosen.weight)

    def told(self, inputs: Inputs, task: str) -> Tensor | None:
        """The answer with the member of the named task: a bound for evaluation alone, never a prediction."""
        slot = self.bank.by_task().get(task) if self.own else None
        if slot is None:
            return None
        inputs = Inputs.of(inputs)
        return self.bank.predict(inputs, [slot] * len(inputs), own=self.answer == "own")

    def features(self, inputs: Inputs) -> Tensor:
        inputs = Inputs.of(inputs)
        if self.own and self.bank.kept:
            return self.bank.features(inputs, self._by(inputs))
        with using(self.model, (*self.common, self._answering(self.chosen(inputs)))):
            return self.model.features(inputs)

    def observe(self, inputs: Inputs) -> None:
        inputs = Inputs.of(inputs)
        chosen = None if self.own else self.selector.choose(self.queries.of(inputs))
        with using(self.model, (*self.common, self._acting(chosen))):
            self.model.observe(inputs)

    def observe_texts(self, sentences: Sequence[str]) -> None:
        with using(self.model, (*self.common, *((self.form,) if self.by_task else ()))):
            self.model.observe_texts(sentences)

    def named(self, inputs: Inputs, classes: Sequence[str]) -> Answers:
        if not (isinstance(self.model, Classifier) and self.model.any_class):
            return super().named(inputs, classes)
        inputs = Inputs.of(inputs)
        if self.own and self.bank.kept:
            by = self._by(inputs)
            return Answers(self.bank.among(self.bank.features(inputs, by), by, classes))
        features, head = self.features(inputs), self.model.head
        return Answers(head.among(features, classes).float(), gates=head.gates(features, classes))

    def earlier(self) -> Iterable[Tensor]:
        return self.selector.earlier()

    def resting(self) -> Mapping[str, Resting]:
        return self.bank.resting()

    @property
    def one_graph(self) -> bool:
        return False  # a selector chooses members for each example

    def exported(self) -> dict[str, str | None]:
        """The members under the names of their tasks, or under their numbers."""
        if self.common:
            raise UsageError(
                f"method pool answers with {', '.join(self.common)} and a member at once, and an export holds one "
                "set: use the state itself"
            )
        if not self.by_task:
            return {f"member-{number}": name for number, name in enumerate(self.working)}
        if self.selector.every:
            return {set_name(slot): set_name(slot) for slot in self.bank.kept}
        return {"+".join(kept.tasks): set_name(slot) for slot, kept in self.bank.kept.items()}

    def exported_selector(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {name: t for name, t in self.selector.state_dict().items() if isinstance(t, Tensor)}
        extra = self.selector.get_extra_state()
        return tensors, {"selector": self.select.model_dump(), "query": self.query.model_dump(), "extra": extra}

    def acting(self, name: str | None) -> contextlib.AbstractContextManager[None]:
        return self.bank.acting(name) if name is not None and self.by_task else super().acting(name)

    # -- reporting and storing ------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        size = sum(p.numel() * p.element_size() for p in parameters(self.model, self.form))
        names = self.member_names()
        if self.by_task:  # those of the last task: a list of all would be longer with each task
            facts: dict[str, Any] = {"kind": "pool", "members": names[-self.each :], "count": len(names), "bytes": size}
        else:
            facts = {"kind": "pool", "members": names, "bytes": size}
        if found := self.selector.facts():
            facts["selector"] = found
        if not self.by_task:
            facts["use"] = self.use.tolist()
            facts["warning"] = self.selector.warning(self.learned)
        return {**super().facts(), "pool": facts}

    def get_extra_state(self) -> dict[str, Any]:
        return {"learned": self.learned}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.learned, self._owner, self._names = int(state["learned"]), [], []
