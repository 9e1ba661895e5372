"""A tree of tasks, ordered by the distances of their signatures, and two ways to search it.

The tree is that of TreeLoRA (Qian et al. 2025, arXiv:2506.10355), but every node is split into halves, so that every
search goes through `⌈log2 N⌉` levels. `SimilarityTree.nearest` is given a signature and finds the nearest task exactly.
`LowerConfidenceSearch` sees one noisy distance in each step.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from perpetune.errors import StateError, UsageError
from perpetune.numerics.signature import distance
from perpetune.seeding import seed_of

ROWS = 64  # tasks are compared in parts of this size, so that memory does not grow with their number
REFINEMENTS = 8  # the most refinements of a split; two or three are usual
ROUNDING = 1e-5  # a bound computed from three distances may be wrong by this


class Nearest(NamedTuple):
    """The result of `SimilarityTree.nearest`."""

    id: int
    distance: float
    evaluated: int
    """The number of tasks whose distance was computed."""


@dataclass(eq=False)
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
    count. A split takes two tasks that are far apart: the one farthest from the mean, and the one farthest from that
    one. It sorts the other tasks by the difference of their distances to these two, and cuts in the middle. Then it
    repeats this with the means of the halves until nothing changes, so that the cut does not divide a cluster if it can
    be avoided. Ids matter only in exact ties.

    Halves always differ by at most one task: if an insertion or a removal would unbalance a node, that node is built
    again. So the depth is at most `min(max_depth, ⌈log2 N⌉)`. Ids are names; they never change and are not used again.

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
        self.distances = torch.zeros(0, 0)
        """The distances of all pairs of tasks over all modules, `(N, N)` float32, in the order of `ids`."""
        self._points: dict[int, Tensor] = {}  # ascending ids
        self._free = 0

    @classmethod
    def build(
        cls, points: Tensor, groups: Sequence[Sequence[int]] | None = None, max_depth: int = 64
    ) -> SimilarityTree:
        """Build the tree of `points (N, L, k)` with ids 0 to N − 1 at once."""
        tree = cls(groups, max_depth)
        tree._points = {task: tree._checked(point).clone() for task, point in enumerate(points)}
        tree._free = len(points)
        tree.distances = torch.zeros(len(points), len(points))
        for task, point in tree._points.items():
            tree.distances[task, : task + 1] = torch.tensor(tree._distances(range(task + 1), point))
        tree.distances += tree.distances.tril(-1).mT
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
        node on the path whose halves would differ by two is built again.

        Raises:
            UsageError: the point is not a finite `(L, k)` of normalised rows, or has another shape than the tree's.
        """
        point = self._checked(point)
        task, self._free = self._free, self._free + 1
        self._place(task, point)
        return task

    def remove(self, task: int) -> None:
        """Take a task out.

        Raises:
            UsageError: there is no such task.
        """
        self.point(task)
        place = self.ids.index(task)
        kept = [i for i in range(len(self)) if i != place]
        del self._points[task]
        self.distances = self.distances[kept][:, kept]
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
                for task, far in zip(tasks, self._distances(tasks, query), strict=True):
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
        far = self._distances(node.tasks, query)
        return min(zip(far, node.tasks, strict=True))[1]

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
        """The whole state: the tensors `points (N, L, k)` and `distances (N, N)`, and the rest as JSON-able values."""
        points = torch.stack(list(self._points.values())) if self._points else torch.zeros(0, 0, 0)
        rest = {
            "groups": self.groups,
            "max_depth": self.max_depth,
            "next": self._free,
            "ids": list(self._points),
            "root": self.nodes(),
        }
        return {"points": points, "distances": self.distances.clone()}, rest

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> SimilarityTree:
        """Restore a tree from its `state()`, with the same bits; nothing is split or measured again.

        Raises:
            StateError: the tensors and the rest do not describe the same tasks.
        """
        ids, points, root = rest["ids"], tensors["points"], rest["root"]
        tasks = [] if root is None else root["tasks"]
        if len(points) != len(ids) or tensors["distances"].shape != (len(ids), len(ids)) or tasks != ids:
            raise StateError(
                f"a stored similarity tree names {len(ids)} tasks, has {len(tasks)} in its root, {len(points)} points "
                f"and distances {tuple(tensors['distances'].shape)}; they do not belong together"
            )
        tree = cls(rest["groups"], rest["max_depth"])
        tree._free = rest["next"]
        tree.distances = tensors["distances"].clone()
        tree._points = {task: point.clone() for task, point in zip(ids, points, strict=True)}
        tree.root = tree._restored(root) if root is not None else None
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
        if abs(sizes[0] - sizes[1]) > 1:
            return self._built(tasks, node.depth)
        children = [self._with(child, task) if i == side else child for i, child in enumerate(node.children)]
        return self._joined(node.depth, node.group, children)

    def _without(self, node: Node, task: int) -> Node | None:
        """The node without a task; None if no task is left."""
        tasks = tuple(other for other in node.tasks if other != task)
        if not tasks:
            return None
        sizes = [len(child.tasks) - (task in child.tasks) for child in node.children]
        if not sizes or 0 in sizes or abs(sizes[0] - sizes[1]) > 1:
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
        """An index of the group's modules; a slice if they follow each other, so that indexing makes no copy."""
        if group is None:
            return slice(None)
        modules = self.groups[group]
        whole = modules == list(range(modules[0], modules[-1] + 1))
        return slice(modules[0], modules[-1] + 1) if whole else modules

    def _distances(self, tasks: Sequence[int], query: Tensor, group: int | None = None) -> list[float]:
        """The distances from `query (L, k)` to each task, over a group's modules."""
        rows, distances = self._rows(group), []
        for first in range(0, len(tasks), ROWS):
            points = torch.stack([self._points[task][rows] for task in tasks[first : first + ROWS]])
            distances += distance(points, query[rows]).tolist()
        return distances

    def _mean(self, tasks: Sequence[int], group: int | None = None) -> Tensor:
        """The mean point of the tasks, `(L, k)`, float32. Their order matters only by rounding."""
        total = torch.zeros_like(self._points[tasks[0]], dtype=torch.float64)
        for task in tasks:
            total += self._points[task]
        return (total / len(tasks)).float()

    def _restored(self, stored: dict[str, Any]) -> Node:
        tasks, depth = tuple(stored["tasks"]), stored["depth"]
        if stored["children"]:
            node = _parent(depth, stored["group"], [self._restored(child) for child in stored["children"]])
        else:
            node = Node(tasks, depth, self._points[tasks[0]] if len(tasks) == 1 else self._mean(tasks), 0.0, 0.0)
        node.cut, node.radius, node.spread = stored["cut"], stored["radius"], stored["spread"]
        return node


