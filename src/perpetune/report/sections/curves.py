"""The section with the curves of accuracy (or score) and forgetting over the run."""

from __future__ import annotations

from dataclasses import dataclass

from perpetune.numerics.metrics import accuracies, final_accuracy, forgetting, over_time, whole_rows
from perpetune.report.blocks import READABLE, Block, Chart, Heading, Legend, Only, Pair, Panel, Text
from perpetune.report.document import left_out, measure
from perpetune.report.palette import AGES, LIGHT_LINES
from perpetune.report.results_schema import Results
from perpetune.report.svg import Line

MEAN = "mean over the tasks seen, after each task, in %"
LOST = "mean loss per task since its best value, in points"


@dataclass(frozen=True)
class Curves:
    """Figures after each learned task. `tasks[j]` has the accuracy of task j after each task, None before it was
    learned."""

    accuracy: list[float | None]
    forgetting: list[float | None]
    tasks: list[list[float | None]]


def section(results: Results) -> list[Block]:
    heading = Heading("Curves")
    if len(results["cells"]) < 2:
        return [heading, Only("page", [Text("Curves begin with the second task.")])]
    shown, names, what = curves(results), [task["name"] for task in results["tasks"]], measure(results)
    weight = "thin" if len(names) <= READABLE else "many"
    lines = [Line(names[j], v, f"{line_style(j, len(names))} {weight}") for j, v in enumerate(shown.tasks)]
    mean = Line("mean over tasks seen", shown.accuracy, "strong")
    lost = Line("forgetting", shown.forgetting, "strong")
    mean_chart = Chart([mean], f"Mean {what} on the tasks seen, after each task")
    lost_chart = Chart([lost], "Mean forgetting after each task", top=0.1)
    each = Chart(lines, f"{what.capitalize()} of each task over the run", wide=True)
    if len(names) <= len(LIGHT_LINES):
        legend = Legend([(line_style(j, len(names)), name) for j, name in enumerate(names[: len(shown.tasks)])])
    else:
        legend = Legend([(f"age a{i}", "") for i in range(AGES)], ("first task", "last task"))
    return [
        heading,
        Pair([Panel([mean_chart], what.capitalize(), MEAN), Panel([lost_chart], "Forgetting", LOST)]),
        Panel([each, legend], "Each task", f"{what} from the moment a task is learned, in %"),
    ]


def curves(results: Results) -> Curves:
    A = accuracies(results["cells"])
    tasks = [[row[j] if i >= j and j < len(row) else None for i, row in enumerate(A)] for j in range(len(A))]
    whole = whole_rows(A, left_out(results))
    return Curves(over_time(final_accuracy, whole), over_time(forgetting, A), tasks)


def line_style(j: int, n: int) -> str:
    """The style of line `j` of `n`: few lines differ in hue, many lines are coloured by age."""
    return f"l{j}" if n <= len(LIGHT_LINES) else f"a{round(j * (AGES - 1) / (n - 1))}"
