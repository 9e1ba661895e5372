"""The section about TreeLoRA's tree of similar tasks: the tree after each task, which tasks helped, what is stored.

The facts come from states of any age: what is missing or of another form than expected is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from perpetune.report import form
from perpetune.report.blocks import (
    Block,
    Brief,
    Cell,
    Column,
    Columns,
    Fold,
    Gallery,
    Heading,
    Heat,
    HeatCell,
    HeatRow,
    Only,
    Panel,
    Rows,
    Table,
    Text,
    Tree,
)
from perpetune.report.palette import heat_level
from perpetune.report.results_schema import (
    Results,
    as_count,
    as_list,
    as_mapping,
    as_number,
    as_text,
    as_texts,
    facts_of,
)
from perpetune.report.sections import reads
from perpetune.report.svg import Branch

KIND = "similarity tree"  # the kind of these facts
DEEPEST = 64  # the section reads so many levels of a tree, and shows everything below as one leaf
MEANING = (
    "Tasks that change the adapters in the same direction are near each other. A distance is that of two tasks’ "
    "signatures, from 0 (equal) to 1. Each level of the tree splits by one group of modules, shallow groups first. A "
    "node’s radius is the largest distance of its tasks to their mean."
)
HELPED = (
    "While a task is learned (rows), each group of modules selects an earlier task (columns) in each step, and that "
    "task influences the step. A cell is the share of the task’s steps, in %, in which the earlier task was selected."
)
SIMILAR = "1 minus the distance of two tasks’ signatures, after the last task."
STORED = (
    "The adapters that are kept after each task. For every task the tree also stores its signature. A merged adapter "
    "is used for several tasks."
)
WHOLE = "all modules"  # the name of the split, if no group of modules splits a node


@dataclass(frozen=True)
class Node:
    """Some tasks of the tree, by name.

    `split` is the group of modules that separates its children; it is empty for a leaf. `merged` says that the tasks of
    a leaf share one adapter; `shared` are other tasks with this adapter, elsewhere in the tree.
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
        """`amazon`; `amazon + yelp` if they share one adapter; `amazon, yelp` if the tree does not separate them."""
        name = (" + " if self.merged else ", ").join(self.tasks)
        return f"{name} · shares with {', '.join(self.shared)}" if self.shared else name


@dataclass(frozen=True)
class Adapter:
    """One kept adapter: its tasks and its size in bytes."""

    tasks: list[str]
    size: int | None


@dataclass(frozen=True)
class Grown:
    """The facts about the tree after one task.

    Attributes:
        number, task: the task's number, from 1, and its name.
        tasks: the number of tasks in the tree. If it is larger than the tree's names, the tree is too large to show.
        names: the tasks in the tree, in the order of their ids.
        root: the root of the tree; None while the tree is empty.
        distances: the known distances between pairs of `names`.
        start: the task from whose adapter this task started; empty if there is none.
        asked: how the start was chosen; empty if not known.
        helped: for each group of modules, how often each earlier task was selected.
        adapters: the adapters kept after this task.
        kept: their number, and their size in bytes.
        merged: for each merge after this task, the names of its tasks.
        signature: the size of a task's signature in bytes.
    """

    number: int
    task: str
    tasks: int
    names: list[str]
    root: Node | None
    distances: list[list[float | None]]
    start: str
    asked: str
    helped: list[tuple[str, dict[str, int]]]
    adapters: list[Adapter]
    kept: tuple[int, int | None]
    merged: list[list[str]]
    signature: int | None

    @property
    def signature_bytes(self) -> int:
        """The bytes of the signatures of all tasks in the tree."""
        return (self.signature or 0) * self.tasks

    @property
    def all_bytes(self) -> int:
        return (self.kept[1] or 0) + self.signature_bytes

    @property
    def levels(self) -> int:
        """The number of splits on the longest way from the root to a leaf."""
        return max((level for level, _ in walk(self.root)), default=0)


@dataclass(frozen=True)
class StorageRow:
    """The stored bytes after one task, as text; `share` is relative to the largest amount after any task."""

    number: int
    task: str
    start: str
    adapters: str
    size: str
    merged: str
    signature: str
    total: str
    share: float


