"""Which earlier tasks the one at hand resembles: the stored tree of all, and the search that goes with one training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perpetune.numerics.signature import distance
from perpetune.numerics.similarity_tree import ROUNDING, LowerConfidenceSearch, Node, SimilarityTree
from perpetune.seeding import seed_of

Kind = Literal["lcb", "nearest", "random", "farthest"]


class TaskTree(nn.Module):
    """A `SimilarityTree` that is stored with the method that has it.

    Args:
        groups: indices of modules, shallow ones first.
        shape: of a signature, `(L, k)`.
    """

    points: Tensor
    distances: Tensor

    def __init__(self, groups: Sequence[Sequence[int]], shape: tuple[int, int]):
        super().__init__()
        self.shape = shape
        self._tree: SimilarityTree | None = SimilarityTree(groups)
        self.store()

    @property
    def tree(self) -> SimilarityTree:
        """To be changed in place, and then to be stored."""
        if self._tree is None:  # since tensors were loaded
            tensors = {"points": self.points.cpu(), "distances": self.distances.cpu()}
            self._tree = SimilarityTree.from_state(tensors, self._rest)
        return self._tree

    def store(self) -> None:
        """Make the tree as it is what a checkpoint holds."""
        tensors, self._rest = self.tree.state()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def get_extra_state(self) -> dict[str, Any]:
        return self._rest

    def set_extra_state(self, state: dict[str, Any]) -> None:
        count = len(state["ids"])
        self.register_buffer("points", torch.zeros(count, *self.shape) if count else torch.zeros(0, 0, 0))
        self.register_buffer("distances", torch.zeros(count, count))
        self._rest, self._tree = state, None


class Search:
    """The earlier task that each step of one training is drawn to.

    A step costs `O(log N)` for `lcb` and `random`, whatever the number `N` of earlier tasks; the other two look at all.

    Args:
        tree: of the earlier tasks; at least one, and not to be changed as long as this is used.
        kind: how it is chosen; see `TreeLoRA`.
        confidence: the factor `c` of the bounds.
        seed: for ties, and of `random`; the same in all processes.
        signature: normalised `(L, k)`, what is known of the task before its first step. All tasks are compared with
            it, so that the first steps need not go through all.
    """

    def __init__(self, tree: SimilarityTree, kind: Kind, confidence: float, seed: int, signature: Tensor):
        assert tree.root is not None
        self.tree, self.kind, self.seed = tree, kind, seed
        self.steps = 0
        """Steps that were drawn to an earlier task."""
        self.counts: list[dict[int, int]] = [{} for _ in tree.groups]
        """For each group of modules, how many of them to which."""
        self._ids, self._mean, self._widest = tree.ids, tree.root.mean, tree.root.spread or 1.0
        self._bounds = LowerConfidenceSearch(
            tree, confidence, seed, delta=lambda node: node.spread / (2 * self._widest)
        )
        if kind == "lcb":
            for known in self._ids:
                self._bounds.observe(known, self.residual(known, signature))
        shallow = [node for node in tree if 0 < node.depth < len(tree.groups)]
        self._middles = {node: _middle(tree, node) for node in shallow}
        self.picked = self._next(signature)
        """The task that the step at hand is drawn to."""

    def helpers(self) -> list[int]:
        """For each group of modules the task that stands for what was picked: in the deepest the picked one itself, in
        the others the middle of the branch that the tree has made by that group and that holds it, the earlier one of
        two."""
        path = self.tree.path(self.picked)
        below = [path[min(level + 1, len(path) - 1)] for level in range(len(self.counts) - 1)]
        return [*(self._middles.get(node, self.picked) for node in below), self.picked]

    def step(self, signature: Tensor | None) -> None:
        """A step is done; choose for the next one.

        Args:
            signature: normalised `(L, k)`, as it has become; None where nothing new is known.
        """
        self.steps += 1
        for counts, helper in zip(self.counts, self.helpers(), strict=True):
            counts[helper] = counts.get(helper, 0) + 1
        if signature is not None:
            if self.kind == "lcb":
                self._bounds.observe(self.picked, self.residual(self.picked, signature))
            self.picked = self._next(signature)

    def residual(self, known: int, signature: Tensor) -> float:
        """How far a signature is from a known task's, in [0, 1]; 1/2 where it is as far as from the mean of all tasks.

        What is common to all distances says nothing, and by the triangle inequality the rest is at most the spread of
        the tree. On that scale the bounds can tell near tasks apart.
        """
        more = float(distance(self.tree.point(known), signature) - distance(self._mean, signature))
        return min(1.0, max(0.0, 0.5 + more / (2 * self._widest)))

    def state(self) -> dict[str, Any]:
        """JSON-able: with it a search of the same tree goes on as if it had not been stopped."""
        return {
            "steps": self.steps,
            "picked": self.picked,
            "counts": [{str(known): n for known, n in counts.items()} for counts in self.counts],
            "bounds": self._bounds.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`.

        Raises:
            StateError: the state of a search of another tree.
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
    """The task nearest to a node's mean, the smallest id of several: two alone are equally far from theirs, and which
    of them rounding puts nearer is another on another processor."""
    far = [float(distance(tree.point(task), node.mean)) for task in node.tasks]
    return next(task for task, value in zip(node.tasks, far, strict=True) if value <= min(far) + ROUNDING)
