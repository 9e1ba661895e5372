"""How a task is scored. The method sees images alone: no label, no task, and no class list to choose from."""

from __future__ import annotations

from typing import Any, Literal

import torch

from perpetune.errors import Interrupted
from perpetune.methods.base import Method
from perpetune.tasks import Task, evaluation_batches

Setting = Literal["class", "domain", "task"]


@torch.no_grad()
def evaluate(method: Method, task: Task, *, setting: Setting, batch_size: int) -> dict[str, Any] | None:
    """Counts of right predictions on the task's test data, None when it has none.

    Only with `setting="task"` are the scores of classes outside the task left out, and this is done
    here, after the method has answered.

    Returns:
        `{"correct": int, "total": int, "per_class": {name: [correct, total]}}`.
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
    for batch in evaluation_batches(task.test, batch_size, run):
        with run.autocast():
            scores = method.predict(batch.inputs)
        best = scores.float().masked_fill(~allowed, -torch.inf).argmax(1)
        right = (best == rows[batch.targets]).to(torch.int64)
        hits[0].index_add_(0, batch.targets, right)
        hits[1] += torch.bincount(batch.targets, minlength=len(task.classes))
        signum = run.stop_requested(due=False)
        if signum is not None:
            raise Interrupted(f"stopped while task {task.name} was evaluated", signum)
    correct, total = run.sum(hits).tolist()
    per_class = {c: [correct[i], total[i]] for i, c in enumerate(task.classes) if total[i]}
    return {"correct": sum(correct), "total": sum(total), "per_class": per_class}