@reads(KIND)
def section(results: Results) -> list[Block] | None:
    trees = grown(results)
    if not trees:
        return None
    text = told(results)
    helped, similar = helped_table(results), similarity_table(results)
    blocks: list[Block] = [
        Heading("Similar tasks"),
        Text(f"After the last task: {text}. {MEANING}"),
        _last(trees[-1]),
        *_before(trees),
    ]
    if helped is not None:
        blocks.append(Panel([helped], "Who helped whom, by layer", HELPED))
    if similar is not None:
        blocks.append(Panel([similar], "Similarity", SIMILAR))
    return [*blocks, Panel([_storage(results)], "Adapters kept", STORED), Brief("tree", text)]


def _last(entry: Grown) -> Panel:
    """The tree after the last task."""
    title, branch = f"Tree after task {entry.number} {entry.task}", _branch(entry.root, entry.task)
    if entry.tasks > len(entry.names):
        return Panel([Text(f"The tree has {form.plural(entry.tasks, 'task')}, too many to show.")], title)
    if branch is None:
        return Panel([Text("The tree is empty.")], title)
    about = "A node: what splits it, and its radius; a square leaf: several tasks that have one adapter."
    columns: Columns = [Column("tasks", left=True), "level", Column("split by", left=True), "radius", "spread"]
    rows: Rows = [
        [
            Cell(node.name, indent=level),
            level + 1,
            node.split,
            form.thousandths(node.radius),
            form.thousandths(node.spread),
        ]
        for level, node in walk(entry.root)
    ]
    table = Fold("The tree as a table", [Table(columns, rows, wrap=True)])
    label = f"The tree after task {entry.number} {entry.task}: {outline(entry.root)}"
    return Panel([Only("page", [Text(about)]), Tree(branch, label), Only("page", [table])], title)


def _before(found: Sequence[Grown]) -> list[Block]:
    """The trees after the earlier tasks, as drawings and as text."""
    trees = []
    for entry in found[:-1]:
        branch = _branch(entry.root, entry.task)
        if branch is not None:
            label = f"The tree after task {entry.number} {entry.task}: {form.plural(len(entry.names), 'task')}"
            trees.append(Tree(branch, label, str(entry.number), entry.task))
    if not trees:
        return []
    columns: Columns = [Column("after", left=True), Column("tree, of tasks and (nodes)", left=True)]
    rows = [[f"{entry.number} {entry.task}", outline(entry.root)] for entry in found]
    about = Only("page", [Text("The task just learned is set off; hover a node for what splits it.")])
    texts = Fold("The trees as text", [Table(columns, rows, wrap=True)])
    return [Panel([about, Gallery(trees), texts], "Tree after each task before")]


def _storage(results: Results) -> Table:
    columns: Columns = [Column("after", left=True), Column("started from", left=True), "adapters", "bytes"]
    columns += [Column("merged", left=True), "a task’s signature", "all"]
    rows: Rows = [
        [
            f"{row.number} {row.task}",
            row.start,
            row.adapters,
            row.size,
            row.merged,
            row.signature,
            Cell(row.total, bar=row.share),
        ]
        for row in storage_rows(results)
    ]
    return Table(columns, rows, limit=30, noun="task", wrap=True)


def _branch(node: Node | None, newest: str) -> Branch | None:
    """The drawing of a node; the newest task's leaf is highlighted."""
    if node is None:
        return None
    about = described(node)
    title = f"{node.name}: {about}" if about else node.name
    radius = f"radius {form.thousandths(node.radius)}" if node.radius is not None else ""
    below = [branch for child in node.children if (branch := _branch(child, newest))]
    style = "newest" if newest in node.tasks and not below else ""
    return Branch(node.name, title, (node.split, radius), style, node.merged, below)


def grown(results: Mapping[str, Any]) -> list[Grown]:
    """The facts about the tree after each task, in the order of the tasks."""
    by_task = {task: facts for task, _, facts in facts_of(results, KIND)}
    return [_grown(i + 1, results["tasks"][i]["name"], facts) for i, facts in by_task.items()]


