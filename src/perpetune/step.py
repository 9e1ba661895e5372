"""What one turn of the loop over tasks gets: `sequence.py` makes it, `run.py` learns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perpetune.exams.base import Exam
from perpetune.judges import Classes
from perpetune.tasks import Examples, Task


@dataclass(frozen=True)
class Step:
    """One task to learn and what is measured after it.

    Attributes:
        task: what is learned.
        others: other tasks to evaluate on afterwards: all earlier ones, and the next one where its
            accuracy before learning means something (forward transfer).
        document: what is stored of the task beside its name: sizes, data, fingerprint, bad files.
        reference: data without labels, protected before the task is learned; for the first task.
        names: names whose texts are protected in the same way.
        seen: all tasks so far, this one too, with their training data: what the oracle head is solved on afterwards
            (`evaluate.oracle`), which the method never sees; empty without it.
        exams: what is asked beside the tasks: before the first task, and after each.
        ahead: tasks that are not learned yet and are asked all the same, before the first task and after each.
        future: the classes of all tasks, learned or not, if tasks are asked before they are learned.
        last: whether it is the last task of its stream.
        prepared: seconds that it took to find the data and to check the examples.
        unasked: how many earlier tasks are not among `others`, because it is not their turn (`evaluate.earlier`).
        files: further files that are stored with the task.
        gate: the bar in points that decides whether the task is committed or refused (`perpetune.gate`); None commits
            it.
    """

    task: Task
    others: Sequence[Task]
    document: Mapping[str, Any]
    reference: Examples | None = None
    names: Sequence[str] = ()
    seen: Sequence[Task] = ()
    exams: Sequence[Exam] = ()
    ahead: Sequence[Task] = ()
    future: Classes | None = None
    last: bool = False
    prepared: float = 0.0
    unasked: int = 0
    files: Mapping[str, bytes] = field(default_factory=dict)
    gate: float | None = None
