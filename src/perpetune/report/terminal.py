"""Blocks in a terminal, with rich: what fits on a screen, and lines for the live view.

Of each section it shows `Figures`, `Brief`, and what is in `Only("terminal", …)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from perpetune.report import blocks, form
from perpetune.report.blocks import Block, Brief, Bullets, Code, Figures, Heat, HeatCell, Only, Panel, Section, Text

if TYPE_CHECKING:
    from rich import table, text
    from rich.console import Console

VISIBLE_CHANGE = 0.005  # two digits do not show smaller changes
GAP = "…"
ROWS = 24
NAME = 16  # the terminal cuts longer names of tasks
T = TypeVar("T")


def summary(sections: Sequence[Section], width: int = 100) -> list[Any]:
    """The output at the end of a run, for `show`: tables, the figures, and one line from each section that has one."""
    lines = [figures_line(block) for block in _all(sections, Figures)]
    briefs = [brief_line(block) for block in _all(sections, Brief) if block.when != "live"]
    return [*drawn(_tall(sections), width), *lines, *briefs]


def after_task(sections: Sequence[Section]) -> list[text.Text]:
    """The output after each task: the last row of the first table, and one line from each section that has one."""
    heat = next((block for block in _tall(sections) if isinstance(block, Heat)), None)
    briefs = [brief_line(block, "  ") for block in _all(sections, Brief) if block.when != "end"]
    return [*([row_line(heat)] if heat else []), *briefs]


def short_line(sections: Sequence[Section]) -> text.Text:
    """The line after a task if several runs learn at once: `after 3 task-3: mean .81  moved 0.8 % …`."""
    from rich.text import Text as Line

    line = Line()
    for heat in [block for block in _tall(sections) if isinstance(block, Heat) and block.rows][:1]:
        last = heat.rows[-1]
        line.append(f"after {last.number} {last.name}: mean ").append(_mean(last), "bold")
    for block in _all(sections, Brief):
        if block.short:
            line.append(f"  {block.short}", "dim")
    return line


def show(console: Console, parts: Iterable[Any]) -> None:
    """Print what `summary` or `drawn` gave. Lines of text are wrapped on a terminal only, not in a file."""
    from rich.text import Text as Line

    for part in parts:
        whole = isinstance(part, Line) and not console.is_terminal
        console.print(part, soft_wrap=whole or bool(getattr(part, "no_wrap", False)))  # else rich breaks a long line


def drawn(found: Sequence[Block], width: int = 100) -> list[Any]:
    """Blocks in the form for `show`, without those that a terminal cannot show, such as charts."""
    from rich.text import Text as Line

    parts: list[Any] = []
    for block in found:
        if isinstance(block, Heat):
            parts.append(heat_table(block, width))
        elif isinstance(block, blocks.Table):
            parts.append(plain_table(block))
        elif isinstance(block, Text):
            parts.append(Line(block.text, "yellow" if block.warning else ""))
        elif isinstance(block, Bullets):
            parts += [Line(item) for item in block.items]
        elif isinstance(block, Code):  # users copy it, so its lines are not broken
            parts += [Line(f"  {line}", no_wrap=True) for line in block.text.splitlines()]
        elif isinstance(block, Figures):
            parts.append(figures_line(block))
        elif isinstance(block, Panel):
            parts += [*([Line(block.title, "bold")] if block.title else []), *drawn(block.blocks, width)]
    return parts


def heat_table(heat: Heat, width: int = 100) -> table.Table:
    """A table of cells, each with its change since the row before: `.87 ▼.11`.

    If the columns do not fit into `width` characters, the changes are left out first, then columns in the middle. If
    there are too many rows for a screen, rows in the middle are left out. `…` stands for what is left out.
    """
    from rich.text import Text as Line

    names = heat.names
    longest = min(max(map(len, names), default=0), NAME)
    room = width - longest - len(str(len(names))) - 9  # beside the row's number and name, the mean and the edges
    wide, narrow = max(len(".87 ▼.11"), longest) + 2, max(len(".87"), len(str(len(names)))) + 2
    changes = wide * len(names) <= room
    columns = _elided(len(names), max(3, room // narrow)) if not changes else list(range(len(names)))
    drawn = new_table()
    drawn.add_column(Line(heat.corner), no_wrap=True, overflow="ellipsis", max_width=NAME + 5)
    drawn.add_column(heat.mean.title if heat.mean else "", justify="right", no_wrap=True)
    for j in columns:
        heading = GAP if j is None else names[j] if changes else str(j + 1)
        drawn.add_column(Line(heading), no_wrap=True, overflow="ellipsis", max_width=NAME)
    for i in _elided(len(heat.rows), ROWS):
        if i is None:
            drawn.add_row(*([GAP] * (len(columns) + 2)))
            continue
        row = heat.rows[i]
        cells = [Line(GAP, "dim") if j is None else cell_text(row.cells[j], changes) for j in columns]
        drawn.add_row(Line(f"{row.number} {row.name}"), Line(_mean(row), "bold"), *cells)
    return drawn


def row_line(heat: Heat) -> text.Text:
    """Only the last row, for the output during learning: `after 3 task-3: mean .81  task-1 .87 ▼.11 …`."""
    from rich.text import Text as Line

    if not heat.rows:
        return Line("no task is learned yet", "dim")
    last = heat.rows[-1]
    line = Line.assemble(f"after {last.number} {last.name}: mean ", (_mean(last), "bold"))
    for name, one in zip(heat.names[: len(heat.rows)], last.cells, strict=False):
        line.append(f"  {name} ", "dim").append_text(cell_text(one, changes=True))
    return line


def figures_line(found: Figures) -> text.Text:
    """The large figures on one line, without those that are not defined."""
    from rich.text import Text as Line

    line = Line()
    for figure in found.large:
        if not figure.absent:
            line.append("   " if line else "").append(figure.label.lower() + " ", "dim")
            line.append(f"{figure.text} {figure.unit}", "bold")
    return line


def brief_line(brief: Brief, indent: str = "") -> text.Text:
    """The line of a section: `drift: features of earlier tasks moved 0.020`; a warning is highlighted."""
    from rich.text import Text as Line

    if brief.warning:
        return Line(f"note: {brief.label}: {brief.text}", "yellow")
    return Line(f"{indent}{brief.label}: {brief.text}", "dim")


def plain_table(found: blocks.Table) -> table.Table:
    """A table of texts. Long texts take several lines; the best cells are bold."""
    from rich.text import Text as Line

    drawn = new_table()
    for i, one in enumerate(map(blocks.column, found.columns)):
        if i == 0 or one.left:
            drawn.add_column(Line(one.short or one.title), overflow="fold")
        else:
            drawn.add_column(Line(one.short or one.title), justify="right", no_wrap=True)
    for row in [*found.rows, *found.foot]:
        cells = map(blocks.cell, row)
        drawn.add_row(*(Line(one.text, "bold" if one.style == "best" else "") for one in cells))
    return drawn


def new_table() -> table.Table:
    """An empty table in the common style."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="dim", caption_justify="left")


