"""A tree of tasks, ordered by the distances of their signatures.

The tree is that of TreeLoRA (Qian et al. 2025, arXiv:2506.10355), but every node is split into halves, so that every
search goes through about `log2 N` levels. `SimilarityTree.nearest` is given a signature and finds the nearest task
exactly; `confidence_search.py` searches with one noisy distance in each step.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from perpetune.errors import StateError, UsageError
from perpetune.numerics.halving import Bools, Floats, Rows, Sets, at_once, distances, halved, means
from perpetune.numerics.signature import distance

ROUNDING = 1e-5  # a bound computed from three distances may be wrong by this
SMALL = 64  # the distances in sets of up to so many tasks are looked up for many sets at once


class Nearest(NamedTuple):
    """The result of `SimilarityTree.nearest`."""

    id: int
    distance: float
    evaluated: int
    """The number of tasks whose distance was computed."""


@dataclass(eq=False, slots=True)
class Node:
    """A node of the tree: some tasks that are near each other."""

    tasks: tuple[int, ...]
    """Their ids, ascending."""
    depth: int
    """0 for the root."""
    mean: Tensor
    """The mean of their points, `(L, k)` float32."""
    radius: float
    """The largest distance of a task to `mean`."""
    spread: float
    """The largest distance of two tasks, at most twice `radius`. It is the `δ` of the search: by the triangle
    inequality, a task's distance to any query differs by at most `spread` from any weighted mean of all tasks'
    distances."""
    group: int | None = None
    """The group of modules by which the node was split; None for all modules, and for a leaf."""
    cut: float = 0.0
    """The threshold between the children. A query goes to the second child if its distance to the first child's mean
    minus its distance to the second child's mean, over the group, is larger than this. It need not be 0, because equal
    halves cannot always be divided between clusters."""
    children: tuple[Node, ...] = ()
    """Two nodes, the one with the smallest id first; empty for a leaf."""


class SimilarityTree:
    """Tasks, each a point `(L, k)` of normalised rows, in a tree that divides them into halves at every level.

    Nodes at depth `d` are split by module group `d` alone: shallow layers decide near the root and deep ones at the
    leaves, as in the paper. Beyond the last group, and if all tasks of a node are equal in the group, all modules
    count. How tasks are split (`halving.halved`) does not divide a cluster if that can be avoided. Ids matter only in
    exact ties.

    A node is split into halves. As tasks come and go, its children may differ by a sixteenth of its tasks. If they
    would differ by more (`uneven`), the node is built again. So a large part of the tree is seldom built again, and the
    depth is at most `min(max_depth, ⌈log2 N⌉ + 1)` for up to 20,000 tasks. Ids are names; they never change and are not
    used again.

    Args:
        groups: indices of modules in groups, shallow ones first; None for one group of all modules.
        max_depth: the depth at which nodes are not split any more and may hold several tasks.

    Raises:
        UsageError: a group is empty, or the depth is below 0.
    """

    def __init__(self, groups: Sequence[Sequence[int]] | None = None, max_depth: int = 64):
        self.groups = [[int(module) for module in group] for group in groups or ()]
        if not all(self.groups):
            raise UsageError("a group of modules is empty; each level of the tree needs at least one module")
        if max_depth < 0:
            raise UsageError(f"the largest depth is {max_depth}; a number ≥ 0 is expected")
        self.max_depth = max_depth
        self.root: Node | None = None
        """The root; None if there is no task."""
        self._points: dict[int, Tensor] = {}  # ascending ids
        self._ids = np.zeros(0, dtype=np.int64)  # the same ids, with room for more, as in the two tables
        self._table = torch.zeros(0, 0, 0)  # the points once more, in the order of the ids
        self._far = torch.zeros(0, 0)  # the distances of all pairs
        self._free = 0

    @classmethod
    def build(
        cls, points: Tensor, groups: Sequence[Sequence[int]] | None = None, max_depth: int = 64
    ) -> SimilarityTree:
        """Build the tree of `points (N, L, k)` with ids 0 to N − 1 at once."""
        tree = cls(groups, max_depth)
        for task, point in enumerate(points):
            tree._enter(task, tree._checked(point))
        tree._free = len(points)
        if tree._points:
            tree.root = tree._built(tree.ids, 0)
        return tree

    def __len__(self) -> int:
        return len(self._points)

    def __contains__(self, task: object) -> bool:
        return task in self._points

    @property
    def ids(self) -> tuple[int, ...]:
        """All tasks, ascending."""
        return tuple(self._points)

    @property
    def following(self) -> int:
        """The id that the next task gets."""
        return self._free

    @property
    def distances(self) -> Tensor:
        """The distances of all pairs of tasks over all modules, `(N, N)` float32, in the order of `ids`."""
        return self._far[: len(self), : len(self)]

    @property
    def depth(self) -> int:
        """The depth of the deepest leaf; 0 for an empty tree."""
        return max((node.depth for node in self), default=0)

    def __iter__(self) -> Iterator[Node]:
        """All nodes, parents before children."""
        waiting = [self.root] if self.root is not None else []
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))

    def point(self, task: int) -> Tensor:
        """The point `(L, k)` of a task.

        Raises:
            UsageError: there is no such task.
        """
        if task not in self._points:
            raise UsageError(f"the tree has no task {task}; it has {list(self._points)}")
        return self._points[task]

    def insert(self, point: Tensor) -> int:
        """Add a task and return its id, which is one more than the largest id that was ever used.

        The task goes to the nearer child at every level. Means, radii and spreads change on its path only. The highest
        node on the path whose children would be uneven is built again.

        Raises:
            UsageError: the point is not a finite `(L, k)` of normalised rows, or has another shape than the tree's.
        """
        point = self._checked(point)
        task, self._free = self._free, self._free + 1
        self._place(task, point)
        return task

    def far(self, query: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """The distances from `query (L, k)` to tasks, by default to all in the order of `ids`, float32."""
        return self._distances(tasks, query)

    def between(self, task: int, others: Sequence[int]) -> Tensor:
        """The distances of a task from others, as they stand in `distances`."""
        return self._among((task,), others)[0]

    def remove(self, task: int) -> None:
        """Take a task out.

        Raises:
            UsageError: there is no such task.
        """
        self.point(task)
        place = int(self._rows((task,))[0])
        self._tables(np.delete(np.arange(len(self)), place))
        del self._points[task]
        self.root = self._without(self.root, task) if self.root is not None else None

    def replace(self, task: int, point: Tensor) -> None:
        """Move a task to another point.

        Raises:
            UsageError: there is no such task, or `insert` would refuse the point.
        """
        self.point(task)
        point = self._checked(point)
        self.remove(task)
        self._place(task, point)

    def nearest(self, query: Tensor, exclude: Collection[int] = ()) -> Nearest:
        """The task nearest to `query (L, k)`, found exactly; of several equally near ones the smallest id.

        The search visits the most promising nodes first. It skips a node if `distance(query, mean) − radius` shows that
        no task in it can be near enough.

        Args:
            query: normalised rows.
            exclude: ids that are skipped.

        Raises:
            UsageError: no task is left, or `insert` would refuse the query.
        """
        if self.root is None or all(task in exclude for task in self._points):
            raise UsageError(f"there is no nearest task: the tree has {len(self)} tasks, and all of them are excluded")
        query = self._checked(query)
        nearest, best, evaluated = -1, math.inf, 0
        order = itertools.count()
        waiting = [(0.0, next(order), self.root)]
        while waiting and waiting[0][0] <= best + ROUNDING:
            bound, _, node = heapq.heappop(waiting)
            for child in node.children:
                if len(child.tasks) > 1:
                    below = max(bound, float(distance(query, child.mean)) - child.radius)
                    heapq.heappush(waiting, (below, next(order), child))
                else:
                    heapq.heappush(waiting, (bound, next(order), child))
            if not node.children:
                tasks = [task for task in node.tasks if task not in exclude]
                evaluated += len(tasks)
                for task, far in zip(tasks, self.far(query, tasks).tolist(), strict=True):
                    if (far, task) < (best, nearest):
                        nearest, best = task, far
        return Nearest(nearest, best, evaluated)

    def descend(self, query: Tensor) -> int:
        """The task at the end of a walk from the root that goes to the nearer child at each level, by that level's
        group.

        Raises:
            UsageError: the tree is empty, or `insert` would refuse the query.
        """
        if self.root is None:
            raise UsageError("an empty tree has no path to descend")
        query, node = self._checked(query), self.root
        while node.children:
            node = node.children[self._next(node, query)]
        return min(zip(self.far(query, node.tasks).tolist(), node.tasks, strict=True))[1]

    def path(self, task: int) -> list[Node]:
        """The nodes that contain a task, from the root to its leaf.

        Raises:
            UsageError: there is no such task.
        """
        self.point(task)
        assert self.root is not None
        path = [self.root]
        while children := path[-1].children:
            path.append(next(child for child in children if _holds(child, task)))
        return path

    def nodes(self) -> dict[str, Any] | None:
        """The tree for a drawing, as nested JSON-able `{tasks, depth, group, cut, radius, spread, children: [...]}`."""
        return _described(self.root) if self.root is not None else None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The whole state: the tensors `points (N, L, k)` and `distances (N, N)`, those of `shape`, and the rest as
        JSON-able values."""
        points = torch.stack(list(self._points.values())) if self._points else torch.zeros(0, 0, 0)
        return {"points": points, "distances": self.distances.clone(), **self.shape()}, self.rest()

    def rest(self) -> dict[str, Any]:
        """What of the state is no tensor."""
        return {
            "groups": self.groups,
            "max_depth": self.max_depth,
            "next": self._free,
            "ids": list(self._points),
        }

    def shape(self) -> dict[str, Tensor]:
        """The shape of the tree and the figures of its nodes, in a form that is small.

        `order` has the tasks from left to right. The other three have a row for each node with several tasks, parents
        before children: `splits` the number of tasks of its first child (0 without children) and its group (−1 for all
        modules), `cuts` and `widths` (radius, spread) its figures.
        """
        order: list[int] = []
        splits, cuts, widths = list[tuple[int, int]](), list[float](), list[tuple[float, float]]()
        waiting = [self.root] if self.root is not None else []
        while waiting:
            node = waiting.pop()
            if len(node.tasks) > 1:
                first = len(node.children[0].tasks) if node.children else 0
                splits.append((first, -1 if node.group is None else node.group))
                cuts.append(node.cut)
                widths.append((node.radius, node.spread))
            if node.children:
                waiting += reversed(node.children)
            else:
                order += node.tasks
        return {
            "order": torch.tensor(order, dtype=torch.int32),
            "splits": torch.tensor(splits, dtype=torch.int32).view(-1, 2),
            "cuts": torch.tensor(cuts, dtype=torch.float64),
            "widths": torch.tensor(widths).view(-1, 2),
        }

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> SimilarityTree:
        """Restore a tree from its `state()`, with the same bits; nothing is split or measured again.

        In states of earlier versions `root` in `rest` has the nodes as `nodes()` gives them, in place of `shape()`.

        Raises:
            StateError: the tensors and the rest do not describe the same tasks.
        """
        ids, points, far = rest["ids"], tensors["points"], tensors["distances"]
        old: dict[str, Any] | None = rest.get("root")
        tasks = sorted(tensors["order"].tolist()) if "root" not in rest else old["tasks"] if old is not None else []
        if len(points) != len(ids) or far.shape != (len(ids), len(ids)) or tasks != ids:
            raise StateError(
                f"a stored similarity tree names {len(ids)} tasks, has {len(tasks)} in its root, {len(points)} points "
                f"and distances {tuple(far.shape)}; they do not belong together"
            )
        tree = cls(rest["groups"], rest["max_depth"])
        tree._free = rest["next"]
        tree._points = {task: point.clone() for task, point in zip(ids, points, strict=True)}
        tree._ids, tree._table, tree._far = np.array(ids, dtype=np.int64), points.clone(), far.clone()
        if ids:
            tree.root = tree._restored(old) if old is not None else tree._shaped(tensors)
        return tree

    def _checked(self, point: Tensor) -> Tensor:
        """The point in the form in which it is stored, float32 on the CPU.

        Raises:
            UsageError: the point has another shape than the others, or its rows are not finite and normalised.
        """
        kept = point.detach().to("cpu", torch.float32)
        for shape in {p.shape for p in itertools.islice(self._points.values(), 1)}:
            if kept.shape != shape:
                raise UsageError(f"the tree's signatures are {tuple(shape)}, got one of {tuple(kept.shape)}")
        modules = 1 + max((module for group in self.groups for module in group), default=0)
        if kept.dim() != 2 or len(kept) < modules:
            raise UsageError(f"a signature has a row for each of at least {modules} modules, got {tuple(kept.shape)}")
        if not bool(kept.abs().sum(-1).le(1 + ROUNDING).all()):  # False for NaN
            raise UsageError("the rows of a signature have to be finite and divided by their L1 norm; use `normalised`")
        return kept

    def _place(self, task: int, point: Tensor) -> None:
        """Store a point and put its task into the tree. The point may be a new one for an old task."""
        self._enter(task, point)
        self.root = self._with(self.root, task) if self.root is not None else self._built((task,), 0)

    def _enter(self, task: int, point: Tensor) -> None:
        """Write a point and its distances into the tables. There is room for more than are there, so that a new point
        does not copy the tables each time."""
        far, last = self._distances(None, point), len(self)
        if last == len(self._ids):
            room = last + last // 4 + 16
            ids, table, pairs = self._ids, self._table, self._far
            self._ids, self._far = np.zeros(room, dtype=np.int64), torch.zeros(room, room)
            self._table = torch.zeros(room, *point.shape)
            if last:
                self._ids[:last], self._table[:last], self._far[:last, :last] = ids, table, pairs
        self._ids[last], self._table[last] = task, point
        self._far[last, :last] = self._far[:last, last] = far
        self._far[last, last] = 0
        self._points[task] = point.clone()
        if last and self._ids[last - 1] > task:
            self._tables(np.argsort(self._ids[: last + 1]))
            self._points = dict(sorted(self._points.items()))

    def _tables(self, rows: Rows) -> None:
        """Let the tables have some of their rows, in this order."""
        which = torch.from_numpy(rows)
        self._ids, self._table = self._ids[rows], self._table[which]
        self._far = self._far[which][:, which]

    def _with(self, node: Node, task: int) -> Node:
        """The node with one more task."""
        tasks = tuple(sorted((*node.tasks, task)))
        if not node.children:
            return self._built(tasks, node.depth)
        side = self._next(node, self._points[task])
        sizes = [len(child.tasks) + (i == side) for i, child in enumerate(node.children)]
        if uneven(*sizes):
            return self._built(tasks, node.depth)
        children = [self._with(child, task) if i == side else child for i, child in enumerate(node.children)]
        spread = max(node.spread, float(self._among((task,), node.tasks).max()))
        return self._joined(node.depth, node.group, children, spread)

    def _without(self, node: Node, task: int) -> Node | None:
        """The node without a task; None if no task is left."""
        tasks = tuple(other for other in node.tasks if other != task)
        if not tasks:
            return None
        sizes = [len(child.tasks) - (task in child.tasks) for child in node.children]
        if not sizes or 0 in sizes or uneven(*sizes):
            return self._built(tasks, node.depth)
        children = [self._without(child, task) if task in child.tasks else child for child in node.children]
        return self._joined(node.depth, node.group, [child for child in children if child is not None])

    def _built(self, tasks: tuple[int, ...], depth: int) -> Node:
        """Build a node from its tasks alone, with all below it, level by level."""
        root = Node(tasks, depth, _NOWHERE, 0.0, 0.0)
        levels = [[root]]
        while levels[-1]:
            wide = [node for node in levels[-1] if len(node.tasks) > 1 and node.depth < self.max_depth]
            levels.append(self._split(wide) if wide else [])
        for level in reversed(levels[:-1]):
            for node in level:
                if not node.children:
                    node.mean = self._points[node.tasks[0]] if len(node.tasks) == 1 else self._mean(node.tasks)
            if inner := [node for node in level if node.children]:
                halves = [torch.stack([node.children[i].mean for node in inner]) for i in (0, 1)]
                counts = [torch.tensor([len(node.children[i].tasks) for node in inner])[:, None, None] for i in (0, 1)]
                for node, mean in zip(inner, _mean_of(halves, counts), strict=True):
                    node.mean = mean.clone()  # a view would hold those of the whole level
            if several := [node for node in level if len(node.tasks) > 1]:
                self._measure(several)
        return root

    def _split(self, nodes: Sequence[Node]) -> list[Node]:
        """Split nodes of one depth, and give them their children; returns these. They have no means yet."""
        depth, waiting = nodes[0].depth, list(nodes)
        if depth >= len(self.groups):  # two tasks are two halves, whatever their points are
            waiting = [node for node in nodes if len(node.tasks) > 2]
        for group in (depth, None) if depth < len(self.groups) else (None,):
            if not waiting:
                break
            sets = self._sets(waiting)
            far = partial(self._from_one, sets) if group is None else None
            left, apart = halved(sets.points(self._points_of(group)), sets.there, far)
            for node, inside, good in zip(waiting, left.tolist(), apart.tolist(), strict=True):
                if good:
                    node.group = group
                    _divide(
                        node,
                        [
                            [t for t, side in zip(node.tasks, inside, strict=False) if side == half]
                            for half in (True, False)
                        ],
                    )
            waiting = [node for node in waiting if not node.children]
        for node in nodes:
            if not node.children:  # or all points are equal
                middle = (len(node.tasks) + 1) // 2
                _divide(node, [node.tasks[:middle], node.tasks[middle:]])
        return [child for node in nodes for child in node.children]

    def _joined(self, depth: int, group: int | None, children: Sequence[Node], spread: float | None = None) -> Node:
        """A node with two children. `spread` is that of all its tasks, if it is known."""
        first, second = sorted(children, key=lambda child: child.tasks[0])
        counts = len(first.tasks), len(second.tasks)
        mean = _mean_of((first.mean, second.mean), counts)
        tasks = tuple(sorted(first.tasks + second.tasks))
        node = Node(tasks, depth, mean, 0.0, 0.0, group, children=(first, second))
        self._measure([node], spread)
        return node

    def _measure(self, nodes: Sequence[Node], spread: float | None = None) -> None:
        """Set the radius, the spread and the cut of nodes of one depth, each of which has several tasks."""
        sets = self._sets(nodes)
        points = sets.points(self._points_of(None))
        radii = distances(points, torch.stack([node.mean for node in nodes])).max(1).tolist()
        spreads = self._spreads(sets) if spread is None else [spread]
        for node, radius, wide in zip(nodes, radii, spreads, strict=True):
            node.radius, node.spread = radius, wide
        # Two tasks by themselves lie at the same distance on both sides of 0
        cut = [bool(node.children) and (len(node.tasks) > 2 or node.group is not None) for node in nodes]
        for group in {node.group for node in itertools.compress(nodes, cut)}:
            which = np.array([one and node.group == group for node, one in zip(nodes, cut, strict=True)])
            split, some = [node for node, one in zip(nodes, which.tolist(), strict=True) if one], points
            if not which.all():
                some = points[torch.from_numpy(which)]
            self._set_cuts(split, group, some[:, :, self._modules(group)], sets.there[which])

    def _set_cuts(self, nodes: Sequence[Node], group: int | None, points: Tensor, there: Bools) -> None:
        """Set the cuts of nodes that were split by a group: the middle between the sides of both children's tasks. The
        side of a task is its distance to the first child's mean minus its distance to the second's."""
        modules = self._modules(group)
        to = [distances(points, torch.stack([node.children[i].mean[modules] for node in nodes])) for i in (0, 1)]
        side, first = to[0].astype(np.float64) - to[1], np.zeros_like(there)
        for number, node in enumerate(nodes):
            first[number, np.searchsorted(node.tasks, node.children[0].tasks)] = True
        highest = np.where(first, side, -np.inf).max(1)
        lowest = np.where(there & ~first, side, np.inf).min(1)
        for node, cut in zip(nodes, ((highest + lowest) / 2).tolist(), strict=True):
            node.cut = cut

    def _from_one(self, sets: Sets, places: Rows) -> Floats:
        """For each set the distances from the task at one place to all, as they stand in the table."""
        one = torch.from_numpy(np.take_along_axis(sets.rows, places[:, None], 1))
        return self._far[one, torch.from_numpy(sets.rows)].numpy()

    def _spreads(self, sets: Sets) -> list[float]:
        """The largest distance of two tasks in each of some sets of rows."""
        if len(sets.rows) == 1 and sets.rows.size == len(self):
            return [float(self.distances.max())]
        rows = torch.from_numpy(sets.rows)
        if rows.shape[1] > SMALL:
            return [float(self._far[some][:, some].max()) for some in rows]
        found: list[float] = self._far[rows[:, :, None], rows[:, None, :]].amax((1, 2)).tolist()
        return found

    def _next(self, node: Node, query: Tensor) -> int:
        """The index of the child on whose side of the cut a query is; exactly on the cut, the smaller child."""
        rows = self._modules(node.group)
        first, second = (float(distance(query[rows], child.mean[rows])) for child in node.children)
        sizes = [len(child.tasks) for child in node.children]
        side = first - second - node.cut
        return int(side > 0 or (side == 0 and sizes[1] < sizes[0]))

    def _modules(self, group: int | None) -> slice | list[int]:
        """An index of the group's modules; a slice if they follow each other, so that indexing makes no copy."""
        if group is None:
            return slice(None)
        modules = self.groups[group]
        whole = modules == list(range(modules[0], modules[-1] + 1))
        return slice(modules[0], modules[-1] + 1) if whole else modules

    def _rows(self, tasks: Sequence[int]) -> Rows:
        """Where tasks stand in the tables."""
        wanted = np.fromiter(tasks, dtype=np.int64, count=len(tasks))
        found: Rows = np.searchsorted(self._ids[: len(self)], wanted)
        return found

    def _sets(self, nodes: Sequence[Node]) -> Sets:
        rows = self._rows(list(itertools.chain.from_iterable(node.tasks for node in nodes)))
        return Sets(rows, [len(node.tasks) for node in nodes])

    def _points_of(self, group: int | None) -> Tensor:
        """All points, `(N, L, k)` with a group's modules."""
        return self._table[: len(self), self._modules(group)]

    def _among(self, tasks: Sequence[int], others: Sequence[int]) -> Tensor:
        """The distances of tasks from others, as they stand in the table."""
        rows, columns = torch.from_numpy(self._rows(tasks)), torch.from_numpy(self._rows(others))
        return self._far[rows[:, None], columns]

    def _distances(self, tasks: Sequence[int] | None, query: Tensor) -> Tensor:
        """The distances from `query (L, k)` to each task; None stands for all."""
        points = self._points_of(None)
        if tasks is not None:
            points = points[torch.from_numpy(self._rows(tasks))]
        rows = at_once(points)
        return torch.cat([distance(points[i : i + rows], query) for i in range(0, len(points), rows)] or [_NONE])

    def _mean(self, tasks: Sequence[int]) -> Tensor:
        """The mean point of the tasks, `(L, k)`, float32. Their order matters only by rounding."""
        points = self._points_of(None)[torch.from_numpy(self._rows(tasks))]
        return means(points[None], np.ones((1, 1, len(tasks)), dtype=bool))[0, 0]

    def _shaped(self, tensors: dict[str, Tensor]) -> Node:
        """The root, from the tensors of `shape()`.

        Raises:
            StateError: they do not describe a tree.
        """
        order = tensors["order"].tolist()
        entries = zip(*(tensors[name].tolist() for name in ("splits", "cuts", "widths")), strict=True)

        def node(start: int, end: int, depth: int) -> Node:
            tasks = tuple(sorted(order[start:end]))
            if len(tasks) == 1:
                return Node(tasks, depth, self._points[tasks[0]], 0.0, 0.0)
            (first, group), cut, (radius, spread) = next(entries)
            if not 0 <= first < len(tasks):
                raise ValueError(f"{first} of {len(tasks)} tasks")
            if not first:
                return Node(tasks, depth, self._mean(tasks), radius, spread, cut=cut)
            children = node(start, start + first, depth + 1), node(start + first, end, depth + 1)
            found = group if group >= 0 else None
            mean = _mean_of([child.mean for child in children], [len(child.tasks) for child in children])
            return Node(tasks, depth, mean, radius, spread, found, cut, children)

        try:
            root, left = node(0, len(order), 0), sum(1 for _ in entries)
        except (StopIteration, ValueError) as error:
            raise StateError(f"a stored similarity tree has nodes that make no tree: {error!r}") from None
        if left:
            raise StateError(f"a stored similarity tree has {left} nodes that belong nowhere")
        return root

    def _restored(self, stored: dict[str, Any]) -> Node:
        """A node as `nodes()` gives it."""
        tasks, depth, group = tuple(stored["tasks"]), stored["depth"], stored["group"]
        children = tuple(self._restored(child) for child in stored["children"])
        if children:
            mean = _mean_of([child.mean for child in children], [len(child.tasks) for child in children])
        else:
            mean = self._points[tasks[0]] if len(tasks) == 1 else self._mean(tasks)
        return Node(tasks, depth, mean, stored["radius"], stored["spread"], group, stored["cut"], children)


