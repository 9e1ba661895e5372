"""How a task is scored. The method sees the inputs alone: no label, no task, and no class list to choose from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from perpetune.errors import Interrupted, UsageError
from perpetune.methods.base import Answers, Method
from perpetune.methods.parts.pairs import Gallery
from perpetune.models.keeping import Keeper, NotKept, Unseen
from perpetune.oracle import Oracle
from perpetune.runtime import Runtime
from perpetune.seeding import generator, seed_of
from perpetune.tasks import Batch, Examples, Inputs, Joined, Task, captioned, load_batches

Setting = Literal["class", "domain", "task"]
Among = Literal["seen", "task", "own"]
AMONG: Mapping[Setting, Among] = MappingProxyType({"class": "seen", "domain": "seen", "task": "task"})
Classes = Mapping[str, Sequence[str]]
"""The classes of each task of a stream, learned or not, by its name."""
PROBE = 32  # test images of a task by which the drift of its features is measured


@dataclass(frozen=True)
class How:
    """How test data are asked, the same for all tasks; `evaluate` has the meaning of each."""

    among: Among
    batch_size: int
    oracle: Oracle | None = None
    future: Classes | None = None
    told: bool = False


@dataclass(frozen=True)
class Limit:
    """How many examples of some tasks are asked if a net has to compute their features again.

    Attributes:
        names: the tasks.
        count: the most examples of all of them together; 0 asks none.
        seed: draws them, always the same.
    """

    names: Collection[str]
    count: int
    seed: int = 0


@dataclass(frozen=True)
class Asked:
    """What came of asking one task.

    Attributes:
        cell: the counts; None if the task has no test data, or was not asked.
        left_out: whether it was not asked because of a `Limit`.
        seconds: how long it took.
        probed: numbers of the examples of the task's probe that were asked, and their features `(n, D)` of length 1,
            float32, on the CPU; None if they are not known.
    """

    cell: dict[str, Any] | None
    left_out: bool = False
    seconds: float = 0.0
    probed: tuple[list[int], Tensor] | None = None


@torch.no_grad()
def evaluate(
    method: Method,
    task: Task,
    *,
    among: Among,
    batch_size: int,
    oracle: Oracle | None = None,
    future: Classes | None = None,
    told: bool = False,
) -> dict[str, Any] | None:
    """Counts of right predictions on the task's test data, asked without their answers; None when it has none.

    Args:
        among: the classes that may be answered. `seen`: all that were learned. `task`: those of the task that were
            learned; the scores of the others are left out here, after the method has answered. `own`: those of the
            task, learned or not: the method is asked among these (`Method.among`).
        future: with these classes, learned or not, `seen` means all of them, and `task` is as `own`. So a task can be
            asked before it is learned.
        told: also count the answers that the method would give if it knew the task (`Method.told`).

    Returns:
        `{"correct": int, "total": int, "per_class": {name: [correct, total]}}`, with `"others"`, right predictions of
        the method's other ways to answer, and `"gauges"`, means of its gauges, by name, where it has any. Where answers
        are free texts, `correct` is the sum of their scores in [0, 1], and `"score"` names what scored them; for
        pictures with captions it is `retrieval`, the mean of recall at 1 from pictures to texts and back. With an
        `oracle` there is `"oracle"`, its right predictions and what kind of head it is. `"gates"` are yes or no for
        each example: how often yes, and how often the answer is right then. With `future` and `seen` there is
        `"goes_to"`, how many examples are answered with a class of each task, by its name, if no class is in two tasks.
        `"members"` counts how often the method chose each of its members, by name; `"told"` are right answers of a
        method that knows the task. `"of"` is the number of all test examples, where only a sample of them was asked.
    """
    how = How(among, batch_size, oracle, future, told)
    return ask(method, [task], how)[0].cell


@torch.no_grad()
def ask(
    method: Method,
    tasks: Sequence[Task],
    how: How,
    *,
    limit: Limit | None = None,
    new: str | None = None,
    probing: bool = False,
) -> list[Asked]:
    """Ask several tasks, in one pass over the batches of all of them. A batch holds examples of one task, the same ones
    whatever else is asked, so no count depends on other tasks.

    If a keeper is at work (`KeptFeatures`), it is asked first, before any example is loaded. Then the head answers from
    kept features, and the net computes only what is not known. A method is called alike in both cases.

    Args:
        limit: the tasks of which only some examples are asked if features have to be computed.
        new: the name of the task that was learned just now.
        probing: whether to give the features of the tasks' probes where they are made anyway.
    """
    keeper: Keeper | None = getattr(getattr(method.model, "backbone", None), "keeper", None)
    done: dict[int, Asked] = {}
    tallies: dict[int, _Tally] = {}
    for place, task in enumerate(tasks):
        if task.test is None or len(task.test) == 0:
            done[place] = Asked(None)
        elif captioned(task.test):
            began = time.perf_counter()
            cell = _found(method, task.test, how.batch_size, task.runtime)
            done[place] = Asked(cell, seconds=time.perf_counter() - began)
        else:
            tallies[place] = _Tally(method, task, how, range(len(task.test)), keeper, task.name == new, probing)
    if not tallies:
        return [done[place] for place in range(len(tasks))]
    run = next(iter(tallies.values())).run
    if keeper is not None:
        for tally in tallies.values():
            tally.from_kept(method)
    if limit is not None:
        again = {p: t for p, t in tallies.items() if t.task.name in limit.names and not t.complete}
        chosen: Mapping[str, Sequence[int]] = run.of_first(sample([t.task for t in again.values()], limit))
        for place, tally in tallies.items():
            if tally.task.name in chosen and len(chosen[tally.task.name]) < tally.count:
                tallies[place] = tally.restricted(method, chosen[tally.task.name])
    waiting = [tally for tally in tallies.values() if tally.waiting]
    sets = Joined([tally.test for tally in waiting])
    requests = [
        (tally, numbers, [(start + number, None) for number in numbers])
        for start, tally in zip(sets.starts, waiting, strict=False)
        for numbers in tally.waiting
    ]
    began = time.perf_counter()
    loaded = load_batches(sets, [indices for _, _, indices in requests], run) if requests else iter(())
    for (tally, numbers, _), batch in zip(requests, loaded, strict=True):
        tally.look(method, batch, numbers)
        now = time.perf_counter()
        tally.seconds, began = tally.seconds + now - began, now
    for tally in waiting:
        if keeper is not None and tally.examples is not None and tally.examples != tally.identity():
            keeper.drop(tally.examples)
    for place, tally in tallies.items():
        done[place] = tally.asked()
    return [done[place] for place in range(len(tasks))]


def sample(tasks: Sequence[Task], limit: Limit) -> dict[str, list[int]]:
    """The numbers of the examples that are asked of each task, by its name: `limit.count` in all, balanced over the
    tasks and over the classes of each. The same ones each time; fewer of a task are the first of more.

    Images of the probe come first, so that the drift is measured too.
    """
    sizes = {task.name: len(task.test or ()) for task in tasks}
    order = sorted(sizes, key=lambda name: seed_of(limit.seed, "evaluate", "order", name))
    shares = dict.fromkeys(sizes, 0)
    left = limit.count
    while left and (open_ := [name for name in order if shares[name] < sizes[name]]):
        each = max(1, left // len(open_))
        for name in open_[:left]:
            given = min(each, sizes[name] - shares[name])
            shares[name], left = shares[name] + given, left - given
    return {task.name: _balanced(task, shares[task.name], limit.seed) for task in tasks}


def _balanced(task: Task, count: int, seed: int) -> list[int]:
    assert task.test is not None
    size, targets = len(task.test), task.test.targets
    drawn = torch.randperm(size, generator=generator(seed, "evaluate", "sample", task.name)).tolist()
    probed = set(probe_rows(size))
    turns: Counter[int] = Counter()
    order = []  # round by round: the first of each class, the second of each, …
    for number in sorted(drawn, key=lambda number: number not in probed):
        turns[targets[number]] += 1
        order.append((turns[targets[number]], number))
    return sorted(number for _, number in sorted(order, key=lambda pair: pair[0])[:count])


class _Tally:
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
        self.judge = _Choices(method.classes, task, how.among, asked) if chooses else _Texts(method, task)
        seen = how.among == "seen"
        self.going = _Going(how.future, asked, self.run.device) if how.future and asked and seen else None
        self.exact = torch.float32 if self.run.device.type == "mps" else torch.float64  # Apple's GPUs have no other
        zero = torch.zeros((), dtype=self.exact, device=self.run.device)
        self.per_class = zero.new_zeros(2, max(1, len(task.classes)))
        self.others, self.gauges, self.bounds = (_Sums(self.run, zero) for _ in range(3))
        self.gates = _Sums(self.run, torch.zeros(2, dtype=torch.int64, device=self.run.device))
        self.acted = _Members(self.run)
        self.way: str | None = None
        self.diagnosis = None if how.oracle is None else (how.oracle, _Choices(how.oracle.classes, task, how.among))
        probed = set(probe_rows(self.count)) & set(self.numbers) if probing and keeper is not None else set[int]()
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

    def restricted(self, method: Method, numbers: Sequence[int]) -> _Tally:
        """A new tally of some of the examples."""
        made = _Tally(method, self.task, self.how, numbers, self.keeper, self.new, bool(self.probing))
        made.seconds = self.seconds
        return made

    def from_kept(self, method: Method) -> None:
        """Ask batches from kept features, up to the first whose features are not known."""
        if self.examples is None:
            return
        began = time.perf_counter()
        while self.waiting:
            numbers, inputs = self.waiting[0], Unseen(range(len(self.waiting[0])))
            targets = torch.tensor([self.test.targets[i] for i in numbers], device=self.run.device)
            try:
                self.look(method, Batch(inputs, targets, torch.tensor(numbers)), numbers)
            except NotKept:
                break
        self.seconds += time.perf_counter() - began

    def look(self, method: Method, batch: Batch, numbers: Sequence[int]) -> None:
        """Ask the method about the next batch, which holds the examples with these numbers, and count its answers."""
        seen = None if isinstance(batch.inputs, Unseen) else batch.inputs
        keeper = self.keeper
        about = nullcontext() if keeper is None else keeper.asking(self.examples, numbers, self.count, seen, self.new)
        with about:
            with self.run.autocast():
                found = self._answers(method, batch.inputs)
            probed = self._probe(method, batch.inputs, numbers)
        if probed is not None:
            self.probed.append(probed)
        self._add(batch, *found)
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
            with self.keeper.only_known(), self.run.autocast():
                features = method.features(inputs)
        except NotKept:
            self.probing, self.probed = set(), []
            return None
        return [numbers[place] for place in places], F.normalize(features[places].float(), dim=-1)

    def _add(self, batch: Batch, answers: Answers, bound: Tensor | None, solved: Tensor | None) -> None:
        exact, judge = self.exact, self.judge
        self.way = answers.name
        right = judge(answers.scores, batch)
        for row, values in enumerate((right, torch.ones_like(batch.targets))):
            self.per_class[row].index_add_(0, batch.targets, values.to(exact))
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
        return Asked(self._cell(), seconds=self.seconds, probed=probed)

    def _cell(self) -> dict[str, Any]:
        run, classes = self.run, self.task.classes
        way = run.of_first(self.way)
        correct, totals = run.sum(self.per_class).tolist()
        total = int(sum(totals))
        cell: dict[str, Any] = {"correct": _count(sum(correct)), "total": total}
        if total < self.count:
            cell["of"] = self.count
        cell["per_class"] = {c: [_count(correct[i]), int(totals[i])] for i, c in enumerate(classes) if totals[i]}
        if way is not None:
            cell["way"] = way
        if self.judge.score is not None:
            cell["score"] = self.judge.score
        if found := self.others.totals():
            cell["others"] = {name: _count(value) for name, value in found.items()}
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
            cell["told"] = _count(found["told"])
        if self.how.oracle is not None:
            cell["oracle"] = {"correct": _count(found.get("oracle", 0.0)), "head": self.how.oracle.name}
        return cell


class _Sums:
    """Sums over examples by name, over all processes.

    The first process always has a batch; one without any does not know the names, and has nothing to add.

    Args:
        zero: a sum over no example.
    """

    def __init__(self, run: Runtime, zero: Tensor):
        self.run, self.zero = run, zero
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = value + self.sums.get(name, 0)

    def totals(self) -> dict[str, Any]:
        """The sums as plain numbers or lists."""
        names = self.run.of_first(list(self.sums))
        return {name: self.run.sum(self.sums.get(name, self.zero)).tolist() for name in names}


class _Members:
    """How often each member was chosen, over all processes."""

    def __init__(self, run: Runtime):
        self.run = run
        self.names: list[str] = []
        self.counts = torch.zeros(0, dtype=torch.int64, device=run.device)

    def count(self, names: Sequence[str], index: Tensor) -> None:
        self.names = list(names)
        now = torch.bincount(index.flatten().to(self.run.device), minlength=len(names))
        self.counts = now if not len(self.counts) else self.counts + now

    def totals(self) -> dict[str, int]:
        """The counts of those that were chosen at all, by name."""
        names = self.run.of_first(self.names)
        if not names:
            return {}
        none = torch.zeros(len(names), dtype=torch.int64, device=self.run.device)
        counts = self.run.sum(self.counts if len(self.counts) else none).tolist()
        return {name: count for name, count in zip(names, counts, strict=True) if count}


def _found(method: Method, examples: Examples, batch_size: int, run: Runtime) -> dict[str, Any]:
    """The cell of pictures with captions: the mean of recall at 1 of both directions, over all test pictures."""
    captions = [examples.captions(i) for i in range(len(examples))]
    (there,), (back,) = Gallery(method, captions, examples, batch_size, run).recalls((1,))
    correct = _count(len(examples) * (there + back) / 2)
    return {"correct": correct, "total": len(examples), "per_class": {}, "score": "retrieval"}


class _Choices:
    """1 where the best class is the right one, else 0.

    Args:
        learned: the classes that were learned, whose scores come.
        asked: the classes whose scores come instead, all of them to be compared.
    """

    score: str | None = None

    def __init__(self, learned: Sequence[str], task: Task, among: Among, asked: Sequence[str] | None = None):
        known, device = learned if asked is None else asked, task.runtime.device
        row = {name: i for i, name in enumerate(known)}
        self.rows = torch.tensor([row.get(name, -1) for name in task.classes], device=device)  # -1: never predicted
        self.allowed = torch.ones(len(known), dtype=torch.bool, device=device)
        if among != "seen" and asked is None:
            self.allowed[:] = False
            self.allowed[self.rows[self.rows >= 0]] = True

    def __call__(self, scores: Tensor, batch: Batch) -> Tensor:
        best = scores.float().masked_fill(~self.allowed, -torch.inf).argmax(1)
        return best == self.rows[batch.targets]


class _Going:
    """How many answers go to the classes of each task.

    Attributes:
        apart: whether no class belongs to two tasks; otherwise there is nothing to count.
    """

    def __init__(self, tasks: Classes, asked: Sequence[str], device: torch.device):
        self.tasks = list(tasks)
        owner = {name: number for number, classes in enumerate(tasks.values()) for name in classes}
        self.apart = sum(map(len, tasks.values())) == len(owner)
        self.owner = torch.tensor([owner[name] for name in asked], device=device)
        self.counts = torch.zeros(len(tasks), dtype=torch.int64, device=device)

    def count(self, scores: Tensor) -> None:
        self.counts += torch.bincount(self.owner[scores.float().argmax(1)], minlength=len(self.tasks))


class _Texts:
    """The score of each answer, or 1 where the best of the options is the right one, else 0."""

    def __init__(self, method: Method, task: Task):
        assert task.test is not None
        self.model = method.model
        try:
            self.judge = self.model.view.judge(task.test, task.score)
        except UsageError as error:
            raise UsageError(f"task {task.name}: {error}") from None
        self.score: str | None = task.score

    def __call__(self, scores: Tensor, batch: Batch) -> Tensor:
        assert batch.numbers is not None
        values = []
        for row, number in zip(scores, batch.numbers.tolist(), strict=True):
            answer: str | int = int(row.argmax()) if row.is_floating_point() else self.model.read(row)
            values.append(self.judge(number, answer))
        return torch.tensor(values, device=scores.device)


def _count(value: float) -> int | float:
    """A sum of zeros and ones as the whole number it is, any other to six places."""
    return int(value) if value == int(value) else round(value, 6)


def probe_rows(count: int) -> list[int]:
    """The numbers of the examples of a task by which the drift of its features is measured: `PROBE`, or all."""
    some = min(PROBE, count)
    return [i * count // some for i in range(some)]


@torch.no_grad()
def probe(
    method: Method, task: Task, numbers: Sequence[int] | None = None, *, new: bool = False, from_kept: bool = False
) -> Tensor | None:
    """Normalised features `(n, D)`, float32, of a few test images of `task`, always the same; None where it has none.

    Looked at again later they say how far the features of old data have moved: a measurement on test images that
    nothing is learned from.

    Args:
        numbers: the images; None is the task's probe.
        new: whether the task was learned just now.
        from_kept: give None if no keeper has the features.
    """
    if task.test is None or len(task.test) == 0:
        return None
    run, rows = task.runtime, list(probe_rows(len(task.test)) if numbers is None else numbers)
    keeper: Keeper | None = getattr(getattr(method.model, "backbone", None), "keeper", None)
    identity = None if keeper is None or not keeper.most else task.test.identity()
    examples = None if identity is None else f"probe {identity} {rows}"

    def features(inputs: Inputs) -> Tensor:
        seen = None if isinstance(inputs, Unseen) else inputs
        places = range(len(rows))
        about = nullcontext() if keeper is None else keeper.asking(examples, places, len(rows), seen, new)
        with about, run.autocast():
            return F.normalize(method.features(inputs).float(), dim=-1).cpu()

    if examples is not None:
        with suppress(NotKept):
            return features(Unseen(range(len(rows))))
    if from_kept:
        return None
    batch = next(load_batches(task.test.questions(), [[(i, None) for i in rows]], run))
    return features(batch.inputs)
