"""Features that move. Those of earlier tasks, since they were learned; and is an update needed? New examples without
labels against features of what was learned.

A state keeps features of up to `tally.SAMPLE` test examples of each task, as they were when it was learned: of length
1, multiplied by a random matrix, which keeps distances, and rounded to 16 bits. New examples are compared with them in
two ways (`numerics.two_samples`): whether both are one sample of features, and how many are far from all that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from perpetune import tally
from perpetune.errors import DataError, StateError, UsageError
from perpetune.evaluate import probe
from perpetune.methods.base import Method
from perpetune.numerics.two_samples import FAR, draws_for, energy_test, far_test, for_this, scaled
from perpetune.seeding import generator
from perpetune.snapshot import read_tensors
from perpetune.state import Committed, State
from perpetune.tally import Asked, probe_rows
from perpetune.tasks import Task

FEATURES = "features.safetensors"  # of a few test examples of the task, as they were when it was learned
SAMPLE = "sample.safetensors"
MADE = "features.json"  # what made the features of its test examples then
WIDTH = 64
"""Columns of what is kept of a feature."""
MOST = 1000
"""Examples that are compared, at most, on each side."""
LEAST = 20
"""With fewer examples on a side nobody can tell."""
MOVED = 0.02
"""Features that have moved farther since (`measured`) are not comparable any more."""
LEVELS = (0.005, 0.5)


def projected(features: Tensor) -> Tensor:
    """Features `(n, D)` of length 1 as they are kept: `(n, WIDTH)`, or as they are if they are not wider."""
    if features.shape[1] <= WIDTH:
        return features.float()
    drawn = torch.randn(features.shape[1], WIDTH, generator=generator("drift", features.shape[1])) / WIDTH**0.5
    found: Tensor = features.float() @ drawn
    return found


def kept(features: Tensor) -> dict[str, Tensor]:
    """The tensors of `SAMPLE`."""
    return {"features": projected(features).half().contiguous()}


def stored(task: Committed) -> Tensor | None:
    """What is kept of a task, `(n, WIDTH)`; None if nothing is. Of an older version it is of fewer examples."""
    files = task.read(SAMPLE, FEATURES)
    if SAMPLE in files:
        return load(files[SAMPLE])["features"].float()
    return projected(load(files[FEATURES])["features"]) if FEATURES in files else None


def moved(task: Committed, last: Committed) -> float | None:
    """How far features of a task have moved since it was learned, measured when the last task was; None if nobody knows
    it."""
    if task.index == last.index:
        return 0.0
    metrics = last.document(last.read("metrics.json"), "metrics.json")
    found = metrics.get("drift", {}).get(task.name)
    return None if found is None else float(found)


def some(count: int, *purpose: str) -> list[int]:
    """`MOST` of so many numbers, or all of them; always the same ones."""
    if count <= MOST:
        return list(range(count))
    return sorted(torch.randperm(count, generator=generator("drift", *purpose))[:MOST].tolist())


def check_level(level: float) -> None:
    """UsageError if it is no level that the tests can hold."""
    if not LEVELS[0] <= level <= LEVELS[1]:  # not a number is none either
        raise UsageError(f"level is {level!r}: a share from {LEVELS[0]} to {LEVELS[1]} is expected, such as 0.05")


def measured(
    method: Method, task: Task, others: Sequence[Task], state: State, asked: Mapping[str, Asked]
) -> tuple[dict[str, bytes], dict[str, float]]:
    """Features of a task that was learned just now, as files to store; how far those of others have moved since they
    were learned.

    The distance `‖f̂ − f̂'‖` of normalised features, the mean over a task's probe: 0 where nothing moved, at most 2. If
    what makes the features has the same digest as when the task was learned, it is 0 and they are not looked at.

    Args:
        state: as it is before the task is committed.
        asked: what came of asking the tasks. Where its answers were made of the features, these are used.
    """
    if task.runtime.rank > 0:
        return {}, {}
    far, before = dict[str, float](), {c.name: c for c in state.committed}
    for other in others:
        if other.name not in before or other.test is None or not len(other.test):
            continue
        made = asked[other.name].made
        if made is not None and before[other.name].has(MADE) and before[other.name].parsed(MADE)["made"] == made:
            far[other.name] = 0.0
            continue
        known = asked[other.name].probed
        cell = asked[other.name].cell
        numbers, now = known if known is not None else _probed(method, other, cell)
        then = before[other.name].read(FEATURES) if now is not None else {}
        if now is None or not then:
            continue
        rows = probe_rows(len(other.test))
        place = {number: row for row, number in enumerate(rows)}
        old = read_tensors(then, FEATURES, other.name)["features"]
        if len(old) == len(rows) and old.shape[1] == now.shape[1]:
            old = old[[place[number] for number in numbers]]
            far[other.name] = round(float((now - old).norm(dim=-1).mean()), 6)
    return _files(method, task, asked[task.name].probed), far


def _files(method: Method, task: Task, known: tuple[list[int], Tensor] | None) -> dict[str, bytes]:
    """The files with features of some test examples of a task that was learned just now.

    Args:
        known: numbers of examples and their features, if the answers were made of features.
    """
    rows = probe_rows(len(task.test or ()))
    if known is None:
        features = probe(method, task, new=True)
        known = None if features is None else (rows, features)
    if known is None:
        return {}
    place = {number: row for row, number in enumerate(known[0])}
    probed = known[1][[place[number] for number in rows]]
    return {FEATURES: save({"features": probed.contiguous()}), SAMPLE: save(kept(known[1]))}


def _probed(method: Method, task: Task, cell: Mapping[str, Any] | None) -> tuple[list[int], Tensor | None]:
    """The numbers of a task's probe, and their features as they are now; None if nothing may be computed for them.

    Args:
        cell: the counts of the task. Of a sample of the task not more is computed than was asked.
    """
    assert task.test is not None
    rows = probe_rows(len(task.test))
    now = probe(method, task, from_kept=cell is None or "of" in cell)
    if now is None and cell is not None:
        rows = rows[: cell["total"]]
        now = probe(method, task, rows)
    return rows, now


def known(
    method: Method,
    tasks: Sequence[Committed],
    past: Callable[[Committed], Task | None],
    note: Callable[[str], None],
) -> dict[str, Tensor]:
    """What is kept of each task, by its name, where features are as they were when it was learned. Where they have
    moved, they are computed again.

    Args:
        method: as it is after the last of the tasks.
        past: gives a task's test data, if they are still there.
        note: is told of each task that cannot be compared with.
    """
    found = dict[str, Tensor]()
    for task in tasks:
        if task.gone:
            continue
        kept, far = stored(task), moved(task, tasks[-1])
        still = far <= MOVED if far is not None else not method.trained
        if kept is None or still:
            found |= {} if kept is None else {task.name: kept}
            continue
        data = past(task)
        rows = probe_rows(len(data.test), tally.SAMPLE) if data is not None and data.test is not None else []
        if data is None or not rows:
            how = "nobody knows how far" if far is None else f"by {far:.2f}"
            note(
                f"task {task.name} is not compared with: its features have moved since it was learned ({how}), and "
                "its test data are gone"
            )
            continue
        features = probe(method, data, rows)
        found |= {} if features is None else {task.name: projected(features)}
    return found


def compare(known: Tensor, new: Tensor, names: Sequence[str], level: float, noun: str) -> dict[str, Any]:
    """What the two tests say, in JSON's types.

    Args:
        known: what is kept of learned tasks, `(n, W)`.
        new: the same of new examples, `(m, W)`, in any number.
        names: of the new examples.
        level: the share of months like what was learned that may be flagged.
        noun: the word for the examples, in the plural.

    Returns:
        `drift`; `level`; `examples` and `known`, how many were compared; `copies`, new examples that are like another
        one and count once; `tests`: of `features` the `distance` and the `chance`, of `far` the `share`, what was
        `expected`, and the `chance`; `far`, names of examples that are far from all that is known.

    Raises:
        StateError, DataError: there are too few on one side to tell.
    """
    check_level(level)
    rows = new.half()
    _, inverse = rows.unique(dim=0, return_inverse=True)
    seen: dict[int, int] = {}
    for place, one in enumerate(inverse.tolist()):
        seen.setdefault(one, place)
    single = sorted(seen.values())
    if len(known) < LEAST:
        raise StateError(
            f"the state keeps features of {len(known)} held-out {noun}, which are too few to compare with: {LEAST} are "
            "needed"
        )
    if len(single) < LEAST:
        copies = f" different {noun}" if len(single) < len(rows) else f" {noun}"
        raise DataError(f"{len(single)}{copies} are too few to tell: {LEAST} are needed")
    first, second = scaled(known, rows[single].float())
    n, m = len(first), len(second)
    distance, chance = energy_test(first, second, draws_for(level / 2), generator("drift", "ways"))
    far, many = far_test(first, second)
    chances = [min(1.0, 2 * for_this(one, n, m)) for one in (chance, many)]  # two tests: each at half of the level
    return {
        "drift": min(chances) <= level,
        "level": level,
        "examples": m,
        "known": n,
        "copies": len(rows) - m,
        "tests": {
            "features": {"distance": round(distance, 6), "chance": round(chances[0], 6)},
            "far": {"share": round(float(far.double().mean()), 6), "expected": FAR, "chance": round(chances[1], 6)},
        },
        "far": [names[single[place]] for place in far.nonzero()[:, 0].tolist()],
    }
