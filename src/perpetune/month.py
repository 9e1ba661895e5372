"""What a month of data holds, before anything of it is learned: `perpetune update --dry-run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from perpetune.data.names import several, spellings
from perpetune.data.sketch import ALL, all_of
from perpetune.data.tasks import TaskData
from perpetune.state import Committed


def month(data: TaskData, committed: Sequence[Committed]) -> dict[str, Any]:
    """What the data of an update hold, compared with the tasks that were learned, in JSON's types.

    Returns:
        `task`; `noun`, the word for one example; `train`, `validation` and `test`, numbers of examples; `classes`, with
        `new` and `known`, each a number of examples by class; `copies`, with `inside` (examples that are in these data
        more than once, but for the first), `of` (how many examples each earlier task had, by its name), `examples`
        (those examples by name, each with the tasks that had it) and `untold` (tasks of which nobody can say it);
        `spellings`, pairs of a new class and a learned one that may be the same; `bad`, examples that cannot be read;
        `warnings`.
    """
    parts = {name: getattr(data, name) for name in ("train", "validation", "test")}
    counts: Counter[str] = Counter()
    for part in parts.values():
        if part is not None and data.classes:
            counts.update(data.classes[target] for target in part.targets)
    known = dict.fromkeys(name for c in committed for name in c.classes())
    new = [name for name in data.classes if name not in known]
    table = data.train.table
    return {
        "task": data.name,
        "noun": table.noun,
        **{name: 0 if part is None else len(part) for name, part in parts.items()},
        "classes": {
            "new": {name: counts[name] for name in new},
            "known": {name: counts[name] for name in data.classes if name in known},
        },
        "copies": _copies(data, [c for c in committed if not c.gone]),
        "spellings": [list(pair) for pair in spellings(new, [*known, *(n for n in data.classes if n in known)])],
        "bad": list(data.bad),
        "warnings": list(data.warnings),
    }


def _copies(data: TaskData, committed: Sequence[Committed]) -> dict[str, Any]:
    hashes = data.hashes
    if hashes is None:
        return {"inside": None, "of": {}, "examples": {}, "untold": [c.name for c in committed]}
    learned, untold = {}, []
    for one in committed:
        files = one.read("task.json", ALL)
        found = all_of(one.document(files, "task.json").get("contents"), files.get(ALL))
        if found is None:
            untold.append(one.name)
        else:
            learned[one.name] = found
    name = data.train.table.name
    having = {row: [task for task, seen in learned.items() if value in seen] for row, value in hashes.items()}
    return {
        "inside": len(hashes) - len(set(hashes.values())),
        "of": {task: n for task in learned if (n := sum(task in tasks for tasks in having.values()))},
        "examples": {name(row): tasks for row, tasks in having.items() if tasks},
        "untold": untold,
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """The same for people. What cannot be read was told while it was looked at."""
    noun, copies = found["noun"], found["copies"]
    parts = [f"{_many(found['train'], noun)} to learn from"]
    parts += [f"{found['validation']} for validation"] if found["validation"] else []
    parts += [f"{found['test']} held out for testing"] if found["test"] else []
    said = [f"task {found['task']}: {', '.join(parts)}"]
    for kind, of in found["classes"].items():
        named = [f"{name} ({count})" for name, count in of.items()]
        said += [f"{kind} classes: {len(of)}: {several(named, 20)}"] if of else []
    if not any(found["classes"].values()):
        said.append("no classes: its answers are free texts")
    said += [f"is '{new}' a spelling of '{known}', which was learned?" for new, known in found["spellings"]]
    if copies["inside"]:
        said.append(f"more than once in these data: {_many(copies['inside'], noun)}")
    if copies["examples"]:
        of = [f"{task} ({count})" for task, count in copies["of"].items()]
        many, examples = _many(len(copies["examples"]), noun), several(list(copies["examples"]))
        said.append(f"seen before: {many}, with task {several(of)}: {examples}")
    elif copies["inside"] is not None and len(copies["untold"]) == 0:
        said.append(f"no {noun} was seen before")
    if copies["untold"]:
        said.append(f"seen with task {several(copies['untold'])}: not known, because it keeps no hashes of its {noun}s")
    return [*said, "nothing was learned"]


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
