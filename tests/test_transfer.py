"""Transfer, Avg and Last: golden values, and the rows that ZSCL published, from its own matrix."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from perpetune.numerics import metrics
from perpetune.numerics.transfer import average, kept, last, summarise, transfer

A = [[0.9, 0.5, 0.4], [0.8, 0.7, 0.3], [0.6, 0.65, 0.8]]
Z = [0.35, 0.55, 0.45]
MTIL = [24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2]  # CLIP ViT-B/16 before any task, order I
ORDER_II = [9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2]


def test_golden() -> None:  # G1
    assert transfer(A) == pytest.approx(0.425, abs=1e-12)
    assert average(A) == pytest.approx(5.65 / 9, abs=1e-12)
    assert last(A) == pytest.approx(2.05 / 3, abs=1e-12)
    changes = kept(A, Z)
    assert sum(changes) / len(changes) == pytest.approx(-0.25 / 3, abs=1e-12)
    assert min(changes) == pytest.approx(-0.15, abs=1e-12)
    assert metrics.average_accuracy(A) != pytest.approx(average(A)), "our figure counts learned tasks only"


def test_a_model_that_never_changes() -> None:
    rows = [MTIL] * 11
    found = [figure(rows) for figure in (transfer, average, last)]
    assert found == pytest.approx([69.39, 65.2909090909, 65.2909090909], abs=1e-9)
    other = [MTIL[i] for i in ORDER_II]
    assert transfer([other] * 11) == pytest.approx(65.35, abs=1e-9)


def test_the_rows_of_zscl() -> None:
    with open(Path(__file__).parent / "zscl_mtil_order_I.csv", newline="") as file:
        rows = [[float(cell) for cell in row] for row in csv.reader(file)]
    assert (len(rows), {len(row) for row in rows}) == (11, {11})
    found = [figure(rows) for figure in (transfer, average, last)]
    assert found == pytest.approx([68.14, 75.39, 83.62], abs=0.05)


def test_what_is_not_measured_is_left_out() -> None:
    holes = [[0.9, None, 0.4], [0.8, 0.7, 0.3], [None, 0.65, 0.8]]
    assert transfer(holes) == pytest.approx(0.35, abs=1e-12), "the column of task 1 has no cell before it"
    assert average(holes) == pytest.approx(4.55 / 7, abs=1e-12), "and no zero is counted"
    assert last(holes) == pytest.approx(1.45 / 2, abs=1e-12)
    assert kept(holes, [0.35, 0.55, None]) == []
    assert [figure([]) for figure in (transfer, average, last)] == [None] * 3
    assert transfer([[0.9]]) is None


def test_the_summary_says_what_staying_would_give() -> None:
    def cell(share: float) -> metrics.Cell:
        return {"correct": round(share * 100), "total": 100, "per_class": {}}

    found = summarise([[cell(a) for a in row] for row in A], [[cell(z) for z in Z]])
    assert found["transfer"] == pytest.approx(0.425)
    assert found["before"] == pytest.approx({"transfer": 0.5, "average": 0.45, "last": 0.45})
    assert (found["kept_mean"], found["kept_worst"]) == pytest.approx((-0.25 / 3, -0.15))