def share(value: float | None) -> str:
    """A share in two digits without the zero: `.87`, `1.0`."""
    if value is None:
        return form.ABSENT
    return "1.0" if value >= 0.995 else f"{value:.2f}"[1:]


def cell_text(one: HeatCell | None, changes: bool) -> text.Text:
    """A cell, and with `changes` its change since the row before."""
    from rich.text import Text as Line

    if one is None:
        return Line("")
    style = {"kept": "", "learned": "bold", "ahead": "dim italic"}[one.kind]
    line = Line(one.text if one.value is None else share(one.value), style)
    if changes and one.change is not None and abs(one.change) >= VISIBLE_CHANGE:
        up = one.change > 0
        line.append(f" {'▲' if up else '▼'}{share(abs(one.change))}", "green" if up else "red")
    return line


def _mean(row: blocks.HeatRow) -> str:
    return share(row.value) if row.value is not None else row.mean


def _tall(sections: Sequence[Section]) -> list[Block]:
    """The blocks of sections for the terminal, without their single lines."""
    return [inner for only in _all(sections, Only) if only.output == "terminal" for inner in only.blocks]


def _all(sections: Sequence[Section], kind: type[T]) -> list[T]:
    return [block for section in sections for block in section.blocks if isinstance(block, kind)]


def _elided(n: int, limit: int) -> list[int | None]:
    """The positions 0 to n - 1. If there are more than `limit`, None stands for those in the middle."""
    if n <= limit:
        return list(range(n))
    head = (limit - 1) // 2
    return [*range(head), None, *range(n - (limit - 1 - head), n)]
