"""How a task is scored. The method sees images alone: no label, no task, and no class list to choose from."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from perpetune.errors import Interrupted
from perpetune.methods.base import Method
from perpetune.tasks import Task, evaluation_batches, load_batches

Setting = Literal["class", "domain", "task"]
PROBE = 32  # test images of a task by which the drift of its features is measured


@torch.no_grad()
def evaluate(method: Method, task: Task, *, setting: Setting, batch_size: int) -> dict[str, Any] | None:
    """Counts of right predictions on the task's test data, None when it has none.

    Only with `setting="task"` are the scores of classes outside the task left out, and this is done
    here, after the method has answered.

    Returns:
        `{"correct": int, "total": int, "per_class": {name: [correct, total]}}`, with `"others"`, right predictions of
        the method's other ways to answer, and `"gauges"`, means of its gauges, by name, where it has any.
    """
    if task.test is None or len(task.test) == 0:
        return None
    run, known = task.runtime, method.classes
    row = {name: i for i, name in enumerate(known)}
    rows = torch.tensor([row.get(name, -1) for name in task.classes], device=run.device)  # -1: never predicted
    allowed = torch.ones(len(known), dtype=torch.bool, device=run.device)
    if setting == "task":
        allowed[:] = False
        allowed[rows[rows >= 0]] = True
    hits = torch.zeros(2, len(task.classes), dtype=torch.int64, device=run.device)
    others: dict[str, Tensor] = {}
    gauges: dict[str, Tensor] = {}
    for batch in evaluation_batches(task.test, batch_size, run):
        with run.autocast():
            answers = method.answers(batch.inputs)
        right = _right(answers.scores, allowed, rows[batch.targets])
        hits[0].index_add_(0, batch.targets, right)
        hits[1] += torch.bincount(batch.targets, minlength=len(task.classes))
        for name, scores in answers.others.items():
            others[name] = _right(scores, allowed, rows[batch.targets]).sum() + others.get(name, 0)
        for name, values in answers.gauges.items():
            gauges[name] = values.float().sum() + gauges.get(name, 0)
        signum = run.stop_requested(due=False)
        if signum is not None:
            raise Interrupted(f"stopped while task {task.name} was evaluated", signum)
    correct, total = run.sum(hits).tolist()
    per_class = {c: [correct[i], total[i]] for i, c in enumerate(task.classes) if total[i]}
    cell: dict[str, Any] = {"correct": sum(correct), "total": sum(total), "per_class": per_class}
    # The first process always has a batch; one without any does not know the names, and has nothing to add.
    names, zero = run.of_first((list(others), list(gauges))), torch.zeros((), dtype=torch.int64, device=run.device)
    if names[0]:
        cell["others"] = {name: int(run.sum(others.get(name, zero))) for name in names[0]}
    if names[1]:
        sums = {name: float(run.sum(gauges.get(name, zero.float()))) for name in names[1]}
        cell["gauges"] = {name: round(value / sum(total), 6) for name, value in sums.items()}
    return cell


def _right(scores: Tensor, allowed: Tensor, rows: Tensor) -> Tensor:
    """1 where the best allowed class is that of `rows (B,)`, else 0; int64 `(B,)`."""
    best = scores.float().masked_fill(~allowed, -torch.inf).argmax(1)
    return (best == rows).to(torch.int64)


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
    batch = next(load_batches(task.test, [[(i, None) for i in numbers]], task.runtime))
    with task.runtime.autocast():
        features = method.features(batch.inputs)
    return F.normalize(features.float(), dim=-1).cpu()
