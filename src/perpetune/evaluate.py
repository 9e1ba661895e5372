"""How tasks are scored. The method sees the inputs alone: no label, no task, and no class list to choose from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perpetune.judges import AMONG, Among, Classes, Setting, whole
from perpetune.methods.base import Method
from perpetune.methods.parts.pairs import Gallery
from perpetune.models.keeping import Keeper, NotKept, Unseen
from perpetune.oracle import Oracle
from perpetune.runtime import Runtime
from perpetune.seeding import generator, seed_of
from perpetune.tally import PROBE, Asked, How, Tally, probe_rows
from perpetune.tasks import Examples, Inputs, Joined, Task, captioned, load_batches

__all__ = [
    "AMONG",
    "PROBE",
    "Among",
    "Asked",
    "Classes",
    "How",
    "Limit",
    "Setting",
    "ask",
    "evaluate",
    "probe",
    "probe_rows",
    "sample",
]


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
    tallies: dict[int, Tally] = {}
    for place, task in enumerate(tasks):
        if task.test is None or len(task.test) == 0:
            done[place] = Asked(None)
        elif captioned(task.test):
            began = task.runtime.clock()
            cell = _found(method, task.test, how.batch_size, task.runtime)
            done[place] = Asked(cell, seconds=task.runtime.clock() - began)
        else:
            tallies[place] = Tally(method, task, how, range(len(task.test)), keeper, task.name == new, probing)
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
    began = run.clock()
    loaded = load_batches(sets, [indices for _, _, indices in requests], run) if requests else iter(())
    for (tally, numbers, _), batch in zip(requests, loaded, strict=True):
        tally.look(method, batch, numbers)
        now = run.clock()
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


def _found(method: Method, examples: Examples, batch_size: int, run: Runtime) -> dict[str, Any]:
    """The cell of pictures with captions: the mean of recall at 1 of both directions, over all test pictures."""
    captions = [examples.captions(i) for i in range(len(examples))]
    (there,), (back,) = Gallery(method, captions, examples, batch_size, run).recalls((1,))
    correct = whole(len(examples) * (there + back) / 2)
    return {"correct": correct, "total": len(examples), "per_class": {}, "score": "retrieval"}


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
