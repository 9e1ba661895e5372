"""The metrics of continual learning: how much was learned, kept and forgotten over a stream of tasks.

Notation: `A[i][j]` is the accuracy in [0, 1] on the test data of task j, measured after task i was
learned; `T` is the last row (0-based, as every index here). The matrix may have fewer rows than
columns (a run that is not finished), rows may end early, and a cell that is None was not measured.

Cells above the diagonal (`j > i`) are accuracies on tasks not yet learned; only `forward_transfer`
reads them. A mean leaves out cells that are not measured; it never counts them as zero. A mean over
no cell is None.

Sources: Lopez-Paz & Ranzato 2017 (arXiv 1706.08840) for the matrix and both transfers; Chaudhry et
al. 2018 (arXiv 1801.10112) for forgetting; Rebuffi et al. 2017 (arXiv 1611.07725) for the average of
the accuracies after each task, called average incremental accuracy.

If answers are not right or wrong but have scores in [0, 1] (`numerics.text_scores`), an accuracy is the mean score.

TRACE (Wang et al. 2023, arXiv 2310.06762) and TreeLoRA call the mean of row n overall performance, OP_n. It is
`final_accuracy` after n tasks; `over_time(final_accuracy, A)` gives it for every n, and its mean over n is
`average_accuracy`. Their BWT is `backward_transfer(A, divisor="all")`; that function explains signs and variants.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import compress
from typing import Literal

from typing_extensions import NotRequired, TypedDict  # pydantic reads no other before Python 3.12

Matrix = Sequence[Sequence["float | None"]]


class Rows(list[dict[int, float]]):
    """A matrix as its measured cells: for each row the values by column. Most cells of a long stream are empty.

    Rows are added at the end. What the figures need of earlier rows is computed once, so a row may not change after
    another one was added, but for cells above the diagonal.
    """

    def __init__(self, rows: Iterable[dict[int, float]] = ()):
        super().__init__(rows)
        self._means: list[float | None] = []
        self._best, self._counted = dict[int, float](), 0
        self._before, self._passed = dict[int, float](), 1

    @classmethod
    def of(cls, A: Matrix | Rows) -> Rows:
        if isinstance(A, Rows):
            return A
        return cls({j: a for j, a in enumerate(row) if a is not None} for row in A)

    def at(self, i: int, j: int) -> float | None:
        """The cell; None if it was not measured."""
        return self[i].get(j) if 0 <= i < len(self) else None

    def means(self) -> list[float | None]:
        """For each row the mean over the tasks learned by then."""
        for i in range(len(self._means), len(self)):
            self._means.append(mean(self[i][j] for j in sorted(self[i]) if j <= i))
        return self._means

    def best(self) -> dict[int, float]:
        """For each task its largest value since it was learned, without those of the last row."""
        for i in range(self._counted, len(self) - 1):
            self._best |= {j: a for j, a in self[i].items() if j <= i and a >= self._best.get(j, a)}
        self._counted = max(self._counted, len(self) - 1)
        return self._best

    def before(self) -> dict[int, float]:
        """For each task that was measured before it was learned its last value then; of later tasks, only the next."""
        for j in range(self._passed, len(self)):
            if (value := self[j - 1].get(j)) is not None:
                self._before[j] = value
        self._passed = max(self._passed, len(self))
        following = self.at(len(self) - 1, len(self))
        return self._before if following is None else {**self._before, len(self): following}


class Cell(TypedDict):
    """Counts of the answers on one task's test data, measured after one task. An accuracy is computed from them.

    Attributes:
        correct, total: number of right answers and of test examples. If answers are not right or wrong, `correct` is
            the sum of their scores, each in [0, 1].
        per_class: the same two numbers, `[correct, total]`, for each class name.
        score: name of the score of each answer (`numerics.text_scores`); absent if the answers are classes.
        of: the number of test examples of the task, if only a sample of them was asked.
    """

    correct: float
    total: int
    per_class: Mapping[str, Sequence[float]]
    score: NotRequired[str]
    of: NotRequired[int]


Cells = Sequence["Sequence[Cell | None] | Mapping[int, Cell]"]
"""Rows of cells: all of them in order, None where nothing was measured; or the measured ones by column."""


class Metrics(TypedDict):
    """The main figures of a run; each is None if it is not defined."""

    final_accuracy: float | None
    average_accuracy: float | None
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    pooled_accuracy: float | None


def accuracies(cells: Cells) -> list[list[float | None]]:
    """The accuracy matrix of counted answers: `correct / total`; None for a cell without answers."""
    A: list[list[float | None]] = []
    for row, measured in zip(cells, _ratios(cells), strict=True):
        line: list[float | None] = [None] * (max(row, default=-1) + 1 if isinstance(row, Mapping) else len(row))
        for j, a in measured.items():
            line[j] = a
        A.append(line)
    return A


def _ratios(cells: Cells) -> Rows:
    """The accuracies as rows of what was measured."""
    rows = Rows()
    for row in cells:
        found = row.items() if isinstance(row, Mapping) else ((j, row[j]) for j in compress(range(len(row)), row))
        ratios = ((j, accuracy(cell)) for j, cell in found)
        rows.append({j: a for j, a in ratios if a is not None})
    return rows


def accuracy(cell: Cell | None) -> float | None:
    """The share of right answers, or the mean score; None without answers."""
    return _ratio(cell["correct"], cell["total"]) if cell else None


def final_accuracy(A: Matrix | Rows) -> float | None:
    """Mean accuracy over the tasks learned, after the last one: `mean_{j <= T} A[T][j]`."""
    return Rows.of(A).means()[-1] if A else None


def average_accuracy(A: Matrix | Rows) -> float | None:
    """Average incremental accuracy: `mean_{i <= T} mean_{j <= i} A[i][j]`.

    A row without a measured cell is left out of the outer mean.
    """
    return mean(Rows.of(A).means())


def forgetting(A: Matrix | Rows) -> float | None:
    """Mean loss of accuracy since each task was best: `mean_{j < T} (max_{j <= i < T} A[i][j] - A[T][j])`.

    Negative when the last task improved the earlier ones. None with fewer than two tasks. A task
    counts when its last cell and at least one cell before that are measured.
    """
    rows = Rows.of(A)
    best, now = rows.best(), rows[-1] if rows else {}
    return mean(best[j] - now[j] for j in sorted(now) if j in best)


def task_forgetting(A: Matrix, j: int) -> float | None:
    """The term of task `j` in `forgetting`; None if it is not defined."""
    last = len(A) - 1
    now = _at(A, last, j)
    before = [a for i in range(j, last) if (a := _at(A, i, j)) is not None]
    return max(before) - now if before and now is not None else None


def backward_transfer(
    A: Matrix | Rows, *, divisor: Literal["earlier", "all"] = "earlier", clipped: bool = False
) -> float | None:
    """The effect of later tasks on earlier ones: `mean_{j < T} (A[T][j] - A[j][j])`; below zero is forgetting.

    A task counts when both of its cells are measured. None if no task counts, and with the divisor `earlier` also with
    fewer than two tasks.

    The sign is that of Lopez-Paz & Ranzato and TRACE. The TreeLoRA paper prints the opposite sign, and its released
    code uses `divisor="all", clipped=True`, which hides every gain.

    Args:
        A: the accuracy matrix.
        divisor: the tasks of the mean. `earlier`: the `T` tasks before the last (Lopez-Paz & Ranzato). `all`: the last
            task too, whose term is always 0 (TRACE; TreeLoRA, section 2); the figure is `T / (T + 1)` of the other.
        clipped: count an improvement as 0.
    """
    rows = Rows.of(A)
    last = len(rows) - 1
    measured = sorted(j for j in rows[last] if j < last + (divisor == "all")) if rows else []
    changes = (_difference(rows.at(last, j), rows.at(j, j)) for j in measured)
    return mean(min(change, 0.0) if clipped and change is not None else change for change in changes)


def forward_transfer(A: Matrix | Rows, classes: Sequence[int]) -> float | None:
    """The gain from earlier tasks on a task before it is learned: `mean_{j >= 1} (A[j-1][j] - 1 / classes[j])`.

    The baseline here is chance among the task's own classes; the source measures a random
    initialisation instead. A task counts when the cell above the diagonal is measured, so the figure is
    None if tasks are never tested before they are learned (class-incremental runs).

    Args:
        A: the accuracy matrix.
        classes: number of classes of each task, one for each column.
    """
    before = Rows.of(A).before().items()
    return mean(value - 1 / classes[j] for j, value in before if 0 < j < len(classes) and classes[j] > 0)


def over_time(metric: Callable[[Matrix], float | None], A: Matrix) -> list[float | None]:
    """`metric` after each task: computed on the first 1, 2, … rows."""
    return [metric(A[: i + 1]) for i in range(len(A))]


def pooled_accuracy(cells: Cells) -> float | None:
    """Share of right answers (or mean score) over the test examples of all tasks learned, after the last one.

    It is `sum_{j <= T} correct[T][j] / sum_{j <= T} total[T][j]`, over measured cells.
    """
    row = seen_cells(cells)
    return _ratio(sum(c["correct"] for c in row), sum(c["total"] for c in row))


def per_class_counts(cells: Iterable[Cell]) -> dict[str, tuple[float, int]]:
    """(correct, total) of each class over the given cells; the numbers of a class in several tasks are added."""
    counts: dict[str, tuple[float, int]] = {}
    for cell in cells:
        for name, (correct, total) in cell["per_class"].items():
            so_far = counts.get(name, (0, 0))
            counts[name] = (so_far[0] + correct, so_far[1] + int(total))
    return counts


def per_class_accuracy(cells: Cells) -> dict[str, float | None]:
    """Accuracy of each class after the last task, over the tasks learned; None without an example."""
    return {name: _ratio(*counts) for name, counts in per_class_counts(seen_cells(cells)).items()}


def seen_cells(cells: Cells) -> list[Cell]:
    """The measured cells of the last row that belong to tasks already learned."""
    row = cells[-1] if cells else ()
    measured = sorted(row.items()) if isinstance(row, Mapping) else enumerate(row)
    return [cell for j, cell in measured if cell is not None and j < len(cells)]


def whole_rows(A: Matrix, left_out: Collection[int]) -> Matrix:
    """The rows in which all tasks were asked; the others, whose mean would be of some tasks alone, are empty.

    Args:
        left_out: the numbers of the rows in which tasks were not asked.
    """
    return [[] if i in left_out else row for i, row in enumerate(A)]


def summarise(
    cells: Cells,
    tasks: Sequence[Mapping[str, object]],
    left_out: Collection[int] = (),
    in_turn: Collection[int] = (),
    rows: Rows | None = None,
    whole: Rows | None = None,
) -> Metrics:
    """All main figures of a run.

    Where only a sample of a task's examples was asked, its cell counts with the share of right answers in the sample.
    Pooled accuracy is then not defined, because the tasks would have other weights.

    Args:
        cells: the rows so far, each with up to one cell per task.
        tasks: the tasks in order, each with its list of `classes`.
        left_out: the numbers of the rows in which tasks were not asked (`evaluate.earlier`); a row's mean needs all.
        in_turn: the numbers of the rows in which some of the tasks were asked, in turn; a row's mean is over these.
        rows: the accuracies of the cells, if they are known already.
        whole: the same without the rows that are `left_out`.
    """
    A = _ratios(cells) if rows is None else rows
    whole = Rows({} if i in left_out else row for i, row in enumerate(A)) if whole is None else whole
    partly = {*left_out, *in_turn}
    pooled = len(A) - 1 not in partly and not any("of" in cell for cell in seen_cells(cells))
    return {
        "final_accuracy": final_accuracy(whole),
        "average_accuracy": average_accuracy(whole),
        "forgetting": forgetting(A),
        "backward_transfer": backward_transfer(A),
        "forward_transfer": forward_transfer(A, [_count(task["classes"]) for task in tasks] if A.before() else []),
        "pooled_accuracy": pooled_accuracy(cells) if pooled else None,
    }


def _count(classes: object) -> int:
    if not isinstance(classes, Sequence):
        raise TypeError(f"a task's classes must be a list of names, not {type(classes).__name__}")
    return len(classes)


def _at(A: Matrix, i: int, j: int) -> float | None:
    return A[i][j] if 0 <= i < len(A) and j < len(A[i]) else None


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _ratio(correct: float, total: int) -> float | None:
    return correct / total if total else None


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are measured; None if none is."""
    measured = [v for v in values if v is not None]
    return sum(measured) / len(measured) if measured else None