def uneven(first: int, second: int) -> bool:
    """Whether children of these numbers of tasks differ by more than one task and a sixteenth of all.

    If not a single task more were allowed, a node would be built again after a few insertions, however large it is.
    """
    return abs(first - second) > 1 + (first + second) // 16


_NONE = torch.zeros(0)
_NOWHERE = torch.zeros(0, 0)


def _holds(node: Node, task: int) -> bool:
    place = bisect_left(node.tasks, task)
    return place < len(node.tasks) and node.tasks[place] == task


def _divide(node: Node, halves: Sequence[Sequence[int]]) -> None:
    """Give a node its children, the one with the smallest id first. They have no means yet."""
    first, second = (Node(half, node.depth + 1, _NOWHERE, 0.0, 0.0) for half in sorted(map(tuple, halves)))
    node.children = first, second


def _mean_of(means: Sequence[Tensor], counts: Sequence[int] | Sequence[Tensor]) -> Tensor:
    """The mean of two nodes' tasks, computed from theirs, so the cost does not depend on the number of tasks; or of
    many pairs of nodes."""
    (first, second), (one, other) = means, counts
    return (first * one + second * other) / (one + other)


def _described(node: Node) -> dict[str, Any]:
    return {
        "tasks": list(node.tasks),
        "depth": node.depth,
        "group": node.group,
        "cut": node.cut,
        "radius": node.radius,
        "spread": node.spread,
        "children": [_described(child) for child in node.children],
    }
