"""The blocks of reports. The HTML page, Markdown and the terminal each draw them in their own way.

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
    """A paragraph; the terminal highlights a `warning`."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences. The page folds more than `limit` of them (0: never); `noun` is the word for them."""

    items: Sequence[str]
    limit: int = 0
    noun: str = "line"


@dataclass(frozen=True)
class Code:
    """Lines to copy, such as commands; `language` is the name of their language in Markdown."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Figure:
    """One figure with its unit and a note about its meaning; the note of an `absent` figure says why it is missing."""

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
        text: the shown text.
        key: the value by which its column is sorted; None takes the text, an empty key means not known.
        bar: a share in [0, 1] that the page draws beside the text.
        style: `best` is bold, `up` and `down` are coloured.
        swatch: the class of a chart's colour, which the page shows before the text: `strong`, `l0`, …
        indent: the number of levels by which the page indents the text.
        fold: a short text that the page shows in place of a long one until the user clicks it.
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
        columns, rows, foot: each row has as many cells as there are columns.
        sortable: whether a click on a heading sorts the rows.
        limit: the page folds a table with more rows (0: never); `noun` is the word for a row.
        wrap: whether long headings may take several lines.
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
        level: the level of the colour, see `palette.heat_level`.
        kind: `learned` is highlighted (the task was just learned), `ahead` has no colour (the task is not learned yet).
        title: the text that the page shows on hover.
        value: a share in [0, 1], which the terminal shows with two digits; None shows the text.
        change: the change of the value since the row before, for the terminal; None if there is none.
    """

    text: str
    level: int
    kind: Literal["kept", "learned", "ahead"] = "kept"
    title: str = ""
    value: float | None = None
    change: float | None = None


@dataclass(frozen=True)
class HeatRow:
    """One row; None stands for a cell that is not known.

    Attributes:
        number, name: the number and name of the row, such as those of its task.
        cells: one cell for each of the table's names.
        mean: the mean of the cells, or another summary; `value` is the same as a share.
        beside: one text for each further column.
        part: the part of the task that the row is about, in a table with `parts`.
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
        label: a description for screen readers.
        corner: the heading of the rows' names.
        names: the headings of the cells' columns; if there are many, `numbers` replace them, by default 1, 2, …
        mean, beside: the headings of the rows' `mean` and `beside`.
        parts: the heading of the rows' parts, if several rows are about one task.
        foot: a name, and one text for each of the first columns.
        scale: the meanings of the first and of the last colour.
        overview: a description of the picture of a large table, for screen readers; without it there is no picture.
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
    """Curves over the learned tasks, in percent; the vertical axis covers at least `floor` to `top`."""

    lines: Sequence[Line]
    label: str
    floor: float = 0.0
    top: float = 1.0
    wide: bool = False


@dataclass(frozen=True)
class Legend:
    """The meaning of colours: the class and the name of each; with `ends`, the words for the first and last colour."""

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
    """Blocks that the page shows after a click."""

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
    """Two panels side by side if there is room."""

    panels: Sequence[Panel]


@dataclass(frozen=True)
class Only:
    """Blocks for one kind of output only."""

    output: Output
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Brief:
    """A section's line about the last task for the terminal: `drift: features moved 0.020`.

    Attributes:
        label, text: the words before and after the colon.
        when: `live` shows it after each task, `end` at the end of a run, `always` at both times.
        warning: whether the user should act on it; then it is highlighted.
        short: a shorter text for a line with several facts about one of several runs; not shown if empty.
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
    """The blocks of one section; `name` is the name of its file or entry point, and its anchor in the page."""

    name: str
    blocks: Sequence[Block]

    @property
    def heading(self) -> Heading | None:
        """None of a section without a title, which stands above the list of sections."""
        return next((block for block in self.blocks if isinstance(block, Heading)), None)


@dataclass(frozen=True)
class Banner:
    """A note at the top of the page; `link` is the name of the section with more details."""

    text: str
    items: Sequence[str] = ()
    link: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page: its head, its sections and its last line.

    Attributes:
        kind: the kind of page, such as `perpetune report`.
        chips: the recipe's choices, by the name of their axis.
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
    """A `Cell` from a cell, a text or a number."""
    return value if isinstance(value, Cell) else Cell(str(value))


def column(value: Column | str) -> Column:
    """A `Column` from a column or a text."""
    return value if isinstance(value, Column) else Column(value)


def keyed(text: str, value: float | str | None, **more: object) -> Cell:
    """A cell that is sorted by `value`; None means not known."""
    return Cell(text, "" if value is None else value, **more)  # type: ignore[arg-type]


def only(blocks: Sequence[Block], output: Output) -> Iterator[Block]:
    """The blocks for one kind of output; the blocks in an `Only` replace it."""
    for block in blocks:
        if not isinstance(block, Only):
            yield block
        elif block.output == output:
            yield from only(block.blocks, output)
