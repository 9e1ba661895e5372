"""How a task is scored. The method sees the inputs alone: no label, no task, and no class list to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from perpetune.errors import Interrupted, UsageError
from perpetune.methods.base import Method
from perpetune.methods.parts.pairs import Gallery
from perpetune.oracle import Oracle
from perpetune.runtime import Runtime
from perpetune.tasks import Batch, Examples, Task, captioned, evaluation_batches, load_batches

Setting = Literal["class", "domain", "task"]
Among = Literal["seen", "task", "own"]
AMONG: Mapping[Setting, Among] = MappingProxyType({"class": "seen", "domain": "seen", "task": "task"})
Classes = Mapping[str, Sequence[str]]
"""The classes of each task of a stream, learned or not, by its name."""
PROBE = 32  # test images of a task by which the drift of its features is measured


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
        method that knows the task.
    """
    if task.test is None or len(task.test) == 0:
        return None
    run = task.runtime
    if captioned(task.test):
        return _found(method, task.test, batch_size, run)
    chooses = method.model.chooses
    asked: Sequence[str] | None = None  # the classes among which the method is asked; None: those it has learned
    if chooses and (among == "own" or future is not None):
        every = dict.fromkeys(name for classes in (future or {}).values() for name in classes)
        asked = list(every) if among == "seen" else task.classes
    judge = _Choices(method.classes, task, among, asked) if chooses else _Texts(method, task)
    going = _Going(future, asked, run.device) if future and asked and among == "seen" else None
    exact = torch.float32 if run.device.type == "mps" else torch.float64  # Apple's GPUs have no other
    per_class = torch.zeros(2, max(1, len(task.classes)), dtype=exact, device=run.device)
    others, gauges, bounds = (_Sums(run, torch.zeros((), dtype=exact, device=run.device)) for _ in range(3))
    gates = _Sums(run, torch.zeros(2, dtype=torch.int64, device=run.device))
    acted = _Members(run)
    way: str | None = None
    diagnosis = None if oracle is None else (oracle, _Choices(oracle.classes, task, among))
    for batch in evaluation_batches(task.test.questions(), batch_size, run):
        with run.autocast():
            answers = method.answers(batch.inputs) if asked is None else method.named(batch.inputs, asked)
            bound = method.told(batch.inputs, task.name) if told else None
            solved = None if diagnosis is None else diagnosis[0](batch.inputs)
        way = answers.name
        right = judge(answers.scores, batch)
        for row, values in enumerate((right, torch.ones_like(batch.targets))):
            per_class[row].index_add_(0, batch.targets, values.to(exact))
        for name, open_ in answers.gates.items():
            gates.add(name, torch.stack([open_, open_ & (right > 0)]).sum(1))
        if going is not None:
            going.count(answers.scores)
        for name, scores in answers.others.items():
            others.add(name, judge(scores, batch).to(exact).sum())
        for name, values in answers.gauges.items():
            gauges.add(name, values.to(exact).sum())
        if answers.members is not None:
            acted.count(*answers.members)
        if bound is not None:
            bounds.add("told", judge(bound, batch).to(exact).sum())
        if solved is not None and diagnosis is not None:
            bounds.add("oracle", diagnosis[1](solved, batch).to(exact).sum())
        signum = run.stop_requested(due=False)
        if signum is not None:
            raise Interrupted(f"stopped while task {task.name} was evaluated", signum)
    way = run.of_first(way)
    correct, totals = run.sum(per_class).tolist()
    total = int(sum(totals))
    cell: dict[str, Any] = {"correct": _count(sum(correct)), "total": total}
    cell["per_class"] = {c: [_count(correct[i]), int(totals[i])] for i, c in enumerate(task.classes) if totals[i]}
    if way is not None:
        cell["way"] = way
    if judge.score is not None:
        cell["score"] = judge.score
    if found := others.totals():
        cell["others"] = {name: _count(value) for name, value in found.items()}
    if found := gauges.totals():
        cell["gauges"] = {name: round(value / total, 6) for name, value in found.items()}
    if found := gates.totals():
        cell["gates"] = found
    if going is not None and going.apart:
        cell["goes_to"] = {t: n for t, n in zip(going.tasks, run.sum(going.counts).tolist(), strict=True) if n}
    if members := acted.totals():
        cell["members"] = members
    found = bounds.totals()
    if "told" in found:
        cell["told"] = _count(found["told"])
    if oracle is not None:
        cell["oracle"] = {"correct": _count(found.get("oracle", 0.0)), "head": oracle.name}
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


@torch.no_grad()
def probe(method: Method, task: Task) -> Tensor | None:
    """Normalised features `(n, D)`, float32, of a few test images of `task`, always the same; None where it has none.

    Looked at again later they say how far the features of old data have moved: a measurement on test images that
    nothing is learned from.
    """
    if task.test is None or len(task.test) == 0:
        return None
    count = min(PROBE, len(task.test))
    numbers = [i * len(task.test) // count for i in range(count)]
    batch = next(load_batches(task.test.questions(), [[(i, None) for i in numbers]], task.runtime))
    with task.runtime.autocast():
        features = method.features(batch.inputs)
    return F.normalize(features.float(), dim=-1).cpu()
