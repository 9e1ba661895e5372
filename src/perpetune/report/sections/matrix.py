"""The section with the matrix of accuracies or scores: how each task's figure changed with each later task."""

from __future__ import annotations

from perpetune.numerics.metrics import accuracies, final_accuracy, whole_rows
from perpetune.report import form
from perpetune.report.blocks import ROOMY, Block, Brief, Column, Heading, Heat, HeatCell, HeatRow, Only, Panel, Text
from perpetune.report.document import left_out, measure, scores
from perpetune.report.palette import heat_level
from perpetune.report.results_schema import Results

SKIPPED = "–"  # in the place of a task that was not asked


def section(results: Results) -> list[Block]:
    what, table = measure(results).capitalize(), heat(results)
    note = (
        f"{what} in % on each task’s test data (columns), after each task was learned (rows). On the diagonal a task "
        "was just learned. Read down a column to see how later tasks changed it."
    )
    partly = asked(results)
    return [
        Heading(f"{what} matrix"),
        Text(" ".join(part for part in (note, measured(results), partly) if part)),
        Panel([table]),
        Only("terminal", [table]),
        *([Brief("asked", partly, when="end", warning=True)] if partly else []),
    ]


def asked(results: Results) -> str:
    """What of earlier tasks' test data was not asked (`evaluate.earlier`); empty if all was."""
    parts = []
    if some := [cell for row in results["cells"] for cell in row if cell and "of" in cell]:
        of = f"{form.count(sum(c['total'] for c in some))} of {form.count(sum(c['of'] for c in some))}"
        parts.append(
            f"{form.plural(len(some), 'cell')} with ~ {'is' if len(some) == 1 else 'are'} of a sample of the test data "
            f"({of} answers), and so are the means over them."
        )
    if waiting := results.get("in_turn"):
        most = form.plural(max(entry["count"] for entry in waiting), "task")
        parts.append(
            f"After {form.plural(len(waiting), 'task')} not all earlier ones were asked, but those that were asked the "
            f"longest time ago (up to {most} had to wait). Means are over the tasks that were asked."
        )
    if rows := left_out(results):
        parts.append(
            f"After {form.plural(len(rows), 'task')} earlier ones were not asked ({SKIPPED}), so their means are not "
            "known."
        )
    return " ".join(parts)


def heat(results: Results) -> Heat:
    names = [task["name"] for task in results["tasks"]]
    A = accuracies(results["cells"])
    whole = whole_rows(A, left_out(results))
    skipped = {(entry["task"], name) for entry in results.get("not_asked", []) for name in entry["of"]}
    digits = 1 if len(names) <= ROOMY else 0
    rows = []
    for i, row in enumerate(A):
        cells = [
            HeatCell(SKIPPED, 0, "ahead", f"{name} was not asked after {names[i]}")
            if (i, name) in skipped
            else _cell(results, A, i, j, digits)
            if j < len(row)
            else None
            for j, name in enumerate(names)
        ]
        mean = final_accuracy(whole[: i + 1])
        rows.append(HeatRow(str(i + 1), names[i], cells, form.percent(mean, digits), value=mean))
    change = [form.points(_since_learned(A, j), digits) for j in range(len(A) - 1)]
    what = measure(results).capitalize()
    return Heat(
        label=f"{what} matrix",
        corner="after",
        names=names,
        rows=rows,
        mean=Column("mean"),
        foot=("since learned", change) if change else None,
        scale=("0 %", "100 %"),
        overview=f"{what} matrix: a row after each task, a column per task",
    )


def measured(results: Results) -> str:
    """A sentence about the scores, if answers are not just right or wrong: `The score is rouge_l for a, b; …`."""
    by_score: dict[str, list[str]] = {}
    for task, score in zip(results["tasks"], scores(results), strict=True):
        by_score.setdefault(score, []).append(task["name"])
    if list(by_score) in ([], [""]):
        return ""
    if len(by_score) == 1:
        return f"The score is {next(iter(by_score))}, from 0 to 100, mean over the examples."
    other = by_score.pop("", [])
    parts = [f"{score} for {form.several(names, 6)}" for score, names in by_score.items()]
    parts += [f"the share of right answers for {form.several(other, 6)}"] if other else []
    return f"The score is {'; '.join(parts)}; from 0 to 100, mean over the examples."


def _cell(results: Results, A: list[list[float | None]], i: int, j: int, digits: int) -> HeatCell | None:
    value, counts = A[i][j], results["cells"][i][j]
    if value is None or counts is None:
        return None
    names = [task["name"] for task in results["tasks"]]
    counted = f"{form.right(counts['correct'])} of {form.count(counts['total'])} {counts.get('score', 'right')}"
    title = f"{names[j]} after {names[i]}: {counted}"
    before = A[i - 1][j] if i > j and j < len(A[i - 1]) else None
    change = None if before is None else value - before
    if change is not None:
        title += f", {form.points(change)} points since {names[i - 1]}"
    kind = "learned" if i == j else "ahead" if j > i else "kept"
    text = form.percent(value, digits)
    shown: float | None = value
    if "of" in counts:
        title += f"; a sample of {form.count(counts['of'])}"
        text, shown = f"~{text}", None  # the terminal shows the text of a cell without a value
    return HeatCell(text, heat_level(value), kind, title, shown, change)  # type: ignore[arg-type]


def _since_learned(A: list[list[float | None]], j: int) -> float | None:
    first = A[j][j] if j < len(A[j]) else None
    now = A[-1][j] if j < len(A[-1]) else None
    return None if first is None or now is None else now - first
