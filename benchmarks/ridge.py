"""What a task costs the ridge classifier: sums, choice of the penalty and solution, beside the same as RanPAC does it.

    python benchmarks/ridge.py              # ten tasks of 1,000 rows, 100 classes, M = 4,000
    python benchmarks/ridge.py --large      # M = 10,000: one task from its rows, one from the sums

In one process and in turns, task by task, on the same rows: Gaussian clusters through a random projection with ReLU.
Ours: float64, `perpetune.numerics.ridge`, from the rows themselves where they are half of M or fewer. RanPAC's
(arXiv:2307.02251, `RanPAC.py` at 012927f): float32, 17 penalties on one 80/20 split of the task's rows with an LU solve
each, then one on the sums. Prints JSON. Memory is counted in dense float64 Gram matrices (M² · 8 bytes), without the
task's rows: what is kept between tasks, and the most that tensors hold during one.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from perpetune.heads.base import alone
from perpetune.heads.ridge import FAR, SAMPLE
from perpetune.numerics import ridge
from perpetune.seeding import generator

DIM = 384


class Data:
    """Tasks of rows `(n, M)`, float32, each of classes of its own, and held-out rows of all classes."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.each = given, given.classes // given.tasks
        self.centres = given.distance * torch.randn(given.classes, DIM, generator=generator("benchmark", "centres"))
        self.projection = torch.randn(DIM, given.width, generator=generator("benchmark", "projection"))

    def rows(self, classes: range, count: int, *purpose: int | str) -> tuple[Tensor, Tensor]:
        rng = generator("benchmark", "rows", *purpose)
        targets = classes.start + torch.randint(0, len(classes), (count,), generator=rng)
        features = self.centres[targets] + torch.randn(count, DIM, generator=rng)
        return (features @ self.projection).relu(), targets

    def task(self, task: int) -> tuple[Tensor, Tensor]:
        return self.rows(range(task * self.each, (task + 1) * self.each), self.given.rows, "train", task)

    def held_out(self, tasks: int) -> tuple[Tensor, Tensor]:
        return self.rows(range(tasks * self.each), 2000, "test", tasks)


class Classifier(Protocol):
    weights: Tensor
    penalty: float | None

    def learn(self, rows: Tensor, targets: Tensor) -> dict[str, Any]: ...

    def kept(self) -> int: ...


class Ours:
    """What `heads/ridge.py` does at the end of a task."""

    def __init__(self, width: int, classes: int):
        self.classes, self.count = classes, 0
        self.penalty: float | None = None
        self.packed = torch.zeros(ridge.packed_size(width), dtype=torch.float64)
        self.cross = torch.zeros(width, classes, dtype=torch.float64)
        self.weights = torch.empty(0)

    def learn(self, rows: Tensor, targets: Tensor) -> dict[str, Any]:
        width = rows.shape[1]
        began = time.perf_counter()
        ridge.add_gram(self.packed, rows, None)
        self.cross.mT.index_add_(0, targets, rows.double())
        self.count += len(rows)
        summed = time.perf_counter()
        few = self.count == len(rows) and self.count <= width // 3
        solve: Callable[[float], ridge.Fit] = (
            ridge.Dual(rows, targets, self.classes, None).fit
            if few
            else functools.partial(
                ridge.primal, self.packed, self.cross, self.count, float(self.count), sample=self.sample(rows, targets)
            )
        )
        fit, tries = ridge.choose(solve, ridge.trace(self.packed, width) / width, self.penalty)
        self.penalty, self.weights = fit.penalty, fit.weights.float()
        ended = time.perf_counter()
        return {
            "s": ended - began,
            "sums_s": summed - began,
            "penalty": fit.penalty,
            "fits": tries,
            "solver": "rows" if few else "sums",
        }

    def sample(self, rows: Tensor, targets: Tensor) -> ridge.Sample | None:
        if self.count >= FAR * rows.shape[1]:
            return None
        some = slice(None, None, math.ceil(len(rows) / SAMPLE))
        return ridge.Sample(rows[some].double(), targets[some], torch.ones(len(rows[some]), dtype=torch.float64), alone)

    def kept(self) -> int:
        return 8 * (self.packed.numel() + self.cross.numel())


