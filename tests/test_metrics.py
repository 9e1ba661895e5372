"""The figures of continual learning against hand-made examples and a brute-force reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetune.numerics import metrics
from perpetune.numerics.metrics import (
    Cell,
    Rows,
    accuracies,
    average_accuracy,
    backward_transfer,
    final_accuracy,
    forgetting,
    forward_transfer,
    mean,
    over_time,
    per_class_accuracy,
    pooled_accuracy,
    summarise,
    task_forgetting,
)

EXAMPLE = [
    [0.9, 0.5, 0.2],
    [0.7, 0.8, 0.4],
    [0.8, 0.3, 1.0],
]
MAYBE = st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0])


def cell(correct: int, total: int, **per_class: list[int]) -> Cell:
    return {"correct": correct, "total": total, "per_class": per_class}


def test_worked_example() -> None:
    assert final_accuracy(EXAMPLE) == pytest.approx((0.8 + 0.3 + 1.0) / 3)
    assert average_accuracy(EXAMPLE) == pytest.approx((0.9 + (0.7 + 0.8) / 2 + (0.8 + 0.3 + 1.0) / 3) / 3)
    assert forgetting(EXAMPLE) == pytest.approx(((0.9 - 0.8) + (0.8 - 0.3)) / 2)
    assert backward_transfer(EXAMPLE) == pytest.approx(((0.8 - 0.9) + (0.3 - 0.8)) / 2)
    assert forward_transfer(EXAMPLE, [2, 2, 4]) == pytest.approx(((0.5 - 0.5) + (0.4 - 0.25)) / 2)


def test_backward_transfer_is_not_clipped_and_forgetting_may_be_negative() -> None:
    improved = [[0.5, None], [0.8, 0.9]]
    assert backward_transfer(improved) == pytest.approx(0.3)
    assert forgetting(improved) == pytest.approx(-0.3)


def test_forgetting_counts_from_the_best_moment_and_not_before_the_task_was_learned() -> None:
    matrix = [[0.5, 0.99, None], [0.9, 0.6, None], [0.7, 0.5, 0.8]]
    assert task_forgetting(matrix, 0) == pytest.approx(0.2)
    assert task_forgetting(matrix, 1) == pytest.approx(0.1)  # 0.99 came before task 1 was learned
    assert task_forgetting(matrix, 2) is None


@pytest.mark.parametrize("matrix", [[], [[]], [[None]], [[None, None], [None, None]]])
def test_nothing_measured_gives_none(matrix: list[list[float | None]]) -> None:
    for metric in (final_accuracy, average_accuracy, forgetting, backward_transfer):
        assert metric(matrix) is None
    assert forward_transfer(matrix, [2] * 3) is None


# TRACE's eight tasks in %: the final row of a public run of TreeLoRA (LLaMA-3.2-1B), and what stood there when each
# task was learned. That run's own diagonal is not known: these changes are made up to give its four figures.
FINAL = [30.00, 29.00, 23.99, 44.42, 52.00, 19.75, 44.00, 38.02]
CHANGE = [-20.0, -15.5, 2.0, -4.0, -20.0, 10.0, 0.0, 0.0]


def trace_run() -> list[list[float | None]]:
    rows: list[list[float | None]] = [[None] * 8 for _ in range(8)]
    for j, (now, change) in enumerate(zip(FINAL, CHANGE, strict=True)):
        rows[j][j] = now - change
    rows[7] = list(FINAL)
    return rows


def test_figures_of_trace() -> None:
    A = trace_run()
    assert final_accuracy(A) == pytest.approx(35.1475)  # OP_8
    assert backward_transfer(A) == pytest.approx(-47.5 / 7)  # the tables' -6.79
    assert backward_transfer(A, divisor="all") == pytest.approx(-47.5 / 8)  # -5.94
    assert backward_transfer(A, divisor="all", clipped=True) == pytest.approx(-59.5 / 8)  # -7.44
    assert backward_transfer(A, clipped=True) == pytest.approx(-59.5 / 7)


def test_overall_performance_is_the_mean_of_each_row() -> None:
    assert over_time(final_accuracy, EXAMPLE) == pytest.approx([0.9, (0.7 + 0.8) / 2, (0.8 + 0.3 + 1.0) / 3])


def test_backward_transfer_over_all_tasks_counts_the_last_as_unchanged() -> None:
    assert backward_transfer([[0.75]], divisor="all") == 0
    improved = [[0.5, None], [0.8, 0.9]]
    assert backward_transfer(improved, divisor="all") == pytest.approx(0.15)
    assert backward_transfer(improved, clipped=True) == 0
    assert backward_transfer([[0.5, None], [0.8, None]], divisor="all") == pytest.approx(0.3)  # the last: not measured
    assert backward_transfer([[None]], divisor="all") is None


def test_one_task() -> None:
    assert final_accuracy([[0.75]]) == average_accuracy([[0.75]]) == 0.75
    assert forgetting([[0.75]]) is backward_transfer([[0.75]]) is forward_transfer([[0.75]], [2]) is None


def test_forward_transfer_reads_the_task_that_comes_next_in_an_unfinished_run() -> None:
    assert forward_transfer([[0.9, 0.7, 0.1]], [2, 2, 2]) == pytest.approx(0.2)
    assert forward_transfer([[0.9, 0.7, 0.1]], [2, 0, 2]) is None


# Few distinct values, so that ties and equal maxima come up.
values = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))


@st.composite
def matrices(draw: st.DrawFn) -> list[list[float | None]]:
    columns = draw(st.integers(1, 6))
    rows = draw(st.integers(1, columns))
    return [draw(st.lists(values, min_size=columns, max_size=columns)) for _ in range(rows)]


def nanmean(numbers: list[float]) -> float:
    numbers = [x for x in numbers if not math.isnan(x)]
    return float(np.mean(numbers)) if numbers else math.nan


def brute_force(matrix: list[list[float | None]], classes: list[int]) -> list[float]:
    """The equations, written out over a dense array with NaN for what was not measured."""
    A = np.array([[math.nan if a is None else a for a in row] for row in matrix])
    T = len(A) - 1
    forgot = []
    for j in range(T):
        measured = [A[i, j] for i in range(j, T) if not math.isnan(A[i, j])]
        forgot.append(max(measured) - A[T, j] if measured else math.nan)
    return [
        nanmean([A[T, j] for j in range(T + 1)]),
        nanmean([nanmean([A[i, j] for j in range(i + 1)]) for i in range(T + 1)]),
        nanmean(forgot),
        nanmean([A[T, j] - A[j, j] for j in range(T)]),
        nanmean([A[j - 1, j] - 1 / classes[j] for j in range(1, A.shape[1]) if j <= T + 1]),
    ]


@given(matrices(), st.data())
def test_against_brute_force(matrix: list[list[float | None]], data: st.DataObject) -> None:
    classes = data.draw(st.lists(st.integers(1, 9), min_size=len(matrix[0]), max_size=len(matrix[0])))
    ours = [
        final_accuracy(matrix),
        average_accuracy(matrix),
        forgetting(matrix),
        backward_transfer(matrix),
        forward_transfer(matrix, classes),
    ]
    for value, expected in zip(ours, brute_force(matrix, classes), strict=True):
        assert (value is None) == math.isnan(expected)
        assert value is None or value == pytest.approx(expected, abs=1e-12)


@given(matrices())
def test_bounds_and_relations(matrix: list[list[float | None]]) -> None:
    final, average, forgot, backward = (
        m(matrix) for m in (final_accuracy, average_accuracy, forgetting, backward_transfer)
    )
    assert final is None or 0 <= final <= 1
    assert average is None or 0 <= average <= 1
    assert forgot is None or -1 <= forgot <= 1
    complete = all(a is not None for row in matrix for a in row)
    if complete and forgot is not None and backward is not None:
        assert forgot >= -backward - 1e-12  # the best moment is at least as good as the first


@given(matrices())
def test_variants_of_backward_transfer(matrix: list[list[float | None]]) -> None:
    plain, spread = backward_transfer(matrix), backward_transfer(matrix, divisor="all")
    clipped = backward_transfer(matrix, clipped=True)
    assert (plain is None) == (clipped is None)
    if plain is not None and clipped is not None and spread is not None:
        assert clipped <= min(plain, 0) + 1e-12
        assert abs(spread) <= abs(plain) + 1e-12
        if all(a is not None for row in matrix for a in row):
            assert spread == pytest.approx(plain * (len(matrix) - 1) / len(matrix))


@given(matrices())
def test_cells_of_tasks_not_learned_change_nothing_but_forward_transfer(matrix: list[list[float | None]]) -> None:
    lower = [row[: i + 1] for i, row in enumerate(matrix)]
    for metric in (final_accuracy, average_accuracy, forgetting, backward_transfer):
        assert metric(matrix) == metric(lower)


@given(matrices())
def test_over_time_is_the_metric_of_the_run_as_it_stood(matrix: list[list[float | None]]) -> None:
    assert over_time(forgetting, matrix) == [forgetting(matrix[: i + 1]) for i in range(len(matrix))]
    assert over_time(final_accuracy, matrix)[-1] == final_accuracy(matrix)


def test_pooled_weighs_tasks_by_their_size() -> None:
    cells = [[cell(1, 1), None], [cell(1, 2), cell(0, 8)]]
    assert pooled_accuracy(cells) == pytest.approx(1 / 10)
    assert final_accuracy(accuracies(cells)) == pytest.approx(1 / 4)
    assert pooled_accuracy([]) is None
    assert pooled_accuracy([[None]]) is None
    assert pooled_accuracy([[cell(0, 0)]]) is None


def test_scores_are_summed_as_right_answers_are() -> None:
    scored: Cell = {"correct": 37.42, "total": 100, "per_class": {"a": [1.5, 2]}, "score": "rouge_l"}
    assert accuracies([[scored, cell(1, 4)]]) == [[pytest.approx(0.3742), 0.25]]
    assert pooled_accuracy([[scored], [scored, cell(1, 4)]]) == pytest.approx(38.42 / 104)
    assert per_class_accuracy([[scored]]) == {"a": 0.75}
    assert summarise([[scored]], [{"classes": []}])["final_accuracy"] == pytest.approx(0.3742)


def test_per_class_sums_a_class_met_in_several_tasks() -> None:
    cells = [
        [cell(9, 9, cat=[9, 9]), cell(5, 5, cat=[5, 5])],
        [cell(3, 6, cat=[1, 4], dog=[2, 2]), cell(1, 2, cat=[1, 2], owl=[0, 0])],
    ]
    assert per_class_accuracy(cells) == {"cat": pytest.approx(2 / 6), "dog": 1.0, "owl": None}
    assert per_class_accuracy(cells[:1]) == {"cat": 1.0}  # the second task was not learned yet
    assert per_class_accuracy([]) == {}


def test_summarise() -> None:
    tasks = [{"classes": ["a", "b"]}, {"classes": ["c", "d"]}]
    cells = [[cell(8, 10), cell(6, 10)], [cell(6, 10), cell(10, 10)]]
    assert summarise(cells, tasks) == {
        "final_accuracy": pytest.approx(0.8),
        "average_accuracy": pytest.approx(0.8),
        "forgetting": pytest.approx(0.2),
        "backward_transfer": pytest.approx(-0.2),
        "forward_transfer": pytest.approx(0.1),
        "pooled_accuracy": pytest.approx(0.8),
    }
    assert set(summarise([], [])) == set(metrics.Metrics.__annotations__)
    assert all(value is None for value in summarise([], []).values())
    with pytest.raises(TypeError, match="list of names"):
        summarise(cells, [{"classes": 3}, {"classes": 3}])


@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(MAYBE, min_size=n, max_size=n), min_size=n, max_size=n)))
def test_rows_that_come_one_by_one_have_the_figures_of_all_at_once(A: list[list[float | None]]) -> None:
    """A cell of a task that was asked before it was learned has no column until then."""
    rows = Rows()
    for i in range(len(A)):
        for row, known in enumerate(A[:i]):
            if (value := known[i]) is not None:
                rows[row][i] = value
        rows.append({j: a for j, a in enumerate(A[i][: i + 1]) if a is not None})
        so_far = [row[: i + 1] for row in A[: i + 1]]
        for figure in (final_accuracy, average_accuracy, forgetting, backward_transfer):
            assert figure(rows) == figure(so_far)
        assert forward_transfer(rows, [2] * (i + 1)) == forward_transfer(so_far, [2] * (i + 1))
        assert forward_transfer(so_far, [2] * (i + 1)) == mean(
            a - 0.5 for j in range(1, i + 1) if (a := A[j - 1][j]) is not None
        )
