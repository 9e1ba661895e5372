"""The section about a pool's members: which of them acted on which task's test data, and what the right one would give.

The facts come from states of any age: what is missing or of another form than expected is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perpetune.report import form
from perpetune.report.blocks import (
    Block,
    Brief,
    Column,
    Columns,
    Heading,
    Heat,
    HeatCell,
    HeatRow,
    Rows,
    Table,
    Text,
)
from perpetune.report.document import measure
from perpetune.report.palette import heat_level
from perpetune.report.results_schema import Results, as_count, as_list, as_texts, facts_of
from perpetune.report.sections import reads

MEANING = (
    "For each example a selector chooses the members that act on it; it does not know the task. The table has the "
    "share of each task’s test data (rows) on which each member (columns) acted, in %, after the last task."
)
RIGHT = " Each task has a member of its own, so the right one is known for the test data of a task."
TOLD = (
    "“Right member” is the share of test data for which the right member was chosen. “If the task were known” is the "
    "accuracy with the right member for all of them: a bound, because nobody tells the method the task."
)
USE = (
    "For how many training examples each member was chosen, over all tasks. A member that is never chosen learns "
    "nothing."
)


@dataclass(frozen=True)
class RightRow:
    """Shares in [0, 1] after one task, the mean over the tasks so far; None where it is not known."""

    number: int
    task: str
    right: float | None
    answer: float | None
    told: float | None


@reads("pool")
def section(results: Results) -> list[Block] | None:
    rows = right_rows(results)
    heat, use = _heat(results), _use(results)
    if heat is None and use is None:
        return None
    blocks: list[Block] = [Heading("Members of the pool", "Members")]
    if heat is not None:
        blocks += [Text(MEANING + (RIGHT if rows else "")), heat]
    if rows:
        what = measure(results)
        told = any(row.told is not None for row in rows)
        columns: Columns = [Column("after", left=True), "right member, %", Column(f"{what}, %")]
        columns += [Column(f"{what} if the task were known, %")] if told else []
        texts: Rows = [
            [
                f"{row.number} {row.task}",
                *map(form.percent, (row.right, row.answer, *([row.told] if told else []))),
            ]
            for row in rows
        ]
        blocks += [Text(TOLD if told else TOLD.partition(" “If")[0]), Table(columns, texts, limit=30, noun="task")]
        last = rows[-1]
        bound = f", {form.percent(last.told)} % {what} if the task were known" if last.told is not None else ""
        blocks.append(Brief("members", f"right member for {form.percent(last.right)} % of the test data{bound}"))
    if use is not None:
        blocks += [Text(USE), use]
        used = [row for row in use.rows if row[1] != "0"]
        blocks.append(Brief("members", f"{len(used)} of {len(use.rows)} were ever chosen"))
    return blocks


def right_rows(results: Mapping[str, Any]) -> list[RightRow]:
    """One row after each task; empty if members do not belong to tasks, or a task was learned under a member's name."""
    names = [task["name"] for task in results["tasks"]]
    rows = []
    for i, row in enumerate(results["cells"]):
        cells = [(names[j], cell) for j, cell in enumerate(row[: i + 1]) if cell and cell.get("members")]
        if not cells or not any(owner(member) & set(names) for _, cell in cells for member in cell["members"]):
            continue
        right = [sum(n for m, n in c["members"].items() if name in owner(m)) / c["total"] for name, c in cells]
        told = [c["told"] / c["total"] for _, c in cells if c.get("told") is not None]
        answer = _mean([c["correct"] / c["total"] for _, c in cells])
        whole = len(told) == len(cells)
        rows.append(RightRow(i + 1, names[i], _mean(right), answer, _mean(told) if whole else None))
    return rows


def owner(member: str) -> set[str]:
    """The tasks to which a member belongs, by its name."""
    return {member, *member.split(" + ")}


def _heat(results: Results) -> Heat | None:
    """The share of each task's test data on which each member acted, after the last task."""
    if not results["cells"]:
        return None
    cells = results["cells"][-1]
    listed = [(i, cell) for i, cell in enumerate(cells) if cell and cell.get("members")]
    members = _members(results) or list(dict.fromkeys(name for _, cell in listed for name in cell["members"]))
    if not listed or len(members) < 2:
        return None
    rows = []
    for i, cell in listed:
        name, counts = results["tasks"][i]["name"], cell["members"]
        whole = sum(counts.values())
        shares = [counts.get(member, 0) / whole for member in members]
        rows.append(
            HeatRow(
                str(i + 1),
                name,
                [
                    HeatCell(
                        form.percent(share, 0),
                        heat_level(share),
                        "learned" if name in owner(member) else "kept",
                        f"{form.percent(share)} % of {name} by {member}",
                        share,
                    )
                    for member, share in zip(members, shares, strict=True)
                ],
            )
        )
    return Heat("How often each member acted on each task", "test data of", members, rows, scale=("never", "always"))


def _members(results: Results) -> list[str]:
    """The names of all members, of which some may never have acted.

    Where each task has its own, the facts after a task name these alone, and how many there are then. Facts of older
    versions name all, and so do those of a pool that all tasks share.
    """
    found = [(task, facts) for task, _, facts in facts_of(results) if "members" in facts]
    if not found or "count" not in found[-1][1]:
        return as_texts(found[-1][1]["members"]) if found else []
    names: dict[str, None] = {}
    forgot = sorted(results.get("forgot", []), key=lambda entry: entry["task"])
    for task, facts in found:
        while forgot and forgot[0]["task"] < task:
            names = {name: None for name in names if owner(name).isdisjoint(forgot[0]["tasks"])}
            forgot = forgot[1:]
        names |= dict.fromkeys(as_texts(facts["members"]))
    gone = {name for entry in forgot for name in entry["tasks"]}
    return [name for name in names if owner(name).isdisjoint(gone)]


def _use(results: Results) -> Table | None:
    """How often each member that all tasks share was trained."""
    last = next((facts for _, _, facts in reversed(list(facts_of(results))) if facts.get("use") is not None), None)
    if last is None:
        return None
    counts = [count for count in map(as_count, as_list(last.get("use"))) if count is not None]
    whole = sum(counts)
    if not whole:
        return None
    rows: Rows = [[str(number), form.count(count), form.percent(count / whole)] for number, count in enumerate(counts)]
    return Table([Column("member", left=True), "chosen", "share, %"], rows, limit=30, noun="member")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
