"""False recognition: whether the newest classes draw pictures of others, and names that are not there get a yes."""

from __future__ import annotations

from perpetune.report import form
from perpetune.report.blocks import Block, Brief, Column, Columns, Heading, Panel, Rows, Table, Text
from perpetune.report.results_schema import Results
from perpetune.report.sections.retrieval import shown, when

MEANING = (
    "Shares in %. Yes means that a picture and a name are nearer than a threshold, which is set once, before the first "
    "task, where missed and false yes are equally frequent. Missed yes: the true name is below it. False yes: a name "
    "that is not in the picture reaches it: a random other one, the one nearest to the true name, one that was "
    "learned, or one of those with the most training examples. Attraction: pictures of other classes that are answered "
    "with a learned class. The gap is the distance between the mean picture and the mean text, from 0 to 2; if it "
    "changes, the pretrained space has changed."
)
SHARES = {
    "attraction": "attraction",
    "missed_yes": "missed yes",
    "false_yes_random": "false yes, random name",
    "false_yes_near": "false yes, nearest name",
    "false_yes_learned": "false yes, learned name",
    "false_yes_frequent": "false yes, name with the most examples",
}
NUMBERS = {"gap": "gap", "pair_cosine": "cosine of true pairs"}
TASKS = "Attraction of each task: the share, in %, of test images of other tasks that are answered with its classes."


def section(results: Results) -> list[Block] | None:
    rounds = results.get("exams", [])
    table: Rows = []
    for exam in dict.fromkeys(exam for entry in rounds for exam in entry["of"]):
        for names, show in ((SHARES, shown), (NUMBERS, _number)):
            for key, label in names.items():
                values = [entry["of"].get(exam, {}).get(key) for entry in rounds]
                if any(value is not None for value in values):
                    table.append([exam, label, *(show(value) for value in values)])
    drawn = attractions(results)
    if not table and not drawn:
        return None
    blocks: list[Block] = [Heading("False recognition"), Text(MEANING)]
    if table:
        columns: Columns = [Column("exam", left=True), Column("measure", left=True)]
        columns += [when(results, entry) for entry in rounds]
        blocks.append(Table(columns, table, limit=30, noun="row", wrap=True))
    if drawn:
        headings: Columns = [Column("task", left=True), "before it", "after it", "change, points"]
        lines: Rows = [
            [name, form.percent(then), form.percent(now), form.points(None if then is None else now - then)]
            for name, then, now in drawn
        ]
        name, then, now = drawn[-1]
        before = "" if then is None else f", {form.percent(then)} % before it"
        blocks.append(Panel([Text(TASKS), Table(headings, lines, limit=30, noun="task")], "Attraction"))
        blocks.append(Brief("attraction", f"{name} draws {form.percent(now)} % of the images of other tasks{before}"))
    return blocks


def attractions(results: Results) -> list[tuple[str, float | None, float]]:
    """For each task its name and the share of other tasks' test images that are answered with its classes: before the
    task was learned (None if it is not known), and after it. Empty where this was not counted."""
    names = [task["name"] for task in results["tasks"]]
    before = next((entry["of"] for entry in results.get("unlearned", []) if entry["task"] is None), {})
    ahead = {entry["task"]: entry["of"] for entry in results.get("unlearned", [])}
    rounds = [dict(before)]
    for number, row in enumerate(results["cells"]):
        rounds.append({**ahead.get(number, {}), **dict(zip(names, row, strict=False))})
    found = []
    for number, name in enumerate(names[: len(results["cells"])]):
        then, now = (_drawn(rounds[i], name) for i in (number, number + 1))
        if now is not None:
            found.append((name, then, now))
    return found


def _drawn(cells: object, name: str) -> float | None:
    assert isinstance(cells, dict)
    others = [cell for task, cell in cells.items() if task != name and cell and "goes_to" in cell]
    total = sum(cell["total"] for cell in others)
    return sum(cell["goes_to"].get(name, 0) for cell in others) / total if total else None


def _number(value: float | None) -> str:
    return form.ABSENT if value is None else form.thousandths(value)