class RanPAC:
    """The same work as RanPAC's `replace_fc` and `optimise_ridge_parameter`."""

    def __init__(self, width: int, classes: int):
        self.classes = classes
        self.penalty: float | None = None
        self.gram, self.cross = torch.zeros(width, width), torch.zeros(width, classes)
        self.weights = torch.empty(0)

    def learn(self, rows: Tensor, targets: Tensor) -> dict[str, Any]:
        began = time.perf_counter()
        hot = torch.nn.functional.one_hot(targets, self.classes).float()
        self.cross = self.cross + rows.T @ hot
        self.gram = self.gram + rows.T @ rows
        cut = int(0.8 * len(rows))
        cross, gram = rows[:cut].T @ hot[:cut], rows[:cut].T @ rows[:cut]
        identity = torch.eye(len(gram))
        losses = {}
        for penalty in (10.0**e for e in range(-8, 9)):
            weights = torch.linalg.solve(gram + penalty * identity, cross)
            losses[penalty] = float(torch.nn.functional.mse_loss(rows[cut:] @ weights, hot[cut:]))
        self.penalty = min(losses, key=losses.__getitem__)
        self.weights = torch.linalg.solve(self.gram + self.penalty * identity, self.cross)
        return {"s": time.perf_counter() - began, "penalty": self.penalty}

    def kept(self) -> int:
        return 4 * (self.gram.numel() + self.cross.numel())


def accuracy(classifier: Classifier, rows: Tensor, targets: Tensor) -> float:
    return float(((rows @ classifier.weights).argmax(1) == targets).double().mean())


def peak(call: Callable[[], Any]) -> int:
    """Largest number of bytes in tensors that `call` holds at once, beside what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    found = profiler.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in found if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def memory(make: Callable[[], Classifier], data: Data, tasks: int, unit: int) -> dict[str, float]:
    """Gram matrices kept between tasks, and the most at any moment of a task (a replay: counting costs time)."""
    classifier = make()
    most = 0
    for task in range(tasks):
        rows, targets = data.task(task)
        most = max(most, peak(functools.partial(classifier.learn, rows, targets)))
    return {"kept": classifier.kept() / unit, "peak": (classifier.kept() + most) / unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=4000, help="M")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--rows", type=int, default=1000, help="of a task")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--distance", type=float, default=0.25, help="of the classes, in units of the noise")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="M = 10,000 and two tasks of ten classes")
    given = parser.parse_args()
    if given.large:
        given.width, given.tasks, given.classes = 10_000, 2, 20
    torch.set_num_threads(given.threads)
    torch.linalg.solve(torch.eye(2), torch.ones(2, 1))  # the first call loads the library
    data, unit = Data(given), 8 * given.width**2
    makers: dict[str, Callable[[], Classifier]] = {
        "ours": lambda: Ours(given.width, given.classes),
        "ranpac": lambda: RanPAC(given.width, given.classes),
    }
    classifiers = {name: make() for name, make in makers.items()}
    tasks = []
    for task in range(given.tasks):
        rows, targets = data.task(task)
        held_out = data.held_out(task + 1)
        done = {}
        for name in ("ours", "ranpac") if task % 2 == 0 else ("ranpac", "ours"):
            done[name] = classifiers[name].learn(rows, targets)
            done[name]["accuracy"] = accuracy(classifiers[name], *held_out)
        tasks.append({**done, "faster": done["ranpac"]["s"] / done["ours"]["s"]})
    del classifiers
    total = {name: sum(t[name]["s"] for t in tasks) for name in makers}
    out = {
        **vars(given),
        "tasks": tasks,
        "total_s": total,
        "faster": total["ranpac"] / total["ours"],
        "faster_median": statistics.median(t["faster"] for t in tasks),
        "memory_grams": {
            "ours": memory(makers["ours"], data, min(given.tasks, 3), unit),
            "ranpac": memory(makers["ranpac"], data, 1, unit),  # every task is the same
        },
    }
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
