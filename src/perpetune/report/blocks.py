"""What reports are made of: blocks, which the page, Markdown and the terminal draw, each in its own way.

A section (`report/sections`) is a function that takes the results document and returns a list of blocks, `Heading`
first. It does not know where they are drawn, and what draws them (`html.py`, `markdown.py`, `terminal.py`) knows no
section. All text is plain text: the renderers escape it.

The terminal is for a glance. It shows `Figures`, `Brief`, and what a section puts into `Only("terminal", …)`; the page
and Markdown show everything else. Markdown has no drawings: it leaves out charts, and panels in which nothing is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from perpetune.report.svg import Branch, Line

Output = Literal["page", "markdown", "terminal"]

LARGE = 8  # up to this many columns of a heat table: large cells
ROOMY = 12  # more than this: whole per cents and small cells
READABLE = 30  # more than this: the numbers on demand


@dataclass(frozen=True)
class Heading:
    """The title of a section; `short` is for the page's list of sections."""

    title: str
    short: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; the terminal sets off a `warning`."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences; the page folds it where there are more than `limit` (0: never), which it calls `noun`."""

    items: Sequence[str]
    limit: int = 0
    noun: str = "line"


@dataclass(frozen=True)
class Code:
    """Lines to copy, such as commands; `language` is Markdown's name of theirs."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Figure:
    """One figure with its unit and what it says; an `absent` one has a note that says why."""

    label: str
    text: str
    unit: str = ""
    note: str = ""
    absent: bool = False


@dataclass(frozen=True)
class Figures:
    """Figures that are read first, and `small` ones below them."""

    large: Sequence[Figure]
    small: Sequence[Figure] = ()


@dataclass(frozen=True)
class Column:
    """The heading of a column. `left` is for text; the page shows `short`, if any, and `hint` on hover."""

    title: str
    left: bool = False
    hint: str = ""
    short: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what it shows.
        key: what its column is sorted by; by the text when None, as nothing known when empty.
        bar: a share in [0, 1] that the page draws beside the text.
        style: `best` is bold, `up` and `down` are coloured.
        swatch: class of a colour that the page shows before the text, as charts use it: `strong`, `l0`, …
        indent: levels by which the page moves the text in.
        fold: what the page shows in place of a long text, until it is clicked.
    """

    text: str
    key: float | str | None = None
    bar: float | None = None
    style: Literal["", "best", "up", "down"] = ""
    swatch: str = ""
    indent: int = 0
    fold: str = ""


Columns = list[Column | str]  # a plain text or number stands for a `Column` or `Cell` without more
Rows = list[list[Cell | str | float]]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns, rows, foot: as many cells in each row as there are columns.
        sortable: a click on a heading sorts.
        limit: the page folds a table of more rows (0: never), which it calls `noun`.
        wrap: long headings go over several lines.
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Cell | str | float]]
    foot: Sequence[Sequence[Cell | str | float]] = ()
    sortable: bool = False
    limit: int = 0
    noun: str = "row"
    wrap: bool = False


@dataclass(frozen=True)
class HeatCell:
    """One coloured cell.

    Attributes:
        text: what it shows.
        level: of the colour, see `palette.heat_level`.
        kind: `learned` is set off (the moment a task was learned), `ahead` has no colour (a task not yet learned).
        title: shown on hover.
        value: a share in [0, 1], which the terminal shows in two digits; the text when None.
        change: of the value since the row before, which the terminal shows; None where there is none.
    """

    text: str
    level: int
    kind: Literal["kept", "learned", "ahead"] = "kept"
    title: str = ""
    value: float | None = None
    change: float | None = None


@dataclass(frozen=True)
class HeatRow:
    """One row; None is a cell of which nothing is known.

    Attributes:
        number, name: of the task that the row is of, say.
        cells: one for each of the table's names.
        mean: of the cells, or another figure that sums them up; `value` is the same as a share.
        beside: one text for each further column.
        part: which part of that task the row is of, in a table that has `parts`.
    """

    number: str
    name: str
    cells: Sequence[HeatCell | None]
    mean: str = ""
    beside: Sequence[str] = ()
    part: str = ""
    value: float | None = None