def walk(node: Node | None, level: int = 0) -> Iterator[tuple[int, Node]]:
    """The node and all nodes below it, from the top, each with its level (the node itself has 0)."""
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
    """`split by blocks 0-5, radius 0.310, spread 0.400`; for a leaf `one adapter` if it is merged, else nothing."""
    if not node.children:
        return "one adapter" if node.merged else ""
    parts = [f"split by {node.split}"]
    parts += [f"radius {form.thousandths(node.radius)}"] if node.radius is not None else []
    parts += [f"spread {form.thousandths(node.spread)}"] if node.spread is not None else []
    return ", ".join(parts)


def helped_table(results: Mapping[str, Any]) -> Heat | None:
    """The table of selected tasks; None if no task was selected."""
    found = [entry for entry in grown(results) if any(steps for _, steps in entry.helped)]
    if not found:
        return None
    order = _numbers(results)
    names = list(dict.fromkeys(name for entry in found for _, steps in entry.helped for name in steps))
    names.sort(key=lambda name: order.get(name, len(order) + 1))
    rows = [_helped_row(entry, group, steps, names) for entry in found for group, steps in entry.helped]
    return Heat(
        label="Who helped whom, by layer",
        corner="task",
        names=names,
        rows=rows,
        mean=Column("steps"),
        parts="modules",
        scale=("0 %", "100 %"),
        numbers=[str(order.get(name, name)) for name in names],
    )


def similarity_table(results: Mapping[str, Any]) -> Heat | None:
    """The table of similarities after the last task; None if none are known."""
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
        rows.append(HeatRow(str(order.get(name, "")), name, cells))
    return Heat(
        label="Similarity of tasks",
        corner="task",
        names=names,
        rows=rows,
        scale=(f"{least:.2f}, least alike", f"{most:.2f}, most alike") if pairs else None,
        numbers=[str(order.get(name, name)) for name in names],
    )


def storage_rows(results: Mapping[str, Any]) -> list[StorageRow]:
    found = grown(results)
    most = max((entry.all_bytes for entry in found), default=0)
    rows = []
    for entry in found:
        total = entry.all_bytes
        rows.append(
            StorageRow(
                entry.number,
                entry.task,
                _started(entry),
                form.count(entry.kept[0]),
                form.size(entry.kept[1]),
                "; ".join(" + ".join(tasks) for tasks in entry.merged),
                form.size(entry.signature),
                form.size(total or None),
                total / most if most else 0.0,
            )
        )
    return rows


def told(results: Mapping[str, Any]) -> str:
    """The tree after the last task in a sentence; empty if there is no tree.

    `6 tasks, yelp started from amazon (nearest), helped most by amazon (62 % of steps), 5 adapters of 369 kB`
    """
    trees = grown(results)
    if not trees:
        return ""
    last = trees[-1]
    parts = [form.plural(last.tasks, "task")]
    parts += [f"{last.task} started from {_started(last)}"] if last.start else []
    sums: dict[str, int] = {}
    for _, steps in last.helped:
        for name, count in steps.items():
            sums[name] = sums.get(name, 0) + count
    if any(sums.values()):
        best = max(sums, key=lambda name: sums[name])
        parts.append(f"helped most by {best} ({form.percent(sums[best] / sum(sums.values()), 0)} % of steps)")
    if last.kept[0]:
        size = f" of {form.size(last.kept[1])}" if last.kept[1] else ""
        parts.append(form.plural(last.kept[0], "adapter") + size)
    return ", ".join(parts)


def _started(entry: Grown) -> str:
    how = f" ({entry.asked})" if entry.asked else ""
    return f"{entry.start}{how}" if entry.start else "none"


def _helped_row(entry: Grown, group: str, steps: Mapping[str, int], names: Sequence[str]) -> HeatRow:
    total = sum(steps.values())
    cells: list[HeatCell | None] = []
    for name in names:
        if name not in steps or not total:
            cells.append(None)
            continue
        share = steps[name] / total
        title = f"{entry.task}, {group}: {name} in {form.count(steps[name])} of {form.plural(total, 'step')}"
        cells.append(HeatCell(form.percent(share, 0), heat_level(share), title=title))
    return HeatRow(str(entry.number), entry.task, cells, form.count(total), part=group)


