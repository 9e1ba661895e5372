"""The final accuracy of a recipe, for streams that are long to run: tasks are learned in turn and tested at the end.

    python benchmarks/final.py benchmarks/recipes/cifar100-dino56-first.yaml --seed 1 --oracle
    python benchmarks/final.py benchmarks/recipes/cifar100-dino56-first.yaml --set head.carry=true --stale

`perpetune run` tests all earlier tasks after each task and stores a state; here nothing is stored. A head `ridge` is
solved after the last task alone, for nothing reads it before. `joint` trains once, on the union of all tasks.

Prints JSON:

    final    mean over tasks of the accuracy on their test images, of all classes, in per cent
    oracle   the same with a head `ridge` that is solved on all old data with the final features: a diagnosis
    stale    the same with sums that are not carried, from the same training
    moves    of carried sums, for each task: how far features moved, and the share of it that left-out classes miss
    reread   frozen or tuned features read at another number of taps (0: the net's own feature), solved on all data
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from perpetune.build import build_backbone, build_method, build_runtime
from perpetune.heads import Ridge
from perpetune.heads.base import Head
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.models.classifier import learn_statistics
from perpetune.recipe import load_recipe
from perpetune.sequence import TaskSequence
from perpetune.tasks import Task, evaluation_batches


def accuracies(tasks: list[Task], classes: list[str], scores: Callable[[Any], Tensor]) -> list[float]:
    """In per cent on each task's test examples, among all classes."""
    found = []
    for task in tasks:
        assert task.test is not None
        rows = torch.tensor([classes.index(name) for name in task.classes])
        right = 0
        with torch.no_grad():
            for batch in evaluation_batches(task.test.questions(), 64, task.runtime):
                right += int((scores(batch.inputs).argmax(1).cpu() == rows[batch.targets.cpu()]).sum())
        found.append(100 * right / len(task.test))
    return found


class Sums:
    """A head `ridge` that only looks on: it is shown what the method makes of each task, and solved at the end."""

    def __init__(self, width: int, **options: Any):
        self.head = Ridge(width, **options)

    def add(self, method: Method, task: Task, last: bool) -> None:
        self.head.grow(task.classes, task.generator("head"))
        with solved(last):
            learn_statistics(task, 64, [(self.head, lambda batch: method.features(batch.inputs))])


def solved(last: bool) -> Any:
    """Inside, heads `ridge` are solved only if this is the last task."""
    settle = Ridge.settle

    def skipped(head: Ridge, *args: Any) -> None:
        settle(head, *args) if last else head._clear()

    return mock.patch.object(Ridge, "settle", skipped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="changes", action="append", default=[], help="KEY=VALUE of the recipe")
    parser.add_argument("--oracle", action="store_true")
    parser.add_argument("--stale", action="store_true")
    parser.add_argument("--reread", type=int, nargs="*", default=[])
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, [f"seed={given.seed}", *given.changes])
    backbone = build_backbone(recipe)
    runtime = build_runtime(recipe)
    method = build_method(recipe, backbone).to(runtime.device)
    joint = method.needs_earlier_data
    sequence = TaskSequence(recipe, method.model.view, runtime, keeps_data=joint)
    steps = [sequence.of_stream(index, []) for index in range(len(sequence.stream.tasks))]
    tasks, began = [method.model.posed(step.task) for step in steps], time.perf_counter()
    head: Head | None = getattr(method.model, "head", None)
    stale, moves = Sums(backbone.dim), []
    certificates: list[dict[str, Any]] = []
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        if joint and not last:
            continue
        with solved(last):
            certificates = learn_protected(method, step.task, step.reference) or certificates
        if given.stale:
            stale.add(method, tasks[index], last)
            moves.append({k: round(v, 3) for k, v in getattr(head, "_carried", {}).items()})
    learned = time.perf_counter()

    def final(scores: Callable[[Any], Tensor]) -> float:
        return round(statistics.mean(accuracies(tasks, method.classes, scores)), 2)

    def by_all_data() -> float:
        sums = Sums(method.features(next(tasks[0].batches(2)).inputs).shape[1])
        for index, task in enumerate(tasks):
            sums.add(method, task, index == len(tasks) - 1)
        return final(lambda inputs: sums.head(method.features(inputs)))

    each = accuracies(tasks, method.classes, method.predict)
    result: dict[str, Any] = {"recipe": recipe.name, "changes": given.changes, "seed": given.seed}
    result |= {"final": round(statistics.mean(each), 2), "tasks": [round(value, 1) for value in each]}
    if certificates:
        result["certificate"] = {key: certificates[-1][key] for key in ("worst", "median", "room")}
    if given.stale:
        result |= {"stale": final(lambda inputs: stale.head(method.features(inputs))), "moves": moves}
    if given.oracle:
        result["oracle"] = by_all_data()
    for count in given.reread:
        backbone.tap(count or None)
        result[f"reread {count}"] = by_all_data()
    print(json.dumps({**result, "learn_s": round(learned - began), "all_s": round(time.perf_counter() - began)}))


if __name__ == "__main__":
    main()
