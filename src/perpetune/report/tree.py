"""The tree of similar tasks that TreeLoRA keeps: how it stood after each task, who helped whom, what is stored.

What is told comes from states of any age: what is missing or of another form than expected is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from perpetune.report import form
from perpetune.report.matrix import LARGE, READABLE, ROOMY, MatrixCell
from perpetune.report.palette import heat_level

KIND = "similarity tree"  # what these facts say of themselves
DEEPEST = 64  # levels of a tree that are read; whatever is below shows as one leaf
MEANING = (
    "Tasks that pull the adapters the same way are near each other: distances are those of the tasks’ signatures, from "
    "0 (alike) to 1. Each level of the tree splits by one group of modules, shallow ones first; a node’s radius is the "
    "largest distance of its tasks to their mean."
)
HELPED = (
    "While a task is learned (rows), each group of modules selects an earlier task (columns) that acts on the step. "
    "Cells say in what share of the task’s steps, in %, each was selected."
)
SIMILAR = (
    "1 minus the distance of two tasks’ signatures, after the last task. Colours run from the pair of tasks that are "
    "least alike to the pair that are most alike."
)
STORED = (
    "Adapters that are kept after each task, and what the tree stores of every task beside them: its signature. A "
    "merged adapter stands for several tasks."
)
WHOLE = "all modules"  # what splits a node that no group of modules does


@dataclass(frozen=True)
class Node:
    """Some tasks of the tree, by name.

    `split` is the group of modules by which its children were made, empty for a leaf. `merged` says of a leaf that its
    tasks have one adapter; `shared` are further tasks of that adapter, elsewhere in the tree.
    """

    tasks: list[str]
    split: str = ""
    radius: float | None = None
    spread: float | None = None
    children: tuple[Node, ...] = ()
    shared: tuple[str, ...] = ()
    merged: bool = False

    @property
    def name(self) -> str:
        """`amazon`; `amazon + yelp` where they have one adapter; `amazon, yelp` where the tree ends above them."""
        name = (" + " if self.merged else ", ").join(self.tasks)
        return f"{name} · shares with {', '.join(self.shared)}" if self.shared else name


@dataclass(frozen=True)
class Adapter:
    """One adapter that is kept: the tasks it is of, and its bytes."""

    tasks: list[str]
    size: int | None


@dataclass(frozen=True)
class Grown:
    """What is told after one task.

    Attributes:
        number, task: of the task, from 1.
        names: the tasks in the tree, in the order of their ids.
        root: None while the tree is empty.
        distances: of all pairs of `names`, as far as they are told.
        start: the task from whose adapter this one started; empty where from none.
        asked: how the start was chosen; empty where that is not told.
        helped: for each group of modules how often each earlier task was selected.
        adapters: kept after this task.
        merged: names of the tasks of each merge that was made after this task.
        signature: bytes of a task's signature.
    """

    number: int
    task: str
    names: list[str]
    root: Node | None
    distances: list[list[float | None]]
    start: str
    asked: str
    helped: list[tuple[str, dict[str, int]]]
    adapters: list[Adapter]
    merged: list[list[str]]
    signature: int | None

    @property
    def adapter_bytes(self) -> int:
        return sum(adapter.size or 0 for adapter in self.adapters)

    @property
    def signature_bytes(self) -> int:
        """Of all tasks in the tree."""
        return (self.signature or 0) * len(self.names)

    @property
    def levels(self) -> int:
        """Splits on the longest way from the root to a leaf."""
        return max((level for level, _ in walk(self.root)), default=0)


@dataclass(frozen=True)
class HelpedRow:
    """One group of modules while one task was learned: its steps, and the share of each earlier task."""

    group: str
    steps: str
    cells: list[MatrixCell | None]


@dataclass(frozen=True)
class HelpedTable:
    tasks: list[tuple[int, str, list[HelpedRow]]]  # number and name of the task, its groups of modules
    names: list[str]
    headings: list[str]  # of the columns: names, or the tasks' numbers for want of room
    style: str  # of the table: large, dense or neither
    folded: bool


@dataclass(frozen=True)
class SimilarityTable:
    rows: list[tuple[str, str, list[MatrixCell | None]]]  # number and name of the task, its cells
    names: list[str]
    headings: list[str]
    least: str  # similarity of two different tasks, at both ends of the colours; empty for fewer than two tasks
    most: str
    style: str
    folded: bool


@dataclass(frozen=True)
class StorageRow:
    """What is kept after one task, as text; `share` of the most that was ever kept."""

    number: int
    task: str
    start: str
    adapters: str
    size: str
    merged: str
    signature: str
    total: str
    share: float


def is_tree(facts: Mapping[str, Any]) -> bool:
    """Whether facts are told here, not among those of heads."""
    return facts.get("kind") == KIND


def grown(results: Mapping[str, Any]) -> list[Grown]:
    """What is told after each task, in their order; one tree a task."""
    listed = sorted(results.get("facts", []), key=lambda entry: entry["task"])
    found = {entry["task"]: facts for entry in listed for facts in entry["of"].values() if is_tree(facts)}
    return [_grown(i + 1, results["tasks"][i]["name"], facts) for i, facts in found.items()]


def walk(node: Node | None, level: int = 0) -> Iterator[tuple[int, Node]]:
    """The node and all below it, from the top, each with its level (0 is the first)."""
    if node is not None:
        yield level, node
        for child in node.children:
            yield from walk(child, level + 1)


def leaves(node: Node | None) -> list[Node]:
    return [found for _, found in walk(node) if not found.children]


def outline(node: Node | None) -> str:
    """The tree on one line: `(dbpedia, (amazon + yelp, agnews))`."""
    if node is None:
        return form.ABSENT
    return f"({', '.join(map(outline, node.children))})" if node.children else node.name


def described(node: Node) -> str:
    """`split by blocks 0-5, radius 0.310, spread 0.400`; of a leaf `one adapter` where it is merged, else nothing."""
    if not node.children:
        return "one adapter" if node.merged else ""
    parts = [f"split by {node.split}"]
    parts += [f"radius {form.thousandths(node.radius)}"] if node.radius is not None else []
    parts += [f"spread {form.thousandths(node.spread)}"] if node.spread is not None else []
    return ", ".join(parts)


def helped_table(results: Mapping[str, Any]) -> HelpedTable | None:
    """Who helped whom; None where no step was helped."""
    found = [entry for entry in grown(results) if any(steps for _, steps in entry.helped)]
    if not found:
        return None
    order = _numbers(results)
    names = list(dict.fromkeys(name for entry in found for _, steps in entry.helped for name in steps))
    names.sort(key=lambda name: order.get(name, len(order) + 1))
    tasks = [
        (entry.number, entry.task, [_helped_row(entry.task, group, steps, names) for group, steps in entry.helped])
        for entry in found
    ]
    folded = sum(len(rows) for _, _, rows in tasks) > 2 * READABLE
    return HelpedTable(tasks, names, _headings(names, order), _style(len(names)), folded)


def similarity_table(results: Mapping[str, Any]) -> SimilarityTable | None:
    """The similarities after the last task; None where none are told."""
    last = grown(results)[-1:]
    if not last or not any(value is not None for row in last[0].distances for value in row):
        return None
    names = last[0].names
    values = [[None if d is None else 1 - d for d in row] for row in last[0].distances]
    pairs = [v for i, row in enumerate(values) for j, v in enumerate(row) if i != j and v is not None]
    least, most = (min(pairs), max(pairs)) if pairs else (0.0, 1.0)
    rows, order = [], _numbers(results)
    for i, (name, row) in enumerate(zip(names, values, strict=True)):
        cells = [_similar(value, name, names[j], i == j, least, most) for j, value in enumerate(row)]
        rows.append((str(order.get(name, "")), name, cells))
    ends = (f"{least:.2f}", f"{most:.2f}") if pairs else ("", "")
    return SimilarityTable(
        rows, names, _headings(names, order), *ends, _style(len(names)), folded=len(names) > READABLE
    )


def storage_rows(results: Mapping[str, Any]) -> list[StorageRow]:
    found = grown(results)
    most = max((entry.adapter_bytes + entry.signature_bytes for entry in found), default=0)
    rows = []
    for entry in found:
        total = entry.adapter_bytes + entry.signature_bytes
        known = any(adapter.size is not None for adapter in entry.adapters)
        rows.append(
            StorageRow(
                entry.number,
                entry.task,
                _started(entry),
                form.count(len(entry.adapters)),
                form.size(entry.adapter_bytes if known else None),
                "; ".join(" + ".join(tasks) for tasks in entry.merged),
                form.size(entry.signature),
                form.size(total or None),
                total / most if most else 0.0,
            )
        )
    return rows


def told(results: Mapping[str, Any]) -> str:
    """`6 tasks, yelp started from amazon (nearest), helped most by amazon (62 % of steps), 5 adapters of 369 kB`, after
    the last task; empty without a tree."""
    found = grown(results)
    if not found:
        return ""
    last = found[-1]
    parts = [form.plural(len(last.names), "task")]
    parts += [f"{last.task} started from {_started(last)}"] if last.start else []
    sums: dict[str, int] = {}
    for _, steps in last.helped:
        for name, count in steps.items():
            sums[name] = sums.get(name, 0) + count
    if any(sums.values()):
        best = max(sums, key=lambda name: sums[name])
        parts.append(f"helped most by {best} ({form.percent(sums[best] / sum(sums.values()), 0)} % of steps)")
    if last.adapters:
        size = f" of {form.size(last.adapter_bytes)}" if last.adapter_bytes else ""
        parts.append(form.plural(len(last.adapters), "adapter") + size)
    return ", ".join(parts)


def _started(entry: Grown) -> str:
    how = f" ({entry.asked})" if entry.asked else ""
    return f"{entry.start}{how}" if entry.start else "none"


def _helped_row(task: str, group: str, steps: Mapping[str, int], names: Sequence[str]) -> HelpedRow:
    total = sum(steps.values())
    cells: list[MatrixCell | None] = []
    for name in names:
        if name not in steps or not total:
            cells.append(None)
            continue
        share = steps[name] / total
        title = f"{task}, {group}: {name} in {form.count(steps[name])} of {form.plural(total, 'step')}"
        cells.append(MatrixCell(form.percent(share, 0), heat_level(share), "kept", title))
    return HelpedRow(group, form.count(total), cells)


def _similar(value: float | None, one: str, other: str, same: bool, least: float, most: float) -> MatrixCell | None:
    if value is None:
        return None
    level = heat_level((value - least) / (most - least) if most > least else 0.5)
    title = one if same else f"{one} and {other}: {value:.3f}"
    return MatrixCell(f"{value:.2f}", level, "ahead" if same else "kept", title)


def _numbers(results: Mapping[str, Any]) -> dict[str, int]:
    """The place of each task in the stream, from 1, by its name."""
    return {task["name"]: i + 1 for i, task in enumerate(results["tasks"])}


def _headings(names: Sequence[str], numbers: Mapping[str, int]) -> list[str]:
    """Of columns: the names, or where there are many the tasks' numbers."""
    return [str(numbers.get(name, name)) for name in names] if _style(len(names)) == "dense" else list(names)


