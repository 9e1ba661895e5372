"""The counts of one task while its test examples are asked, from kept features or from loaded examples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perpetune.errors import Interrupted
from perpetune.judges import Among, Choices, Classes, Going, Members, Sums, Texts, whole
from perpetune.methods.base import Answers, Method
from perpetune.models.keeping import Keeper, NotKept, Unseen
from perpetune.oracle import Oracle
from perpetune.tasks import Batch, Inputs, Task

SAMPLE = 256  # test images of a task whose features are kept, so that new images can be compared with them
PROBE = 32  # test images of a task by which the drift of its features is measured


@dataclass(frozen=True)
class How:
    """How test data are asked, the same for all tasks; `evaluate` has the meaning of each."""

    among: Among
    batch_size: int
    oracle: Oracle | None = None
    future: Classes | None = None
    told: bool = False
    each: bool = False
    """Whether to give what each answer is worth, too (`Asked.right`)."""


@dataclass(frozen=True)
class Asked:
    """What came of asking one task.

    Attributes:
        cell: the counts; None if the task has no test data, or was not asked.
        left_out: whether it was not asked because of a `Limit`.
        seconds: how long it took.
        probed: numbers of the examples of the task's probe that were asked, and their features `(n, D)` of length 1,
            float32, on the CPU; None if they are not known.
        made: a digest of the examples and of all that made their features, if it was the same for all; else None.
        right: with `How.each`, what the answer to each test example is worth, float64 `(n,)` in [0, 1] on the CPU; NaN
            where it was not asked. None if it is not known, as of pictures with captions.
    """

    cell: dict[str, Any] | None
    left_out: bool = False
    seconds: float = 0.0
    probed: tuple[list[int], Tensor] | None = None
    made: str | None = None
    right: Tensor | None = None


def probe_rows(count: int, most: int = PROBE) -> list[int]:
    """The numbers of the examples of a task by which the drift of its features is measured: `most` of them, or all.

    Those of `PROBE` are among those of `SAMPLE`.
    """
    some = min(most, count)
    return [i * count // some for i in range(some)]


class Tally:
    """The counts of one task while its test examples are asked.

    Args:
        numbers: the examples that are asked.
        keeper: what may know their features.
        new: whether the task was learned just now.
        probing: whether features of the task's probe are wanted.
    """

    def __init__(
        self,
        method: Method,
        task: Task,
        how: How,
        numbers: Sequence[int],
        keeper: Keeper | None,
        new: bool,
        probing: bool,
    ):
        assert task.test is not None
        self.task, self.how, self.keeper, self.new, self.run = task, how, keeper, new, task.runtime
        self.count, self.numbers, self.test = len(task.test), list(numbers), task.test.questions()
        self.examples = self.identity()
        mine = self.numbers[self.run.rank :: self.run.world]
        self.waiting = [mine[start : start + how.batch_size] for start in range(0, len(mine), how.batch_size)]
        """The batches that are not asked yet."""
        self.seconds = 0.0
        chooses = method.model.chooses
        asked: Sequence[str] | None = None  # the classes among which the method is asked; None: those it has learned
        if chooses and (how.among == "own" or how.future is not None):
            every = dict.fromkeys(name for classes in (how.future or {}).values() for name in classes)
            asked = list(every) if how.among == "seen" else task.classes
        self.asked_among = asked
        self.judge = Choices(method.classes, task, how.among, asked) if chooses else Texts(method, task)
        seen = how.among == "seen"
        self.going = Going(how.future, asked, self.run.device) if how.future and asked and seen else None
        self.exact = torch.float32 if self.run.device.type == "mps" else torch.float64  # Apple's GPUs have no other
        zero = torch.zeros((), dtype=self.exact, device=self.run.device)
        self.per_class = zero.new_zeros(2, max(1, len(task.classes)))
        self.each = zero.new_zeros(2, self.count) if how.each else None  # what each answer is worth; whether it came
        self.others, self.gauges, self.bounds = (Sums(self.run, zero) for _ in range(3))
        self.gates = Sums(self.run, torch.zeros(2, dtype=torch.int64, device=self.run.device))
        self.acted = Members(self.run)
        self.way: str | None = None
        self.diagnosis = None if how.oracle is None else (how.oracle, Choices(how.oracle.classes, task, how.among))
        probed = set[int]()
        if probing and keeper is not None:
            probed = set(probe_rows(self.count, SAMPLE if new else PROBE)) & set(self.numbers)
        self.probing = probed if self.run.world == 1 else set()
        self.probed: list[tuple[list[int], Tensor]] = []

    @property
    def complete(self) -> bool:
        """Whether all examples were asked."""
        return not self.waiting

    def identity(self) -> str | None:
        """A digest of the examples as they are now; None if nothing is to be kept of them."""
        assert self.task.test is not None
        return None if self.keeper is None or not self.keeper.most else self.task.test.identity()

    def restricted(self, method: Method, numbers: Sequence[int]) -> Tally:
        """A new tally of some of the examples."""
        made = Tally(method, self.task, self.how, numbers, self.keeper, self.new, bool(self.probing))
        made.seconds = self.seconds
        return made

    def from_kept(self, method: Method) -> None:
        """Ask batches from kept features, up to the first whose features are not known."""
        if self.examples is None:
            return
        began = self.run.clock()
        while self.waiting:
            numbers, inputs = self.waiting[0], Unseen(range(len(self.waiting[0])))
            targets = torch.tensor([self.test.targets[i] for i in numbers], device=self.run.device)
            try:
                self.look(method, Batch(inputs, targets, torch.tensor(numbers)), numbers)
            except NotKept:
                break
        self.seconds += self.run.clock() - began

    def look(self, method: Method, batch: Batch, numbers: Sequence[int]) -> None:
        """Ask the method about the next batch, which holds the examples with these numbers, and count its answers."""
        seen = None if isinstance(batch.inputs, Unseen) else batch.inputs
        keeper = self.keeper
        about = nullcontext() if keeper is None else keeper.asking(self.examples, numbers, self.count, seen, self.new)
        with about:
            with self.run.autocast():
                found = self._answers(method, batch.inputs)
            if seen is None and keeper is not None and keeper.same and not self.new:
                self.probing, self.probed = set(), []  # what made them says whether they have moved
            probed = self._probe(method, batch.inputs, numbers)
        if probed is not None:
            self.probed.append(probed)
        self._add(batch, numbers, *found)
        self.waiting = self.waiting[1:]
        signum = self.run.stop_requested(due=False)
        if signum is not None:
            raise Interrupted(f"stopped while task {self.task.name} was evaluated", signum)

    def _answers(self, method: Method, inputs: Inputs) -> tuple[Answers, Tensor | None, Tensor | None]:
        among = self.asked_among
        answers = method.answers(inputs) if among is None else method.named(inputs, among)
        bound = method.told(inputs, self.task.name) if self.how.told else None
        return answers, bound, None if self.diagnosis is None else self.diagnosis[0](inputs)

    def _probe(self, method: Method, inputs: Inputs, numbers: Sequence[int]) -> tuple[list[int], Tensor] | None:
        """Features of those examples that belong to the probe, if the answers were made of them; else None."""
        places = [place for place, number in enumerate(numbers) if number in self.probing]
        if not places or self.keeper is None:
            return None
        try:
            with self.keeper.comparing(), self.keeper.only_known(), self.run.autocast():
                features = method.features(inputs)
        except NotKept:
            self.probing, self.probed = set(), []
            return None
        return [numbers[place] for place in places], F.normalize(features[places].float(), dim=-1)

    def _add(
        self, batch: Batch, numbers: Sequence[int], answers: Answers, bound: Tensor | None, solved: Tensor | None
    ) -> None:
        exact, judge = self.exact, self.judge
        self.way = answers.name
        right = judge(answers.scores, batch)
        for row, values in enumerate((right, torch.ones_like(batch.targets))):
            self.per_class[row].index_add_(0, batch.targets, values.to(exact))
            if self.each is not None:
                self.each[row, list(numbers)] = values.to(exact)
        for name, open_ in answers.gates.items():
            self.gates.add(name, torch.stack([open_, open_ & (right > 0)]).sum(1))
        if self.going is not None:
            self.going.count(answers.scores)
        for name, scores in answers.others.items():
            self.others.add(name, judge(scores, batch).to(exact).sum())
        for name, values in answers.gauges.items():
            self.gauges.add(name, values.to(exact).sum())
        if answers.members is not None:
            self.acted.count(*answers.members)
        if bound is not None:
            self.bounds.add("told", judge(bound, batch).to(exact).sum())
        if solved is not None and self.diagnosis is not None:
            self.bounds.add("oracle", self.diagnosis[1](solved, batch).to(exact).sum())

    def asked(self) -> Asked:
        """What came of it, over all processes."""
        if not self.numbers:
            return Asked(None, left_out=True, seconds=self.seconds)
        probed = None
        if self.probed:
            rows = torch.cat([features for _, features in self.probed]).cpu()
            probed = [number for numbers, _ in self.probed for number in numbers], rows
        return Asked(self._cell(), seconds=self.seconds, probed=probed, made=self._made(), right=self._each())

    def _each(self) -> Tensor | None:
        if self.each is None:
            return None
        found: Tensor = self.run.sum(self.each).double().cpu()
        return found[0].masked_fill(found[1] == 0, torch.nan)

    def _made(self) -> str | None:
        """A digest of the examples and of what made all their features; None if nobody can say it."""
        if self.keeper is None or self.examples is None or len(self.numbers) < self.count or self.run.world > 1:
            return None
        return self.keeper.made_of(self.examples)

    def _cell(self) -> dict[str, Any]:
        run, classes = self.run, self.task.classes
        way = run.of_first(self.way)
        correct, totals = run.sum(self.per_class).tolist()
        total = int(sum(totals))
        cell: dict[str, Any] = {"correct": whole(sum(correct)), "total": total}
        if total < self.count:
            cell["of"] = self.count
        cell["per_class"] = {c: [whole(correct[i]), int(totals[i])] for i, c in enumerate(classes) if totals[i]}
        if way is not None:
            cell["way"] = way
        if self.judge.score is not None:
            cell["score"] = self.judge.score
        if found := self.others.totals():
            cell["others"] = {name: whole(value) for name, value in found.items()}
        if found := self.gauges.totals():
            cell["gauges"] = {name: round(value / total, 6) for name, value in found.items()}
        if found := self.gates.totals():
            cell["gates"] = found
        going = self.going
        if going is not None and going.apart:
            cell["goes_to"] = {t: n for t, n in zip(going.tasks, run.sum(going.counts).tolist(), strict=True) if n}
        if members := self.acted.totals():
            cell["members"] = members
        found = self.bounds.totals()
        if "told" in found:
            cell["told"] = whole(found["told"])
        if self.how.oracle is not None:
            cell["oracle"] = {"correct": whole(found.get("oracle", 0.0)), "head": self.how.oracle.name}
        return cell
