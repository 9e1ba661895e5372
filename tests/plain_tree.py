"""A similarity tree that goes node by node and task by task, beside which that of perpetune is tested.

It has the shape, the figures and the stored form that the trees of version 0.1 had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perpetune.numerics.halving import REFINEMENTS
from perpetune.numerics.signature import distance
from perpetune.numerics.similarity_tree import Node


class PlainTree:
    def __init__(self, groups: Sequence[Sequence[int]] | None = None, max_depth: int = 64):
        self.groups, self.max_depth = [list(group) for group in groups or ()], max_depth
        self.root: Node | None = None
        self.distances = torch.zeros(0, 0)
        self._points: dict[int, Tensor] = {}
        self._free = 0

    @classmethod
    def build(cls, points: Tensor, groups: Sequence[Sequence[int]] | None = None) -> PlainTree:
        tree = cls(groups)
        tree._points, tree._free = dict(enumerate(points)), len(points)
        tree.distances = torch.stack([distance(points, point) for point in points])
        tree.root = tree._built(tree.ids, 0)
        return tree

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def insert(self, point: Tensor) -> None:
        task, self._free = self._free, self._free + 1
        self._place(task, point)

    def remove(self, task: int) -> None:
        kept = [i for i, other in enumerate(self._points) if other != task]
        del self._points[task]
        self.distances = self.distances[kept][:, kept]
        self.root = self._without(self.root, task) if self.root is not None else None

    def replace(self, task: int, point: Tensor) -> None:
        self.remove(task)
        self._place(task, point)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As version 0.1 stored a tree."""
        points = torch.stack(list(self._points.values())) if self._points else torch.zeros(0, 0, 0)
        root = _described(self.root) if self.root is not None else None
        rest = {"groups": self.groups, "max_depth": self.max_depth, "next": self._free, "ids": list(self._points)}
        return {"points": points, "distances": self.distances.clone()}, {**rest, "root": root}

    def _place(self, task: int, point: Tensor) -> None:
        """Store a point and put its task into the tree. The point may be a new one for an old task."""
        before = self.ids
        far = torch.tensor([*self._distances(before, point), 0.0])
        self._points[task] = point.clone()
        self._points = dict(sorted(self._points.items()))
        grown = torch.cat([torch.cat([self.distances, far[None, :-1]]), far[:, None]], dim=1)
        place = {other: i for i, other in enumerate((*before, task))}
        order = [place[other] for other in self._points]
        self.distances = grown[order][:, order]
        self.root = self._with(self.root, task) if self.root is not None else self._built((task,), 0)

    def _with(self, node: Node, task: int) -> Node:
        """The node with one more task."""
        tasks = tuple(sorted((*node.tasks, task)))
        if not node.children:
            return self._built(tasks, node.depth)
        side = self._next(node, self._points[task])
        sizes = [len(child.tasks) + (i == side) for i, child in enumerate(node.children)]
        if abs(sizes[0] - sizes[1]) > 1 + len(tasks) // 16:
            return self._built(tasks, node.depth)
        children = [self._with(child, task) if i == side else child for i, child in enumerate(node.children)]
        return self._joined(node.depth, node.group, children)

    def _without(self, node: Node, task: int) -> Node | None:
        """The node without a task; None if no task is left."""
        tasks = tuple(other for other in node.tasks if other != task)
        if not tasks:
            return None
        sizes = [len(child.tasks) - (task in child.tasks) for child in node.children]
        if not sizes or 0 in sizes or abs(sizes[0] - sizes[1]) > 1 + len(tasks) // 16:
            return self._built(tasks, node.depth)
        children = [self._without(child, task) if task in child.tasks else child for child in node.children]
        return self._joined(node.depth, node.group, [child for child in children if child is not None])

    def _built(self, tasks: tuple[int, ...], depth: int) -> Node:
        """Build a node from its tasks alone."""
        if len(tasks) == 1:
            return Node(tasks, depth, self._points[tasks[0]], 0.0, 0.0)
        if depth == self.max_depth:
            return self._measured(Node(tasks, depth, self._mean(tasks), 0.0, 0.0))
        group, halves = self._halves(tasks, depth)
        return self._joined(depth, group, [self._built(half, depth + 1) for half in halves])

    def _joined(self, depth: int, group: int | None, children: Sequence[Node]) -> Node:
        node = self._measured(_parent(depth, group, children))
        first, second = (self._sides(node, child.tasks) for child in node.children)
        node.cut = (max(first) + min(second)) / 2
        return node

    def _measured(self, node: Node) -> Node:
        node.radius = max(self._distances(node.tasks, node.mean))
        if len(node.tasks) == len(self):
            node.spread = float(self.distances.max())
        else:
            place = {task: i for i, task in enumerate(self._points)}
            some = torch.tensor([place[task] for task in node.tasks])
            node.spread = float(self.distances[some[:, None], some].max())
        return node

    def _halves(self, tasks: tuple[int, ...], depth: int) -> tuple[int | None, list[tuple[int, ...]]]:
        """The group that splits the tasks, and both halves; the first half has the smallest id."""
        for group in (depth, None) if depth < len(self.groups) else (None,):
            from_mean = self._distances(tasks, self._mean(tasks, group), group)
            first = tasks[from_mean.index(max(from_mean))]
            from_first = self._distances(tasks, self._points[first], group)
            if max(from_first) > 0:
                second = tasks[from_first.index(max(from_first))]
                halves = self._cut(tasks, group, self._points[first], self._points[second])
                for _ in range(REFINEMENTS):
                    before = halves
                    halves = self._cut(tasks, group, self._mean(before[0]), self._mean(before[1]))
                    if halves == before:
                        break
                return group, sorted(halves)
        middle = (len(tasks) + 1) // 2  # all points are equal
        return None, [tasks[:middle], tasks[middle:]]

    def _cut(self, tasks: tuple[int, ...], group: int | None, left: Tensor, right: Tensor) -> list[tuple[int, ...]]:
        """Divide tasks into two halves: those nearer to `left`, compared with the others, and those nearer to
        `right`."""
        to_left, to_right = self._distances(tasks, left, group), self._distances(tasks, right, group)
        order = sorted((a - b, task) for a, b, task in zip(to_left, to_right, tasks, strict=True))
        middle = len(order) // 2
        if len(order) % 2 and order[middle][0] <= 0:
            middle += 1
        sides = order[:middle], order[middle:]
        return [tuple(sorted(task for _, task in side)) for side in sides]

    def _sides(self, node: Node, tasks: Sequence[int]) -> list[float]:
        """For each task its distance to the first child's mean minus its distance to the second's, over the group."""
        first, second = (self._distances(tasks, child.mean, node.group) for child in node.children)
        return [a - b for a, b in zip(first, second, strict=True)]

    def _next(self, node: Node, query: Tensor) -> int:
        """The index of the child on whose side of the cut a query is; exactly on the cut, the smaller child."""
        rows = self._rows(node.group)
        first, second = (float(distance(query[rows], child.mean[rows])) for child in node.children)
        sizes = [len(child.tasks) for child in node.children]
        side = first - second - node.cut
        return int(side > 0 or (side == 0 and sizes[1] < sizes[0]))

    def _rows(self, group: int | None) -> slice | list[int]:
        return slice(None) if group is None else self.groups[group]

    def _distances(self, tasks: Sequence[int], query: Tensor, group: int | None = None) -> list[float]:
        rows = self._rows(group)
        return [float(distance(self._points[task][rows], query[rows])) for task in tasks]

    def _mean(self, tasks: Sequence[int], group: int | None = None) -> Tensor:
        """The mean point of the tasks, `(L, k)`, float32. Their order matters only by rounding."""
        total = torch.zeros_like(self._points[tasks[0]], dtype=torch.float64)
        for task in tasks:
            total += self._points[task]
        return (total / len(tasks)).float()


def _parent(depth: int, group: int | None, children: Sequence[Node]) -> Node:
    """A node with two children, not yet measured. Its mean is computed from theirs, so the cost does not depend on the
    number of tasks."""
    first, second = sorted(children, key=lambda child: child.tasks)
    tasks = tuple(sorted(first.tasks + second.tasks))
    mean = (first.mean * len(first.tasks) + second.mean * len(second.tasks)) / len(tasks)
    return Node(tasks, depth, mean, 0.0, 0.0, group, children=(first, second))


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