def _similar(value: float | None, one: str, other: str, same: bool, least: float, most: float) -> HeatCell | None:
    if value is None:
        return None
    level = heat_level((value - least) / (most - least) if most > least else 0.5)
    title = one if same else f"{one} and {other}: {value:.3f}"
    return HeatCell(f"{value:.2f}", level, "ahead" if same else "kept", title)


def _numbers(results: Mapping[str, Any]) -> dict[str, int]:
    """The number of each task in the stream, from 1, by its name."""
    return {task["name"]: i + 1 for i, task in enumerate(results["tasks"])}


# -- from the facts to what is shown ---------------------------------------------------------------------


def _grown(number: int, task: str, facts: Mapping[str, Any]) -> Grown:
    by_id = {key: str(name) for key, name in as_mapping(facts.get("names")).items()}
    ids = sorted(by_id, key=lambda key: (len(key), key))  # of decimal numbers: their order
    names = [by_id[key] for key in ids]
    groups = [str(group) for group in as_list(facts.get("groups"))]
    adapters = [
        Adapter(as_texts(entry.get("tasks")), as_count(entry.get("bytes")))
        for entry in map(as_mapping, as_list(facts.get("adapters")))
        if entry
    ]
    shared = [adapter.tasks for adapter in adapters if len(adapter.tasks) > 1]
    table = [as_list(row) for row in as_list(facts.get("distances"))]
    here = range(len(names))
    helped = [
        (str(entry.get("group", WHOLE)), {name: as_count(n) or 0 for name, n in as_mapping(entry.get("steps")).items()})
        for entry in map(as_mapping, as_list(facts.get("helped")))
        if entry
    ]
    root = _node(facts.get("nodes"), by_id, groups)
    sizes = [adapter.size for adapter in adapters if adapter.size is not None]
    kept = as_mapping(facts.get("kept"))
    count, size = as_count(kept.get("adapters")), as_count(kept.get("bytes"))
    return Grown(
        number,
        task,
        as_count(facts.get("tasks")) or len(names),
        names,
        None if root is None else _folded(root, shared, set(root.tasks)),
        [[as_number(table[i][j]) if i < len(table) and j < len(table[i]) else None for j in here] for i in here],
        as_text(facts.get("start")),
        as_text(facts.get("asked")),
        helped,
        adapters,
        (len(adapters) if count is None else count, (sum(sizes) if sizes else None) if size is None else size),
        [tasks for entry in as_list(facts.get("merged")) if (tasks := as_texts(entry))],
        as_count(facts.get("signature_bytes")),
    )


def _node(told: object, names: Mapping[str, str], groups: Sequence[str], depth: int = 0) -> Node | None:
    """A node with the nodes below it; None if the stored value is not a node."""
    found = as_mapping(told)
    below = (
        [_node(child, names, groups, depth + 1) for child in as_list(found.get("children"))] if depth < DEEPEST else []
    )
    children = tuple(child for child in below if child is not None)
    ids = [task for task in as_list(found.get("tasks")) if isinstance(task, int | str)]
    tasks = [names.get(str(task), f"task {task}") for task in ids]
    tasks = tasks or [name for child in children for name in child.tasks]
    if not tasks:
        return None
    split = ""
    if children:
        group = as_count(found.get("group"))
        split = WHOLE if group is None else groups[group] if group < len(groups) else f"group {group + 1}"
    return Node(tasks, split, as_number(found.get("radius")), as_number(found.get("spread")), children)


def _folded(node: Node, shared: Sequence[Sequence[str]], there: Set[str]) -> Node:
    """The node with tasks of one adapter as one leaf, where nothing else is among them; `there` are all tasks."""
    adapter = next((tasks for tasks in shared if set(node.tasks) <= set(tasks)), None)
    if adapter is None:
        children = tuple(_folded(child, shared, there) for child in node.children)
        return Node(node.tasks, node.split, node.radius, node.spread, children)
    elsewhere = tuple(task for task in adapter if task in there and task not in node.tasks)
    tasks = [*node.tasks, *(task for task in adapter if task not in there)]
    return Node(tasks, "", node.radius, node.spread, shared=elsewhere, merged=len(tasks) > 1)
