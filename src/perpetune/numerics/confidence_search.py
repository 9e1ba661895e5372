"""A search in a tree of tasks that sees one noisy distance in each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from perpetune.errors import StateError, UsageError
from perpetune.numerics.similarity_tree import Node, SimilarityTree
from perpetune.seeding import seed_of


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
        """The number of bounds that the last `select` compared; at most `2 ⌈log2 N⌉ + 2` if leaves have one task."""
        self._children: list[tuple[int, ...]] = []
        self._parents: list[int] = []
        self._deltas: list[float] = []
        self._tasks: list[int] = []  # the task of a leaf; -1 for other nodes
        self._leaves: dict[int, int] = {}
        self._members: list[tuple[int, ...]] = []  # the tasks of each node
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
        reach = self._reach(self.steps)
        counts, means = self._counts, self._means
        node = self._leaves[task]
        while node >= 0:
            counts[node] += 1
            means[node] += (value - means[node]) / counts[node]
            self._bounds[node] = self._bound(node, reach)
            node = self._parents[node]

    def _reach(self, steps: int) -> float:
        return self.scale * math.sqrt(2 * math.log(steps + 1))

    def _bound(self, node: int, reach: float) -> float:
        bound = self._means[node] - reach / math.sqrt(self._counts[node]) - self._deltas[node]
        if children := self._children[node]:
            bound = max(bound, min([self._bounds[child] for child in children]))
        return bound

    def begin(self, values: Sequence[float]) -> None:
        """Observe each task once, in the order of ids: as `observe` one after the other, with the same bits, before any
        other observation. Each node gets its bound once, at the step of its last task.

        Raises:
            UsageError: there was an observation, a value is out of range, or there are more or fewer than tasks.
        """
        tasks = sorted(self._leaves)
        if self.steps or len(values) != len(tasks) or not all(0 <= value <= 1 for value in values):
            raise UsageError(
                f"a search begins with a number from 0 to 1 for each of {len(tasks)} tasks, before any other step; got "
                f"{len(values)} numbers after {self.steps} steps"
            )
        self.steps, value_of = len(tasks), dict(zip(tasks, values, strict=True))
        reaches = {task: self._reach(step) for step, task in enumerate(tasks, 1)}
        for node in reversed(range(len(self._members))):  # children have higher numbers than their parents
            mean, members = 0.0, self._members[node]
            for count, task in enumerate(members, 1):
                mean += (value_of[task] - mean) / count
            self._counts[node], self._means[node] = len(members), mean
            self._bounds[node] = self._bound(node, reaches[members[-1]])

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
        index = self._number(parent, node.tasks)
        if len(node.tasks) > 1:
            spread = node.spread if delta == "radius" else delta(node) if callable(delta) else float(delta)
            self._deltas[index] = spread
            below = []
            for child in node.children:
                alone = len(child.tasks) == 1
                below.append(self._number(index, child.tasks) if alone else self._enter(child, index, delta))
            self._children[index] = tuple(below or [self._number(index, (task,)) for task in node.tasks])
        return index

    def _number(self, parent: int, tasks: tuple[int, ...]) -> int:
        index, task = len(self._parents), tasks[0] if len(tasks) == 1 else -1
        self._parents.append(parent)
        self._children.append(())
        self._deltas.append(0.0)
        self._tasks.append(task)
        self._members.append(tasks)
        if task >= 0:
            self._leaves[task] = index
        return index