def _style(columns: int) -> str:
    return "large" if columns <= LARGE else "dense" if columns > ROOMY else ""


# -- from what was told to what is shown ---------------------------------------------------------------


def _grown(number: int, task: str, facts: Mapping[str, Any]) -> Grown:
    by_id = {key: str(name) for key, name in _mapping(facts.get("names")).items()}
    ids = sorted(by_id, key=lambda key: (len(key), key))  # of decimal numbers: their order
    names = [by_id[key] for key in ids]
    groups = [str(group) for group in _list(facts.get("groups"))]
    adapters = [
        Adapter(_texts(entry.get("tasks")), _whole(entry.get("bytes")))
        for entry in map(_mapping, _list(facts.get("adapters")))
        if entry
    ]
    shared = [adapter.tasks for adapter in adapters if len(adapter.tasks) > 1]
    table = [_list(row) for row in _list(facts.get("distances"))]
    here = range(len(names))
    helped = [
        (str(entry.get("group", WHOLE)), {name: _whole(n) or 0 for name, n in _mapping(entry.get("steps")).items()})
        for entry in map(_mapping, _list(facts.get("helped")))
        if entry
    ]
    root = _node(facts.get("nodes"), by_id, groups)
    return Grown(
        number,
        task,
        names,
        None if root is None else _folded(root, shared, set(root.tasks)),
        [[_number(table[i][j]) if i < len(table) and j < len(table[i]) else None for j in here] for i in here],
        _text(facts.get("start")),
        _text(facts.get("asked")),
        helped,
        adapters,
        [tasks for entry in _list(facts.get("merged")) if (tasks := _texts(entry))],
        _whole(facts.get("signature_bytes")),
    )