def _holds(node: Node, task: int) -> bool:
    place = bisect_left(node.tasks, task)
    return place < len(node.tasks) and node.tasks[place] == task


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


class LowerConfidenceSearch:
    """Finds the task with the smallest mean value, by trying one task in each step.

    This is BAST (Coquelin & Munos 2007) for losses, the algorithm that TreeLoRA cites for its Eq. 2; as printed, the
    inner case of that equation is a maximum of one number. Let `t` be the number of steps so far, `n` of them through a
    node, and `μ` the mean of their values. The bound of the node is

        LCB = max(min over children of LCB, μ − c sqrt(2 ln(t + 1) / n) − δ),        δ = 0 for a task,

    and −∞ if the node was never tried. A step goes from the root to the child with the smaller LCB. Only the nodes on
    its path get new bounds, so a step costs `O(log N)` and a few microseconds; the other bounds keep the `t` of their
    last visit.

    Ties are decided by a hash of the seed and `t`, so there is no random state, and all processes decide the same. A
    node at the tree's largest depth chooses among its tasks by the same rule.

    Args:
        tree: the tree. It is read once, and later changes of the tree have no effect. Make a new search for each task.
        scale: `c`.
        seed: decides ties.
        delta: `δ` of nodes with several tasks. "radius" takes the node's `spread`, with which LCB is a true bound. Or
            one number for all nodes, or a function of the node.

    Raises:
        UsageError: the tree is empty, or the scale is not a number ≥ 0.
    """

    def __init__(
        self,
        tree: SimilarityTree,
        scale: float = 0.3,
        seed: int = 0,
        delta: Literal["radius"] | float | Callable[[Node], float] = "radius",
    ):
        if tree.root is None:
            raise UsageError("an empty tree cannot be searched")
        if not (scale >= 0 and math.isfinite(scale)):
            raise UsageError(f"the scale of a search is {scale}; a number ≥ 0 is expected")
        self.scale, self.seed = scale, seed
        self.steps = 0
        """`t`, the number of observations so far."""
        self.evaluations = 0
        """The number of bounds that the last `select` compared; at most `2 ⌈log2 N⌉` if leaves have one task."""
        self._children: list[tuple[int, ...]] = []
        self._parents: list[int] = []
        self._deltas: list[float] = []
        self._tasks: list[int] = []  # the task of a leaf; -1 for other nodes
        self._leaves: dict[int, int] = {}
        self._enter(tree.root, -1, delta)
        self._counts = [0] * len(self._parents)
        self._means = [0.0] * len(self._parents)
        self._bounds = [-math.inf] * len(self._parents)

    def select(self) -> int:
        """The task to try next; it stays the same until `observe` is called."""
        node, bounds, draw = 0, self._bounds, -1
        self.evaluations = 0
        while children := self._children[node]:
            self.evaluations += len(children)
            values = [bounds[child] for child in children]
            least = min(values)
            if values.count(least) > 1:
                children = tuple(child for child, value in zip(children, values, strict=True) if value == least)
                draw = draw if draw >= 0 else seed_of("search", self.seed, self.steps)
                draw, chosen = divmod(draw, len(children))
                node = children[chosen]
            else:
                node = children[values.index(least)]
        return self._tasks[node]

    def observe(self, task: int, value: float) -> None:
        """Add an observation: the distance `value` of a task, from 0 to 1. The task need not be the selected one.

        Raises:
            UsageError: there is no such task, or the value is out of range.
        """
        if task not in self._leaves:
            raise UsageError(f"the search has no task {task}; it has {sorted(self._leaves)}")
        if not 0 <= value <= 1:
            raise UsageError(f"the distance to task {task} is {value}; a number from 0 to 1 is expected")
        self.steps += 1
        reach = self.scale * math.sqrt(2 * math.log(self.steps + 1))
        counts, means, bounds = self._counts, self._means, self._bounds
        node = self._leaves[task]
        while node >= 0:
            counts[node] += 1
            means[node] += (value - means[node]) / counts[node]
            bound = means[node] - reach / math.sqrt(counts[node]) - self._deltas[node]
            if children := self._children[node]:
                bound = max(bound, min([bounds[child] for child in children]))
            bounds[node] = bound
            node = self._parents[node]

    def pulls(self) -> dict[int, int]:
        """The number of observations of each task, by id."""
        return {task: self._counts[self._leaves[task]] for task in sorted(self._leaves)}

    def means(self) -> dict[int, float]:
        """The mean value of each observed task, by id."""
        return {task: self._means[self._leaves[task]] for task, count in self.pulls().items() if count}

    def state(self) -> dict[str, Any]:
        """The state as JSON-able values. A search in the same tree continues from it with the same steps. The bound of
        a node that was never tried is None."""
        return {
            "steps": self.steps,
            "tasks": list(self._tasks),
            "counts": list(self._counts),
            "means": list(self._means),
            "bounds": [bound if math.isfinite(bound) else None for bound in self._bounds],
            "seed": self.seed,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state()`.

        Raises:
            StateError: the state belongs to a search in another tree.
        """
        if state["tasks"] != self._tasks:
            raise StateError("a stored search belongs to another tree than this one, so it cannot continue")
        self.steps, self.seed = state["steps"], state["seed"]
        self._counts, self._means = list(state["counts"]), list(state["means"])
        self._bounds = [-math.inf if bound is None else bound for bound in state["bounds"]]

    def _enter(self, node: Node, parent: int, delta: Literal["radius"] | float | Callable[[Node], float]) -> int:
        """Give numbers to a node, to all nodes below it, and to the tasks of a leaf with several tasks."""
        index = self._number(parent, node.tasks[0] if len(node.tasks) == 1 else -1)
        if len(node.tasks) > 1:
            spread = node.spread if delta == "radius" else delta(node) if callable(delta) else float(delta)
            self._deltas[index] = spread
            below = [self._enter(child, index, delta) for child in node.children]
            self._children[index] = tuple(below or [self._number(index, task) for task in node.tasks])
        return index

    def _number(self, parent: int, task: int) -> int:
        index = len(self._parents)
        self._parents.append(parent)
        self._children.append(())
        self._deltas.append(0.0)
        self._tasks.append(task)
        if task >= 0:
            self._leaves[task] = index
        return index
