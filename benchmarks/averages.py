"""What averages of the pets keep and cost on the packaged digits: five tasks of two, LoRA, a head by gradient.

    python benchmarks/averages.py --seed 0 online dynamic keep-0.5 end-0.9

Prints a line of JSON for each row. `own` is the accuracy among the classes of the true task. `stale_ridge` is that of
a ridge head which is solved on the features as they were when each class was learned, so it measures how far the pets
have moved. `all` is the accuracy among all classes. The first two are the final mean and the forgetting, in percent.
Then come the facts about the last task's average. A row takes about a minute of one CPU core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perpetune.build import build_backbone, build_method
from perpetune.evaluate import evaluate
from perpetune.heads.base import Head
from perpetune.heads.ridge import Ridge
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.models.classifier import learn_statistics
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime
from perpetune.seeding import generator
from perpetune.sequence import TaskSequence
from perpetune.tasks import Task, evaluation_batches

ROWS: dict[str, dict[str, Any] | None] = {
    "online": None,
    "dynamic": {"weight": "dynamic"},
    "curvature": {"weight": "curvature"},
    "fixed-0.9": {"weight": 0.9},
    "keep-0.5": {"keep": 0.5},
    "end-0.5": {"keep": 0.5, "over": "end"},
    "fixed-0.99": {"weight": 0.99},
    "end-0.9": {"keep": 0.9, "over": "end"},
    "fixed-0.999": {"weight": 0.999},
    "lae-0.99": {"weight": 0.99, "restart": False},
    "lae-0.9999": {"weight": 0.9999, "restart": False},
}


def own(method: Method, task: Task) -> float:
    cell = evaluate(method, task, among="task", batch_size=64)
    return 100 * cell["correct"] / cell["total"] if cell else 0.0


def among_all(method: Method, task: Task) -> float:
    cell = evaluate(method, task, among="seen", batch_size=64)
    return 100 * cell["correct"] / cell["total"] if cell else 0.0


@torch.no_grad()
def by(head: Head, method: Method, task: Task) -> float:
    """The accuracy of another head on the method's features, among all its classes."""
    assert task.test is not None
    rows, right, total = head.rows(task.classes), 0, 0
    for batch in evaluation_batches(task.test, 64, task.runtime):
        scores: Tensor = head(method.features(batch.inputs).float())
        right += int((scores.argmax(1) == rows[batch.targets]).sum())
        total += len(scores)
    return 100 * right / total


def final(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean after the last task, and the mean loss since each earlier task was learned."""
    last = rows[-1]
    lost = [rows[j][j] - last[j] for j in range(len(last) - 1)]
    return [round(sum(last) / len(last), 1), round(sum(lost) / len(lost), 1)]


def row(average: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    content = {
        "seed": seed,
        "pet": {"name": "lora", "at": ["q", "v"], "blocks": [3, 4, 5], "rank": 8, "alpha": 16},
        "average": average,
        "train": {"epochs": 5, "batch_size": 32, "lr": 1e-3, "head_lr": 1e-2},
        "data": "digits",
        "stream": {"classes_per_task": 2, "class_order": "sorted", "train_per_class": 100, "test_per_class": 30},
    }
    recipe = make_recipe(content)
    backbone, runtime = build_backbone(recipe), Runtime(seed=seed)
    method, ridge = build_method(recipe, backbone), Ridge(backbone.dim)
    sequence = TaskSequence(recipe, method.model.view, runtime, keeps_data=False)
    tasks: list[Task] = []
    owns: list[list[float]] = []
    stale: list[list[float]] = []
    for number in range(len(sequence.stream.tasks)):
        task = sequence.of_stream(number, []).task
        tasks.append(task)
        learn_protected(method, task)
        ridge.grow(task.classes, generator("ridge"))
        learn_statistics(task, 64, [(ridge, lambda batch: method.features(batch.inputs))])
        owns.append([own(method, one) for one in tasks])
        stale.append([by(ridge, method, one) for one in tasks])
    everything = sum(among_all(method, one) for one in tasks) / len(tasks)
    facts = method.facts().get("average", {})
    about = {key: facts.get(key) for key in ("weight", "in_range", "kept", "gap")}
    return {"own": final(owns), "stale_ridge": final(stale), "all": round(everything, 1), **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.rows or ROWS:
        print(json.dumps({"row": name, "seed": given.seed, **row(ROWS[name], given.seed)}), flush=True)


if __name__ == "__main__":
    main()
