"""The search in training for the earlier tasks most similar to the present one."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from perpetune.numerics.confidence_search import LowerConfidenceSearch
from perpetune.numerics.signature import distance
from perpetune.numerics.similarity_tree import ROUNDING, Node, SimilarityTree
from perpetune.seeding import seed_of

Kind = Literal["lcb", "nearest", "random", "farthest"]


class Search:
    """Picks for each step of one training the earlier task to which the step is drawn.

    With `N` earlier tasks a step costs `O(log N)` for `lcb` and `random`; the other two kinds compare with all tasks.

    Args:
        tree: the tree of the earlier tasks. It has at least one task and must not change while the search is in use.
        kind: how the task is picked; see `TreeLoRA`.
        confidence: the factor `c` of the bounds.
        seed: decides ties, and the picks of `random`; the same in all processes.
        signature: normalised `(L, k)`, the task's signature before its first step. The bounds start from its distance
            to every earlier task, so that the first steps need not try all of them.
        far: these distances, in the order of ids, if they are known.
    """

    def __init__(
        self,
        tree: SimilarityTree,
        kind: Kind,
        confidence: float,
        seed: int,
        signature: Tensor,
        far: Tensor | None = None,
    ):
        assert tree.root is not None
        self.tree, self.kind, self.seed = tree, kind, seed
        self.steps = 0
        """The number of steps that were drawn to an earlier task."""
        self.counts: list[dict[int, int]] = [{} for _ in tree.groups]
        """For each group of modules, the number of steps that were drawn to each task."""
        self._ids, self._mean, self._widest = tree.ids, tree.root.mean, tree.root.spread or 1.0
        self._bounds = LowerConfidenceSearch(
            tree, confidence, seed, delta=lambda node: node.spread / (2 * self._widest)
        )
        if kind == "lcb":
            more = (tree.far(signature) if far is None else far) - distance(self._mean, signature)
            self._bounds.begin(self._scaled(more.double()).tolist())
        self._middles: dict[Node, int] = {}
        level = tree.root.children
        for _ in range(1, len(tree.groups)):
            self._middles |= {node: _middle(tree, node) for node in level}
            level = tuple(child for node in level for child in node.children)
        self.picked = self._next(signature)
        """The task to which the present step is drawn."""

    def helpers(self) -> list[int]:
        """For each group of modules the task to which it is drawn.

        For the deepest group it is the picked task. For each other group it is the task in the middle of the branch
        that contains the picked task at the level of that group; of two equally near ones the earlier.
        """
        path = self.tree.path(self.picked)
        below = [path[min(level + 1, len(path) - 1)] for level in range(len(self.counts) - 1)]
        return [*(self._middles.get(node, self.picked) for node in below), self.picked]

    def step(self, signature: Tensor | None) -> None:
        """Count the step that is done, and pick the task for the next one.

        Args:
            signature: the task's present signature, normalised `(L, k)`; None if it has not changed.
        """
        self.steps += 1
        for counts, helper in zip(self.counts, self.helpers(), strict=True):
            counts[helper] = counts.get(helper, 0) + 1
        if signature is not None:
            if self.kind == "lcb":
                self._bounds.observe(self.picked, self.residual(self.picked, signature))
            self.picked = self._next(signature)

    def residual(self, known: int, signature: Tensor) -> float:
        """The distance of a signature from a known task, scaled to [0, 1]; 1/2 means as far as from the mean of all
        tasks.

        The part that all distances share does not help to choose, so it is subtracted. By the triangle inequality the
        rest is at most the spread of the tree. Divided by that, the bounds can distinguish near tasks.
        """
        more = distance(self.tree.point(known), signature) - distance(self._mean, signature)
        return float(self._scaled(more.double()))

    def _scaled(self, more: Tensor) -> Tensor:
        return (more / (2 * self._widest) + 0.5).clamp(0, 1)

    def state(self) -> dict[str, Any]:
        """The state as JSON-able values. With it a search in the same tree continues as if it had not been stopped."""
        return {
            "steps": self.steps,
            "picked": self.picked,
            "counts": [{str(known): n for known, n in counts.items()} for counts in self.counts],
            "bounds": self._bounds.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state()`.

        Raises:
            StateError: the state belongs to a search in another tree.
        """
        self._bounds.load_state(state["bounds"])
        self.steps, self.picked = state["steps"], state["picked"]
        self.counts = [{int(known): n for known, n in counts.items()} for counts in state["counts"]]

    def _next(self, signature: Tensor) -> int:
        if self.kind == "lcb":
            return self._bounds.select()
        if self.kind == "nearest":
            return self.tree.nearest(signature).id
        if self.kind == "farthest":
            return max(self._ids, key=lambda known: self.residual(known, signature))
        return self._ids[seed_of("random task", self.seed, self.steps) % len(self._ids)]


def _middle(tree: SimilarityTree, node: Node) -> int:
    """The task nearest to a node's mean. If several are equally near up to rounding, the smallest id counts.

    Two tasks alone in a node are always equally far from its mean, and without this rule the result would depend on the
    rounding of the processor.
    """
    far: list[float] = tree.far(node.mean, node.tasks).tolist()
    nearest = min(far) + ROUNDING
    return next(task for task, value in zip(node.tasks, far, strict=True) if value <= nearest)
