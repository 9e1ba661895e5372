"""The section about averages of pets: how much of the past each task's average has kept, and by which weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perpetune.report import form
from perpetune.report.blocks import Block, Brief, Column, Columns, Heading, Rows, Table, Text
from perpetune.report.results_schema import Results, as_number, as_text, facts_of
from perpetune.report.sections import reads

MEANING = (
    "In each step the average keeps a share of itself, the weight, and takes the rest from the pets as training leaves "
    "them (online). Kept is what the start of the task weighs in the average at its end: 0 means that the average has "
    "forgotten the start, 1 that it has not moved."
)
ANSWERS = "The section on ways to answer has the accuracy of average, online pets and both beside each other."
SOLVED = (
    "The head is solved for the features of what answers, so the other ways to answer are not shown: it does not fit "
    "them."
)
RANGE = (
    "In range is the share of steps and tensors in which the formula gave a weight between 0 and 1; elsewhere the "
    "weight was fixed."
)
PUBLISHED = (
    "The weight is LLaCA’s (arXiv:2410.10868), reconstructed. It depends on the scale of the loss, on the size of the "
    "tensors and on the learning rate, and it weighs one step although it acts in each."
)
END = "The average is one interpolation between the start and the end of the task (over: end)."
GAP = (
    "The gap says how far the averaged factors of LoRA are from an average of their products, as a share of the way "
    "that the average went."
)


@reads("average")
def section(results: Results) -> list[Block] | None:
    listed = [(task, facts) for task, _, facts in facts_of(results, "average")]
    if not listed:
        return None
    last = listed[-1][1]
    ranged = any(as_number(facts.get("in_range")) is not None for _, facts in listed)
    gaps = any(as_number(facts.get("gap")) is not None for _, facts in listed)
    columns: Columns = [Column("after", left=True), "steps", "mean weight", *(["in range, %"] if ranged else [])]
    columns = [*columns, "kept, %", *(["gap, %"] if gaps else [])]
    rows: Rows = [
        [
            f"{task + 1} {results['tasks'][task]['name']}",
            form.count(as_number(facts.get("steps"))),
            _number(facts.get("weight")),
            *([form.percent(as_number(facts.get("in_range")))] if ranged else []),
            form.percent(as_number(facts.get("kept"))),
            *([form.percent(as_number(facts.get("gap")))] if gaps else []),
        ]
        for task, facts in listed
    ]
    texts = [MEANING, *(text for text, said in _texts(last, ranged, gaps) if said)]
    return [
        Heading("Averages of the pets", "Averages"),
        Text(" ".join(texts)),
        Table(columns, rows, limit=30, noun="task"),
        Brief("average", told(last)),
    ]


def told(facts: Mapping[str, Any]) -> str:
    """`kept 50.0 % of the start, mean weight 0.98`."""
    kept = form.percent(as_number(facts.get("kept")))
    return f"kept {kept} % of the start, mean weight {_number(facts.get('weight'))}"


def _texts(facts: Mapping[str, Any], ranged: bool, gaps: bool) -> list[tuple[str, bool]]:
    rule = as_text(facts.get("rule"))
    compared = facts.get("compared") is True
    return [
        (END, rule == "end"),
        (PUBLISHED, rule == "dynamic"),
        (RANGE, ranged),
        (GAP, gaps),
        (ANSWERS if compared else SOLVED, compared or facts.get("solved") is True),
    ]


def _number(value: object) -> str:
    number = as_number(value)
    return form.ABSENT if number is None else form.number(number)
