"""The figures in a terminal, with rich: the accuracy matrix with what changed, and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from perpetune.numerics.metrics import accuracies, final_accuracy
from perpetune.report import answers, drift, form, headroom, protected, solved, tables, tree, view

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from perpetune.report.results_schema import Results

VISIBLE_CHANGE = 0.005  # smaller ones do not show at two digits
GAP = "…"
ROWS = 24
NAME = 16  # longer names of tasks are cut
COMPARED = {  # columns of a comparison and their headings, in order
    "final_accuracy": "final",
    "average_accuracy": "average",
    "forgetting": "forgetting",
    "backward_transfer": "backward",
    "forward_transfer": "forward",
    "moved": "moved",
    "room": "room",
    "drift": "drift",
    "pooled_accuracy": "pooled",
    "stored": "stored",
    "learning": "learning",
}
# Those that go where the width does not hold all, the first one first.
SPARE = (
    *("pooled_accuracy", "forward_transfer", "stored", "backward_transfer"),
    *("learning", "drift", "room", "moved", "average_accuracy"),
)
SENTENCES = 8  # more of them are left to the page


def matrix_table(results: Mapping[str, Any], width: int = 100) -> Table:
    """The accuracy matrix, each cell with its change since the row before: `.87 ▼.11`.

    Where the columns do not fit into `width` characters the changes go first, then columns in the
    middle; rows in the middle go where there are more than a screen holds. What is left out shows as `…`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    A, names = accuracies(results["cells"]), [task["name"] for task in results["tasks"]]
    longest = min(max(map(len, names), default=0), NAME)
    room = width - longest - len(str(len(names))) - 9  # beside the row's number and name, the mean and the edges
    wide, narrow = max(len(".87 ▼.11"), longest) + 2, max(len(".87"), len(str(len(names)))) + 2
    changes = wide * len(names) <= room
    columns = _elided(len(names), max(3, room // narrow)) if not changes else list(range(len(names)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="dim")
    table.add_column(Text("after"), no_wrap=True, overflow="ellipsis", max_width=NAME + 5)
    table.add_column("mean", justify="right", no_wrap=True)
    for j in columns:
        heading = GAP if j is None else names[j] if changes else str(j + 1)
        table.add_column(Text(heading), no_wrap=True, overflow="ellipsis", max_width=NAME)
    for i in _elided(len(A), ROWS):
        if i is None:
            table.add_row(*([GAP] * (len(columns) + 2)))
            continue
        cells = [Text(GAP, "dim") if j is None else cell_text(A, i, j, changes) for j in columns]
        table.add_row(Text(f"{i + 1} {names[i]}"), Text(share(final_accuracy(A[: i + 1])), "bold"), *cells)
    return table


def row_line(results: Mapping[str, Any]) -> Text:
    """The last row alone, for the live view: `after 3 task-3: mean .81 | task-1 .87 ▼.11 | …`."""
    from rich.text import Text

    A, names = accuracies(results["cells"]), [task["name"] for task in results["tasks"]]
    last = len(A) - 1
    if last < 0:
        return Text("no task is learned yet", "dim")
    line = Text.assemble(f"after {last + 1} {names[last]}: mean ", (share(final_accuracy(A)), "bold"))
    for j in range(last + 1):
        line.append(f"  {names[j]} ", "dim").append_text(cell_text(A, last, j, changes=True))
    return line


def short_line(results: Mapping[str, Any]) -> Text:
    """The last row without its cells, for one of several runs: `after 3 task-3: mean .81  moved 0.8 % …`."""
    from rich.text import Text

    A, entry = accuracies(results["cells"]), protected.last(results)
    name = results["tasks"][len(A) - 1]["name"]
    line = Text.assemble(f"after {len(A)} {name}: mean ", (share(final_accuracy(A)), "bold"))
    if entry is not None:
        line.append(f"  {protected.told_shortly(entry, results)}", "dim")
    return line


def protection_line(results: Mapping[str, Any]) -> Text | None:
    """How far the last task has moved old outputs, and the room left; None without protection."""
    from rich.text import Text

    entry = protected.last(results)
    return Text(f"  protect: {protected.told(entry, results)}", "dim") if entry else None


def detail_lines(results: Mapping[str, Any], heads: bool = True) -> list[Text]:
    """What else the run has to tell after its last task: ways to answer and gauges, heads, tree of tasks, protection,
    drift."""
    from rich.text import Text

    run = cast("Results", results)
    told = [*([f"answers: {ways}"] if (ways := answers.told(run)) else []), *answers.gauges_told(run)]
    told += [f"head {line}" for line in solved.told(run)] if heads else []
    told += [f"tree: {line}"] if (line := tree.told(run)) else []
    lines, protection = [Text(f"  {line}", "dim") for line in told], protection_line(results)
    lines += [protection] if protection is not None else []
    return [*lines, *([Text(f"  drift: {moved}", "dim")] if (moved := drift.told(run)) else [])]


def effects_text(comparison: Mapping[str, Any]) -> Text:
    """What each setting changes, a line for each."""
    from rich.text import Text

    lines = view.effect_lines(comparison["effects"], comparison["measure"])
    more = len(lines) - SENTENCES
    return Text(
        "\n".join([*lines[:SENTENCES], *([f"… and {more} more changes: see --out, --json"] if more > 0 else [])])
    )


def headroom_table(one: headroom.Headroom) -> Table:
    """The parts of a headroom and what each recovers of it; what counts as a part is bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="dim")
    table.add_column("headroom", overflow="fold")
    table.add_column("run", overflow="fold")
    table.add_column("head", overflow="fold")
    for heading in ("n", "final", "recovered", "of what taps leave"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in one["rows"]:
        about = (Text(row["role"], "bold" if row["counts"] else ""), Text(row["label"]), Text(row["details"]))
        table.add_row(*about, str(len(row["seeds"])), *headroom.texts(row))
    return table


def figures_line(results: Mapping[str, Any]) -> Text:
    """The headline figures on one line; those that are not defined are left out."""
    from rich.text import Text

    line = Text()
    for key, label, _, signed in view.figures(tables.measure(results)):
        value = results["metrics"][key]
        if value is not None:
            text = f"{view.figure(value, signed)} {view.unit(key)}"
            line.append("   " if line else "").append(label.lower() + " ", "dim").append(text, "bold")
    return line


def compare_table(comparison: Mapping[str, Any], width: int = 100) -> Table:
    """One line for each recipe, mean ± standard deviation; the best of each column is bold.

    Where the columns do not fit into `width` characters some go; the line below the table names them.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    rows, best = comparison["rows"], comparison["best"]
    texts = [
        view.comparison_cells(row)
        | {"stored": form.size(row["stored_bytes"]["mean"]), "learning": form.duration(row["learn_seconds"]["mean"])}
        for row in rows
    ]
    shown = [key for key in COMPARED if any(cells[key] != form.ABSENT for cells in texts)]
    wide = {key: 2 + max(len(text) for text in (COMPARED[key], *(cells[key] for cells in texts))) for key in shown}
    counts = [str(len(row["runs"])) for row in rows]
    label = min(max(cell_len(row["label"]) for row in rows), max(20, width * 2 // 5))  # longer ones are folded
    room = width - label - max(map(len, counts)) - 4  # and the edges
    left_out = []
    for key in SPARE:
        if key in shown and sum(wide[k] for k in shown) > room:
            shown.remove(key)
            left_out.append(COMPARED[key])
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="dim", caption_justify="left"
    )
    notes = ["moved: old outputs at the worst site, %; room: directions still free, %"] if "moved" in shown else []
    notes += ["drift: how far features of earlier tasks moved, 0 to 2"] if "drift" in shown else []
    notes += ["too narrow for: " + ", ".join(left_out)] if left_out else []
    if notes:
        table.caption = Text("\n".join(notes), "dim")
    table.add_column("run", overflow="fold")
    for heading in ("n", *(COMPARED[key] for key in shown)):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, (row, n, cells) in enumerate(zip(rows, counts, texts, strict=True)):
        styled = [Text(cells[key], "bold" if i in best.get(key, []) else "") for key in shown]
        table.add_row(Text(row["label"]), n, *styled)
    return table


def share(value: float | None) -> str:
    """A share in two digits without the zero: `.87`, `1.0`."""
    if value is None:
        return form.ABSENT
    return "1.0" if value >= 0.995 else f"{value:.2f}"[1:]


def cell_text(A: Sequence[Sequence[float | None]], i: int, j: int, changes: bool) -> Text:
    """Cell (i, j) of the matrix and, with `changes`, what changed since the row before."""
    from rich.text import Text

    value = A[i][j] if j < len(A[i]) else None
    if value is None:
        return Text("")
    text = Text(share(value), "bold" if i == j else "dim italic" if j > i else "")
    before = A[i - 1][j] if i > j and j < len(A[i - 1]) else None
    if changes and before is not None and abs(value - before) >= VISIBLE_CHANGE:
        up = value > before
        text.append(f" {'▲' if up else '▼'}{share(abs(value - before))}", "green" if up else "red")
    return text


def _elided(n: int, limit: int) -> list[int | None]:
    """Positions 0 to n - 1, with None for the middle ones where there are more than `limit`."""
    if n <= limit:
        return list(range(n))
    head = (limit - 1) // 2
    return [*range(head), None, *range(n - (limit - 1 - head), n)]
