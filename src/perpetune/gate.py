"""The gate: may what an update has learned become the state?

What the model knew before is asked twice: of the state as it is, just before the update, and of what was learned, with
the same test examples. A figure fails where it falls by more than the bar, and where the fall is more than chance:
the exact sign test on the examples whose answer changed, at `LEVEL` for all earlier tasks together, and at `LEVEL` for
the single figures (Holm). So one image of twenty, which is five points, is no reason to refuse an update, and four of
four are too few to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from perpetune.numerics.paired import fall_test, holm, sign_test
from perpetune.numerics.text_scores import SCORES
from perpetune.tally import Asked

LEVEL = 0.05
"""How often, at most, an update that loses nothing may fail by chance: in one figure, and in all tasks together."""
TOGETHER = "all earlier tasks"
BETTER = frozenset({*SCORES, "accuracy", "precision", "recall", "f1", "retrieval", "foils"})
"""Names of an exam's figures of which more is better; with those that end in `_r1`, `_r5` and `_r10`."""

Figures = Mapping[str, Mapping[str, float]]
"""The numbers of exams, by exam and by name."""


def judge(
    max_drop: float,
    before: Mapping[str, Asked],
    after: Mapping[str, Asked],
    exams_before: Figures,
    exams_after: Figures,
    questions: Mapping[str, int],
) -> dict[str, Any]:
    """What the gate says, in JSON's types.

    Args:
        max_drop: the bar, in points.
        before, after: what came of asking the earlier tasks, by name, with `How.each`.
        exams_before, exams_after: the numbers of the exams.
        questions: how many questions each exam has.

    Returns:
        `accepted`; `max_drop`; `reason`, why it cannot judge, if it cannot; `needs`, the smallest bar that accepts, if
        there is one; and `rows`, one for each figure: `of` (`task`, `exam` or `tasks`, which is all of them together),
        `name`, `examples`, `before` and `after` in [0, 1], `drop` in points, `lost` and `gained` (how many answers are
        worth less and more, if that is known), `chance` of such a fall, `enough` (whether so few examples can tell
        anything), `falls` (whether the fall is more than chance) and `fails`.
    """
    rows = [*_of_tasks(before, after), *_of_exams(exams_before, exams_after, questions)]
    single = [row for row in rows if row["of"] != "tasks"]
    found = iter(holm([row["chance"] for row in single], LEVEL))
    for row in rows:
        falls = row["chance"] <= LEVEL if row["of"] == "tasks" else next(found)
        row["enough"] = 0.5 ** row["examples"] <= (LEVEL if row["of"] == "tasks" else LEVEL / len(single))
        row["falls"] = falls and row["drop"] > 0
        row["fails"] = row["falls"] and row["drop"] > max_drop
    reason, needs = "", None
    if not rows:
        reason = "no earlier task has test data that are still there, and no exam has a figure to compare"
    elif not any(row["enough"] for row in rows):
        most = max(row["examples"] for row in rows)
        reason = f"the earlier tasks have {most} test example{'s' * (most != 1)}, which are too few to tell anything"
    elif any(row["fails"] for row in rows):
        needs = max(math.ceil(round(row["drop"] * 100, 6)) / 100 for row in rows if row["falls"])
    accepted = not reason and needs is None
    return {"accepted": accepted, "max_drop": max_drop, "reason": reason, "needs": needs, "rows": rows}


def refusal(name: str, gate: Mapping[str, Any]) -> str:
    """One line on an update that was refused: why, and what would pass."""
    cure = "without --max-drop the update is learned all the same"
    if gate["reason"]:
        return f"task {name} is refused, because the gate cannot judge it: {gate['reason']}; {cure}"
    failed = [row for row in gate["rows"] if row["fails"]]
    worst = max(failed, key=lambda row: row["drop"])
    others = f", and {len(failed) - 1} more figure{'s' * (len(failed) != 2)} fall{'s' * (len(failed) == 2)}"
    return (
        f"task {name} is refused, and the state is as it was: {worst['name']} falls by {worst['drop']:.1f} points to "
        f"{100 * worst['after']:.1f} %, more than --max-drop {gate['max_drop']:g}{others if len(failed) > 1 else ''}; "
        f"--max-drop {gate['needs']:g} would pass"
    )


def unsure(name: str, gate: Mapping[str, Any]) -> str:
    """A line about earlier tasks that have too few test examples to be judged; empty if all have enough."""
    few = [f"{row['name']} ({row['examples']})" for row in gate["rows"] if not row["enough"]]
    return f"task {name}: too few test examples for the gate to see a fall: {', '.join(few)}" if few else ""


def _of_tasks(before: Mapping[str, Asked], after: Mapping[str, Asked]) -> Iterable[dict[str, Any]]:
    rows, pairs = [], []
    for name, then in before.items():
        now = after.get(name)
        if now is None or not then.cell or not now.cell:
            continue
        if then.right is None or now.right is None:
            old, new = (cell["correct"] / cell["total"] for cell in (then.cell, now.cell))
            rows.append(_row("task", name, min(then.cell["total"], now.cell["total"]), old, new))
            continue
        both = ~(then.right.isnan() | now.right.isnan())
        if not bool(both.any()):
            continue
        pairs.append((then.right[both], now.right[both]))
        rows.append(_paired("task", name, *pairs[-1]))
    if len(pairs) > 1:
        old_all, new_all = (torch.cat(side) for side in zip(*pairs, strict=True))
        rows.append(_paired("tasks", TOGETHER, old_all, new_all))
    return rows


def _paired(of: str, name: str, before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    lost, gained = int((after < before).sum()), int((after > before).sum())
    old, new = float(before.mean()), float(after.mean())
    return _row(of, name, len(before), old, new, lost, gained)


def _of_exams(before: Figures, after: Figures, questions: Mapping[str, int]) -> Sequence[dict[str, Any]]:
    return [
        _row("exam", f"{exam} {name}", questions[exam], value, after[exam][name])
        for exam, values in before.items()
        for name, value in values.items()
        if (name in BETTER or name.endswith(("_r1", "_r5", "_r10"))) and name in after.get(exam, {})
    ]


def _row(
    of: str, name: str, examples: int, before: float, after: float, lost: int | None = None, gained: int | None = None
) -> dict[str, Any]:
    paired = lost is not None and gained is not None
    chance = sign_test(lost, gained) if lost is not None and gained is not None else fall_test(before, after, examples)
    row = {"of": of, "name": name, "examples": examples, "before": round(before, 6), "after": round(after, 6)}
    row |= {"drop": round(100 * (before - after), 4), "chance": chance}
    return row | ({"lost": lost, "gained": gained} if paired else {})
