"""The parts of a comparison: the blocks of its page and Markdown, and its table in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perpetune.report import form
from perpetune.report.blocks import (
    Banner,
    Block,
    Bullets,
    Cell,
    Chart,
    Column,
    Columns,
    Fold,
    Heading,
    Legend,
    Page,
    Pair,
    Panel,
    Rows,
    Section,
    Table,
    Text,
    keyed,
)
from perpetune.report.compare import Comparison, ComparisonRow
from perpetune.report.effects import Effect
from perpetune.report.sections import answers, headroom
from perpetune.report.sections.curves import LOST, MEAN, line_style
from perpetune.report.sections.figures import FIGURES, figure_text, figures, unit
from perpetune.report.svg import Line
from perpetune.report.terminal import new_table

if TYPE_CHECKING:
    from rich import table as rich_table
    from rich import text as rich_text

WAYS = "A row such as “safe: slow” shows the row before it as if its method had answered in that other way."
BESIDE = (  # columns of a comparison that only some runs have: key, heading in pages, note
    ("moved", "moved, worst site, %", "how far old outputs had moved at the end, at the worst site"),
    ("room", "room, %", "share of directions still free at the end"),
    ("drift", "drift, 0 to 2", "how far the features of earlier tasks’ test data had moved at the end"),
)
COMPARED = {  # columns of a comparison in a terminal and their headings, in order
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
# The columns to leave out if the terminal is too narrow for all, in this order.
SPARE = (
    *("pooled_accuracy", "forward_transfer", "stored", "backward_transfer"),
    *("learning", "drift", "room", "moved", "average_accuracy"),
)
SENTENCES = 8  # the terminal shows so many sentences; the page shows all


def comparison_page(compared: Comparison) -> Page:
    """The page of a comparison."""
    rows, notes = compared["rows"], compared["notes"]
    recipes = sum(row["way"] is None for row in rows)
    runs = sum(len(row["runs"]) for row in rows if row["way"] is None)
    sections = [
        ("effects", _effects(compared)),
        ("figures", _figures(compared)),
        ("headroom", headroom.blocks(compared["headroom"]) if compared["headroom"] else []),
        ("curves", _curves(compared)),
        ("runs", _runs(compared)),
    ]
    return Page(
        kind="perpetune comparison",
        title=f"Comparison of {form.plural(recipes, 'recipe')}, {form.plural(runs, 'run')}",
        lead="Mean ± sample standard deviation over n runs that differ only in the seed",
        sections=[Section(name, blocks) for name, blocks in sections if blocks],
        banners=[Banner("Read with care", notes)] if notes else [],
        navigation=False,
    )


def _effects(compared: Comparison) -> list[Block]:
    """The effects of each setting, in sentences and in all figures."""
    if not compared["effects"]:
        return []
    note = (
        "Differences between runs that differ in this setting only, computed for each seed: mean ± sample standard "
        "deviation, in points."
    )
    shown = _shown(compared)
    columns: Columns = [Column(heading, left=True) for heading in ("setting", "change", "with")]
    rows: Rows = []
    for effect in compared["effects"]:
        texts = effect_cells(effect)
        beside = ", ".join(f"{key} {value}" for key, value in effect["beside"].items())
        about = [effect["setting"], f"{effect['before']} → {effect['after']}", beside]
        cells = [keyed(texts[key], effect["metrics"][key]["mean"]) for key, _, _ in shown]
        rows.append([*about, keyed(str(len(effect["seeds"])), len(effect["seeds"])), *cells])
    table = Table(
        [*columns, "seeds", *(_column(f"{label}, points", hint) for _, label, hint in shown)], rows, sortable=True
    )
    lines = Bullets(effect_lines(compared["effects"], compared["measure"]))
    panel = Panel([lines, Fold("All figures", [table])])
    return [Heading("What each setting changes"), Text(note), panel]


def _figures(compared: Comparison) -> list[Block]:
    """The figures of each row: mean and standard deviation."""
    rows, best, shown = compared["rows"], compared["best"], _shown(compared)
    beside = beside_figures(rows)
    columns: Columns = [
        Column("run", left=True),
        "n",
        *(_column(f"{label}, {unit(key)}", hint) for key, label, hint in shown),
    ]
    columns += [_column(heading.capitalize(), hint) for _, heading, hint in beside]
    lines: Rows = []
    for i, row in enumerate(rows):
        texts = comparison_cells(row)
        costs = (row["trainable_parameters"]["mean"], row["stored_bytes"]["mean"], row["learn_seconds"]["mean"])
        lines.append(
            [
                Cell(row["label"], swatch=line_style(i, max(len(rows), 2))),
                keyed(str(len(row["runs"])), len(row["runs"])),
                *(
                    keyed(texts[key], row["metrics"][key]["mean"], style="best" if i in best[key] else "")
                    for key, _, _ in shown
                ),
                *(keyed(texts[key], row[key]["mean"]) for key, _, _ in beside),  # type: ignore[literal-required]
                *(keyed(w(cost), cost) for w, cost in zip((form.count, form.size, form.duration), costs, strict=True)),
            ]
        )
    bold = "The best mean of each column is bold. Compare the standard deviations to see whether it is clearly better."
    notes = [Text(bold)] if any(best.values()) else []
    notes += [Text(ways)] if (ways := ways_told(rows)) else []
    costs_of: Columns = [
        Column("trained parameters", short="trained"),
        "stored",
        Column("learning time", short="learning"),
    ]
    return [Heading("Figures"), *notes, Table([*columns, *costs_of], lines, sortable=True, wrap=True)]


def _curves(compared: Comparison) -> list[Block]:
    rows, what = compared["rows"], compared["measure"]
    accuracy = Chart(_lines(rows, "average_accuracy_curve"), f"Mean {what} on the tasks seen")
    forgetting = Chart(_lines(rows, "forgetting_curve"), "Mean forgetting", top=0.1)
    legend = Legend([(line_style(i, max(len(rows), 2)), row["label"]) for i, row in enumerate(rows)])
    pair = Pair([Panel([accuracy], what.capitalize(), MEAN), Panel([forgetting], "Forgetting", LOST)])
    return [Heading("Curves"), pair, legend]


def _runs(compared: Comparison) -> list[Block]:
    """The table with the runs of each row."""
    settings = compared["settings"]
    note = f"The runs of each row{', and the settings in which the recipes differ' if settings else ''}."
    columns: Columns = [Column(heading, left=True) for heading in ("row", "runs", "seeds")]
    rows: Rows = [
        [
            row["label"],
            ", ".join(row["runs"]),
            ", ".join(map(str, row["seeds"])),
            row["tasks"],
            row["classes"] or form.ABSENT,
            *(form.setting(row["differs"][key]) for key in settings),
        ]
        for row in compared["rows"]
        if row["way"] is None
    ]
    return [
        Heading("Runs"),
        Text(note),
        Table([*columns, "tasks", "classes", *(Column(key, left=True) for key in settings)], rows),
    ]


def _shown(compared: Comparison) -> list[tuple[str, str, str]]:
    """The key, label and note of each figure that any row has."""
    rows, listed = compared["rows"], figures(compared["measure"])
    return [(key, label, note) for key, label, note, _ in listed if any(row["metrics"][key]["n"] for row in rows)]


def _column(title: str, hint: str) -> Column:
    return Column(title, hint=hint, short=title.lower())


def _lines(rows: Sequence[ComparisonRow], curve: str) -> list[Line]:
    return [
        Line(
            row["label"],
            [point["mean"] for point in row[curve]],  # type: ignore[literal-required]
            line_style(i, max(len(rows), 2)),
            [point["std"] for point in row[curve]],  # type: ignore[literal-required]
        )
        for i, row in enumerate(rows)
    ]


def ways_told(rows: Sequence[ComparisonRow]) -> str:
    """An explanation of the rows of other ways to answer and of oracle heads; empty if there are no such rows."""
    ways = {row["way"] for row in rows}
    parts = [WAYS] if ways - {None, answers.ORACLE} else []
    return " ".join([*parts, *([answers.ORACLE_MEANING] if answers.ORACLE in ways else [])])


def beside_figures(rows: Sequence[ComparisonRow]) -> list[tuple[str, str, str]]:
    """The columns of `BESIDE` that any row has."""
    return [column for column in BESIDE if any(row[column[0]]["n"] for row in rows)]  # type: ignore[literal-required]


def comparison_cells(row: ComparisonRow) -> dict[str, str]:
    """The text of each figure of a row of the comparison, `mean ± std`."""
    texts = {}
    for key, _, _, signed in FIGURES:
        mean, std = row["metrics"][key]["mean"], row["metrics"][key]["std"]
        texts[key] = form.mean_std(figure_text(mean, signed), None if std is None else form.percent(std))
    for key, _, _ in BESIDE:
        write = form.thousandths if key == "drift" else form.percent
        mean, std = row[key]["mean"], row[key]["std"]  # type: ignore[literal-required]
        texts[key] = form.mean_std(write(mean), None if std is None else write(std))
    return texts


def effect_cells(effect: Effect) -> dict[str, str]:
    """The text of the change that a setting makes in each figure, in points."""
    return {
        key: form.mean_std(form.points(change["mean"]), None if change["std"] is None else form.percent(change["std"]))
        for key, change in effect["metrics"].items()
    }


def effect_lines(effects: Sequence[Effect], measure: str = "accuracy") -> list[str]:
    """A sentence for each change of a setting: `head ncm instead of linear: final accuracy +4.1 ± 0.9 points`."""
    changes: dict[tuple[str, str, str], list[Effect]] = {}
    for effect in effects:
        changes.setdefault((effect["setting"], effect["before"], effect["after"]), []).append(effect)
    lines = []
    for (setting, before, after), found in changes.items():
        parts: list[str] = []
        for effect in found:
            beside = " and ".join(f"{key} {value}" for key, value in effect["beside"].items())
            unit = " points" if not parts else ""
            parts.append(effect_cells(effect)["final_accuracy"] + unit + (f" with {beside}" if beside else ""))
        lines.append(f"{setting} {after} instead of {before}: final {measure} {', '.join(parts)}")
    return lines


def compare_table(comparison: Mapping[str, Any], width: int = 100) -> rich_table.Table:
    """One line for each recipe, mean ± standard deviation; the best of each column is bold.

    If the columns do not fit into `width` characters, some are left out; a line below the table names them.
    """
    from rich.cells import cell_len
    from rich.text import Text as Words

    rows, best = comparison["rows"], comparison["best"]
    texts = [
        comparison_cells(row)
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
    table = new_table()
    notes = ["moved: old outputs at the worst site, %; room: directions still free, %"] if "moved" in shown else []
    notes += ["drift: how far features of earlier tasks moved, 0 to 2"] if "drift" in shown else []
    notes += ["too narrow for: " + ", ".join(left_out)] if left_out else []
    if notes:
        table.caption = Words("\n".join(notes), "dim")
    table.add_column("run", overflow="fold")
    for heading in ("n", *(COMPARED[key] for key in shown)):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, (row, n, cells) in enumerate(zip(rows, counts, texts, strict=True)):
        styled = [Words(cells[key], "bold" if i in best.get(key, []) else "") for key in shown]
        table.add_row(Words(row["label"]), n, *styled)
    return table


def effects_text(comparison: Mapping[str, Any]) -> rich_text.Text:
    """The effects of the settings, one line for each."""
    from rich.text import Text as Words

    lines = effect_lines(comparison["effects"], comparison["measure"])
    more = len(lines) - SENTENCES
    return Words(
        "\n".join([*lines[:SENTENCES], *([f"… and {more} more changes: see --out, --json"] if more > 0 else [])])
    )