@dataclass(frozen=True)
class Heat:
    """A table of coloured cells, tasks against tasks.

    Attributes:
        label: what it shows, for screen readers.
        corner: heading of the rows' names.
        names: headings of the cells' columns; `numbers` stand in for them where there are many, 1, 2, … by default.
        mean, beside: headings of the rows' `mean` and `beside`.
        parts: heading of the rows' parts, where several rows are of one task.
        foot: a name and one text for each of the first columns.
        scale: what the least and the greatest colour stand for.
        overview: what a picture of a large table shows, for screen readers; without it there is no picture.
    """

    label: str
    corner: str
    names: Sequence[str]
    rows: Sequence[HeatRow]
    mean: Column | None = None
    beside: Sequence[Column] = ()
    parts: str = ""
    foot: tuple[str, Sequence[str]] | None = None
    scale: tuple[str, str] | None = None
    numbers: Sequence[str] = ()
    overview: str = ""

    @property
    def style(self) -> Literal["large", "", "dense"]:
        """Of the cells."""
        return "large" if len(self.names) <= LARGE else "dense" if len(self.names) > ROOMY else ""

    @property
    def headings(self) -> list[str]:
        """Of the cells' columns: their names, or numbers for want of room."""
        numbers = self.numbers or [str(i + 1) for i in range(len(self.names))]
        return list(numbers if self.style == "dense" else self.names)

    @property
    def folded(self) -> bool:
        """Whether there are too many cells to show them at once."""
        return len(self.names) > READABLE or len(self.rows) > 2 * READABLE


@dataclass(frozen=True)
class Chart:
    """Curves over the tasks learned, in per cent; `floor` and `top` are the least range of the vertical axis."""

    lines: Sequence[Line]
    label: str
    floor: float = 0.0
    top: float = 1.0
    wide: bool = False


@dataclass(frozen=True)
class Legend:
    """What colours mean: the class and the name of each; with `ends` they lead from one word to another."""

    colours: Sequence[tuple[str, str]]
    ends: tuple[str, str] | None = None


@dataclass(frozen=True)
class Shares:
    """One bar, divided: the class of a colour and the size of each part."""

    parts: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Tree:
    """A tree, from left to right; in Markdown a list of lists. `number` and `name` stand above one in a gallery."""

    root: Branch
    label: str
    number: str = ""
    name: str = ""


@dataclass(frozen=True)
class Gallery:
    """Small trees beside each other; the page folds more than `limit` of them."""

    trees: Sequence[Tree]
    limit: int = 15


@dataclass(frozen=True)
class Fold:
    """Blocks that the page shows on demand."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Panel:
    """Blocks in a frame, with a title and a line about it."""

    blocks: Sequence[Block]
    title: str = ""
    about: str = ""


@dataclass(frozen=True)
class Pair:
    """Two panels side by side, where there is room."""

    panels: Sequence[Panel]


@dataclass(frozen=True)
class Only:
    """Blocks for one kind of output alone."""

    output: Output
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Brief:
    """What a section has to say of the last task in one line of the terminal: `drift: features moved 0.020`.

    Attributes:
        label, text: before and behind the colon.
        when: after each task (`live`), at the end of a run, or both.
        warning: something to act on; it is set off.
        short: the same for one of several runs, which has a part of a line; not shown when empty.
    """

    label: str
    text: str
    when: Literal["always", "live", "end"] = "always"
    warning: bool = False
    short: str = ""


Block = (
    Heading | Text | Bullets | Code | Figures | Table | Heat | Chart | Legend | Shares | Tree | Gallery | Fold | Panel
    | Pair | Only | Brief
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """The blocks of one section; `name` is that of its file or entry point, and its anchor in the page."""

    name: str
    blocks: Sequence[Block]

    @property
    def heading(self) -> Heading | None:
        """None of a section without a title, which stands above the list of sections."""
        return next((block for block in self.blocks if isinstance(block, Heading)), None)


@dataclass(frozen=True)
class Banner:
    """What to know before reading; `link` is the name of the section that says more."""

    text: str
    items: Sequence[str] = ()
    link: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page: what stands above the sections, the sections, and a last line.

    Attributes:
        kind: `perpetune report`, say.
        chips: choices by the name of their axis.
        navigation: whether the page begins with a list of its sections.
    """

    kind: str
    title: str
    lead: str
    sections: Sequence[Section]
    chips: Sequence[tuple[str, str]] = ()
    banners: Sequence[Banner] = ()
    footer: str = "Made by perpetune; nothing on this page is loaded from elsewhere."
    navigation: bool = True


def cell(value: Cell | str | float) -> Cell:
    """A cell from what may stand for one."""
    return value if isinstance(value, Cell) else Cell(str(value))


def column(value: Column | str) -> Column:
    """A column's heading from what may stand for one."""
    return value if isinstance(value, Column) else Column(value)


def keyed(text: str, value: float | str | None, **more: object) -> Cell:
    """A cell that is sorted by a value, which may not be known."""
    return Cell(text, "" if value is None else value, **more)  # type: ignore[arg-type]


def only(blocks: Sequence[Block], output: Output) -> Iterator[Block]:
    """The blocks that are for one kind of output; those in `Only` come in its place."""
    for block in blocks:
        if not isinstance(block, Only):
            yield block
        elif block.output == output:
            yield from only(block.blocks, output)
