"""Figures of a model that answers about tasks that it has not learned yet: what it knows of them, and what it loses.

Notation as in `numerics.metrics`: `A[i][j]` is the accuracy on task j after task i. Here cells above the diagonal
(`j > i`) are measured too, and `Z[j]` is the accuracy on task j before the first task. A cell that is None is not
measured: every mean leaves it out, and a mean over no cell is None.

Transfer, Avg and Last are those of ZSCL (Zheng et al. 2023, arXiv 2303.06628), as its `results.ipynb` computes them:
Transfer has no row before the first task and no first column. They are other figures than `average_accuracy` and
`final_accuracy`, which count learned tasks only.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from perpetune.numerics.metrics import Cells, Matrix, accuracies, mean


class ZeroShot(TypedDict):
    """The figures of a run with `evaluate.future`, over the tasks learned so far; None if a figure is not defined.

    Attributes:
        transfer, average, last: Transfer, Avg and Last.
        before: the same three of a model that stays as it was before the first task.
        kept_mean, kept_worst: of `A[i][j] - Z[j]` over the tasks that were not learned yet (`j > i`).
    """

    transfer: float | None
    average: float | None
    last: float | None
    before: dict[str, float | None]
    kept_mean: float | None
    kept_worst: float | None


def transfer(A: Matrix) -> float | None:
    """How well tasks are answered before they are learned: `mean_{j >= 1} mean_{i < j} A[i][j]`."""
    columns = max(map(len, A), default=0)
    return mean(mean(row[j] for row in A[:j] if j < len(row)) for j in range(1, columns))


def average(A: Matrix) -> float | None:
    """Avg: the mean over all cells, below the diagonal and above it."""
    return mean(cell for row in A for cell in row)


def last(A: Matrix) -> float | None:
    """Last: the mean of the last row."""
    return mean(A[-1]) if A else None


def kept(A: Matrix, Z: Sequence[float | None]) -> list[float]:
    """`A[i][j] - Z[j]` for each task j that was not learned yet after task i; below zero, something was lost."""
    found = []
    for i, row in enumerate(A):
        for now, begun in list(zip(row, Z, strict=False))[i + 1 :]:
            if now is not None and begun is not None:
                found.append(now - begun)
    return found


def summarise(cells: Cells, before: Cells) -> ZeroShot:
    """All figures.

    Args:
        cells: the rows so far, with cells above the diagonal.
        before: one row: the cells before the first task.
    """
    A, Z = accuracies(cells), accuracies(before)[0]
    stays = [Z for _ in A]
    changes = kept(A, Z)
    return {
        "transfer": transfer(A),
        "average": average(A),
        "last": last(A),
        "before": {"transfer": transfer(stays), "average": average(stays), "last": last(stays)},
        "kept_mean": mean(changes),
        "kept_worst": min(changes, default=None),
    }