def _node(told: object, names: Mapping[str, str], groups: Sequence[str], depth: int = 0) -> Node | None:
    """A node and what is below it; None where nothing can be made of it."""
    found = _mapping(told)
    below = (
        [_node(child, names, groups, depth + 1) for child in _list(found.get("children"))] if depth < DEEPEST else []
    )
    children = tuple(child for child in below if child is not None)
    tasks = [names.get(str(task), f"task {task}") for task in _list(found.get("tasks")) if isinstance(task, int | str)]
    tasks = tasks or [name for child in children for name in child.tasks]
    if not tasks:
        return None
    split = ""
    if children:
        group = _whole(found.get("group"))
        split = WHOLE if group is None else groups[group] if group < len(groups) else f"group {group + 1}"
    return Node(tasks, split, _number(found.get("radius")), _number(found.get("spread")), children)


def _folded(node: Node, shared: Sequence[Sequence[str]], there: Set[str]) -> Node:
    """The node with tasks of one adapter as one leaf, where nothing else is among them; `there` are all tasks."""
    adapter = next((tasks for tasks in shared if set(node.tasks) <= set(tasks)), None)
    if adapter is None:
        children = tuple(_folded(child, shared, there) for child in node.children)
        return Node(node.tasks, node.split, node.radius, node.spread, children)
    elsewhere = tuple(task for task in adapter if task in there and task not in node.tasks)
    tasks = [*node.tasks, *(task for task in adapter if task not in there)]
    return Node(tasks, "", node.radius, node.spread, shared=elsewhere, merged=len(tasks) > 1)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: object) -> list[str]:
    return [str(entry) for entry in _list(value)]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -1e15 < value < 1e15 else None


def _whole(value: object) -> int | None:
    """A count; what is below nothing is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18 else None
