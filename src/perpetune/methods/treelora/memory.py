"""The tree of all earlier tasks as a method keeps and stores it: each signature once, however many tasks follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.numerics.similarity_tree import SimilarityTree


class TaskTree(nn.Module):
    """A `SimilarityTree` that is stored with its method.

    What belongs to one task, its signature and its distances from the tasks that were there when it came, does not
    change any more. It is stored once, with the adapter of the task (`beside`). The buffers are the shape of the tree,
    which is small, and stored after each task.

    Args:
        groups: indices of modules in groups, shallow ones first.
        shape: the shape of a signature, `(L, k)`.
    """

    def __init__(self, groups: Sequence[Sequence[int]], shape: tuple[int, int]):
        super().__init__()
        self.shape = shape
        self._points: dict[int, Tensor] = {}
        self._far: dict[int, Tensor] = {}  # of each task the distances from tasks 0, 1, …; 0 for those that were gone
        # The tasks whose signature was changed by a merge, in the order of the merges, and the id that was free then
        self._moved: dict[int, int] = {}
        self._old = False  # whether the buffers are those of an earlier version: all signatures, and all distances
        self._tree: SimilarityTree | None = SimilarityTree(groups)
        self.store()

    @property
    def tree(self) -> SimilarityTree:
        """The tree, to look at; it is changed by `insert` and `merge`."""
        if self._tree is None:  # a state was loaded, and the tree has to be built from its tensors
            tensors = dict(self.named_buffers(recurse=False))
            self._tree = SimilarityTree.from_state(tensors if self._old else tensors | self._tables(), self._rest)
        return self._tree

    def insert(self, signature: Tensor) -> int:
        """Add a task and return its id. Call `store` when the tree is as it should be after the task."""
        task = self.tree.insert(signature)
        self._note(task, task)
        return task

    def merge(self, kept: int, gone: int, signature: Tensor) -> None:
        """Let a task stand for two of them, with another signature. Call `store` afterwards."""
        tree = self.tree
        tree.remove(gone)
        tree.replace(kept, signature)
        for known in (self._points, self._far, self._moved):
            known.pop(gone, None)
        self._moved.pop(kept, None)  # so that it becomes the last one
        self._moved[kept] = tree.following
        self._note(kept, tree.following)

    def store(self) -> bool:
        """Copy the shape of the tree into the buffers.

        Returns:
            Whether `beside` has something new for all tasks, not only for those that were inserted or merged.
        """
        renewed, self._old = self._old, False
        if renewed:
            self._moved = {}
            for task in self.tree.ids:
                self._note(task, task)
        self._hold(self.tree.shape())
        self._rest = self._described()
        return renewed

    def reloaded(self) -> None:
        """Note that tensors have other values than before."""
        self._tree = None

    def beside(self, task: int, name: str) -> Mapping[str, Tensor]:
        """The tensors that belong to a task of the tree, by their paths in the method.

        Args:
            name: that of this module in the method.
        """
        if self._old or task not in self._points:
            return {}
        return {f"{name}.{task}-signature": self._points[task], f"{name}.{task}-distances": self._far[task]}

    def get_extra_state(self) -> dict[str, Any]:
        """It tells whether the tree was changed since it was stored, so that a task that failed leaves nothing."""
        changed = self._tree is not None and self._tree.rest() != {key: self._rest[key] for key in self._tree.rest()}
        return self._described() if changed else self._rest

    def set_extra_state(self, state: dict[str, Any]) -> None:
        ids, self._old, self._moved = list(state["ids"]), "root" in state, {}
        count = len(ids)
        if self._old:
            self._points, self._far = {}, {}
            empty = count == 0
            self._hold(
                {
                    "points": torch.zeros((0, 0, 0) if empty else (count, *self.shape)),
                    "distances": torch.zeros(count, count),
                }
            )
        else:
            self._moved = dict(state["moved"])
            self._points = {task: torch.zeros(self.shape) for task in ids}
            self._far = {task: torch.zeros(self._moved.get(task, task)) for task in ids}
            nodes = max(0, count - 1)  # of a tree whose leaves have one task
            self._hold(
                {
                    "order": torch.zeros(count, dtype=torch.int32),
                    "splits": torch.zeros(nodes, 2, dtype=torch.int32),
                    "cuts": torch.zeros(nodes, dtype=torch.float64),
                    "widths": torch.zeros(nodes, 2),
                }
            )
        self._rest, self._tree = state, None

    def _apply(self, fn: Any, recurse: bool = True) -> TaskTree:
        return self  # small, exact, and read on the CPU: Apple's GPUs have no float64

    def _hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Have these buffers and no others."""
        for name in [*self._buffers]:
            del self._buffers[name]
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _described(self) -> dict[str, Any]:
        return {**self.tree.rest(), "moved": [[task, free] for task, free in self._moved.items()]}

    def _note(self, task: int, before: int) -> None:
        """Keep what belongs to a task, as it is now, with its distances from the tasks whose ids are below `before`."""
        tree = self.tree
        others = [other for other in tree.ids if other < before]
        self._points[task], self._far[task] = tree.point(task), torch.zeros(before)
        self._far[task][others] = tree.between(task, others)

    def _tables(self) -> dict[str, Tensor]:
        """All signatures and all distances, as a tree is restored from them."""
        ids: list[int] = self._rest["ids"]
        far = torch.zeros(len(ids), len(ids))
        for task in [*(task for task in ids if task not in self._moved), *self._moved]:
            row = self._far[task]  # it has what is right of the tasks that are older, and of those before in this order
            others = [other for other in ids if other < len(row)]  # ascending, so these are the first ones
            far[ids.index(task), : len(others)] = far[: len(others), ids.index(task)] = row[others]
        return {"points": torch.stack(list(self._points.values())) if ids else torch.zeros(0, 0, 0), "distances": far}
