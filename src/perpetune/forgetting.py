"""Take a task or a class out of a state again, exactly: the model is as if it had never learned it, or nothing changes.

Three things can be exact:

  * the newest task: the model as it was before it is still stored;
  * a task of a method whose features do not depend on it, under a head from sums: the sums after the task less those
    before it are its own part (`Head.take_out`);
  * a class that has class means of its own (head `ncm`).

It is stored as an entry of its own behind the tasks, committed like one. What earlier entries hold of the model goes
with that commit, for a rollback to them would bring back what was forgotten.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from perpetune.errors import StateError, UsageError, closest
from perpetune.heads.base import Head
from perpetune.methods.base import Method
from perpetune.models.classifier import Classifier
from perpetune.state import Committed, State

MARK = "forget"  # the key in the `from` of an entry: what was asked for


@dataclass(frozen=True)
class Asked:
    """What is to be forgotten: a task or a class, by its name."""

    task: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Found:
    """What it is in a state.

    Attributes:
        tasks: those that are forgotten.
        classes: those that no other task has.
        part: the tasks of which `classes` are only a part.
    """

    tasks: Sequence[Committed]
    classes: Sequence[str]
    part: Sequence[Committed] = ()


def look_up(state: State, asked: Asked) -> Found:
    """The tasks and classes that are asked for.

    Raises:
        UsageError: there is no such task or class, or nothing would be left.
    """
    known = [task for task in state.committed if not task.gone]
    of = {task.name: task.classes() for task in known}
    if asked.task is not None:
        chosen = [task for task in known if asked.task in (task.name, task.folder.name)]
        if not chosen:
            raise UsageError(f"{state.folder} has no task {asked.task!r}; {closest(asked.task, of)}")
        others = {name for task in known if task not in chosen for name in of[task.name]}
        found = Found(chosen, [name for name in of[chosen[0].name] if name not in others])
    else:
        every = dict.fromkeys(name for classes in of.values() for name in classes)
        if asked.name not in every:
            raise UsageError(f"{state.folder} has not learned class {asked.name!r}; {closest(str(asked.name), every)}")
        having = [task for task in known if asked.name in of[task.name]]
        alone = [task for task in having if of[task.name] == [asked.name]]
        found = Found(alone, [str(asked.name)], [task for task in having if task not in alone])
    if len(found.tasks) == len(known):
        raise UsageError(
            f"nothing would be left: `perpetune rollback {state.folder} --to start` drops all that {state.folder} has "
            "learned"
        )
    return found


def take_out(method: Method, state: State, found: Found) -> None:
    """Take it out of the method, which is as after the last commit.

    Raises:
        UsageError: it cannot be exact; the message says what can be done instead. The method may have changed, and the
            state has not.
    """
    tasks = state.committed
    if [task.index for task in found.tasks] == [tasks[-1].index] and not found.part and not tasks[-2].pruned:
        state.load(method, tasks[-2])
        return
    first = min(task.index for task in [*found.tasks, *found.part])
    what = f"class {found.classes[0]}" if found.part else f"task {found.tasks[0].name}"
    model = method.model
    if reason := method.depends(first) or ("" if isinstance(model, Classifier) else "it has no head of sums"):
        name = state.recipe.method.name
        raise UsageError(f"{what} cannot be taken out exactly of method {name}: {reason}; {_instead(state, first)}")
    assert isinstance(model, Classifier)
    if found.part:
        if not _by_class(model.head):
            others = [name for name in found.part[0].classes() if name not in found.classes]
            raise UsageError(
                f"{what} cannot be taken out exactly of head {state.recipe.head.name}, which keeps one sum over all "
                f"classes of task {found.part[0].name} ({len(others)} others): `perpetune forget {state.folder} --task "
                f"{found.part[0].name}` forgets the task; head ncm keeps a sum for each class"
            )
        model.take_out(_none, found.classes, True)
        return
    parts = [_parts(method, state, task) for task in found.tasks]
    try:
        if len(parts) > 1:  # to make them loads the model as it is now again
            parts = [_made(*part()) for part in parts]
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            whole = last and set(found.tasks[-1].classes()) <= set(found.classes)
            method.take_out(found.tasks[number - 1].name, part, found.classes if last else [], whole)
    except UsageError as error:
        raise UsageError(f"{what} cannot be taken out exactly: {error}; {_instead(state, first)}") from None
    except StateError as error:
        raise UsageError(
            f"{what} cannot be taken out exactly: {error}, so nobody knows its part of the sums (run.keep: all keeps "
            f"it); {_instead(state, first)}"
        ) from None


def _made(before: Head | None, after: Head) -> Callable[[], tuple[Head | None, Head]]:
    return lambda: (before, after)


def _none() -> tuple[Head | None, Head]:
    raise AssertionError("a head with a sum for each class asks for no part")


def _by_class(head: Head) -> bool:
    """Whether what a head has learned of one class stands by itself."""
    return bool(getattr(getattr(head, "expert", None) or head, "by_class", False))


def _instead(state: State, first: int) -> str:
    tasks = state.committed
    before = tasks[first - 1] if first and not tasks[first - 1].pruned else None
    to = "start" if before is None else before.name
    return f"instead, go back with `perpetune rollback {state.folder} --to {to}` and learn the later tasks again"


def _parts(method: Method, state: State, task: Committed) -> Callable[[], tuple[Head | None, Head]]:
    """Copies of the head before and after a task."""

    def parts() -> tuple[Head | None, Head]:
        tasks = state.committed
        try:
            before = _head(method, state, tasks[task.index - 1]) if task.index else None
            return before, _head(method, state, task)
        finally:
            state.load(method, tasks[-1])

    return parts


def _head(method: Method, state: State, task: Committed) -> Head:
    state.load(method, task)
    assert isinstance(method.model, Classifier)
    head: Head = copy.deepcopy(method.model.head)
    return head


def document(index: int, name: str, asked: Asked, found: Found) -> dict[str, Any]:
    """`task.json` of the entry."""
    wanted = {"task": asked.task} if asked.task is not None else {"class": asked.name}
    return {
        "index": index,
        "name": name,
        "classes": [],
        **dict.fromkeys(("train", "validation", "test"), 0),
        "from": {"name": None, MARK: wanted},
        "fingerprint": "",
        "bad": [],
        "warnings": [],
        "forgot": {"tasks": [task.name for task in found.tasks], "classes": list(found.classes)},
    }
