"""Drawings as inline SVG, coloured by the page's style sheet, so that both screens, light and dark, fit.

Text stays text; nothing is scripted; every mark has a `<title>` that browsers show on hover.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from perpetune.report import form
from perpetune.report.palette import heat_level

LEFT, RIGHT, TOP, BOTTOM = 46, 16, 14, 40  # the margins for the axes, in drawing units
MARKERS = 20  # a line with more points has no markers


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: the text that the page shows on hover.
        values: one share for each x position; None makes a gap.
        style: CSS classes, with that of the colour.
        spread: half the height of the band around each value (a standard deviation), if any.
    """

    name: str
    values: Sequence[float | None]
    style: str
    spread: Sequence[float | None] = ()


def line_chart(lines: Sequence[Line], label: str, *, width: int, height: int, floor: float, top: float) -> Markup:
    """Curves over the learned tasks (1, 2, …), in percent.

    Args:
        lines: the curves; the last one is drawn on top.
        label: a description for screen readers.
        width, height: the size of the drawing; the page scales it to the available space.
        floor, top: the smallest range of the vertical axis, as shares; it grows to include all values.
    """
    steps = max((len(line.values) for line in lines), default=0)
    ticks = _ticks(*_extent(lines, floor, top))
    frame = _Frame(steps, ticks[0], ticks[-1], width, height)
    parts = [_axes(frame, ticks), *(_band(line, frame) for line in lines), *(_curve(line, frame) for line in lines)]
    style = "chart full" if width > 800 else "chart"  # a wide one scrolls on small screens
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        style, width, height, label, Markup("").join(parts)
    )


def heat_overview(matrix: Sequence[Sequence[float | None]], columns: int, label: str) -> Markup:
    """The accuracy matrix as a picture without numbers, for streams too long to read cell by cell."""
    side = 8
    cells = [
        Markup('<rect class="h{}" x="{}" y="{}" width="{}" height="{}"/>').format(
            heat_level(a), j * side, i * side, side, side
        )
        for i, row in enumerate(matrix)
        for j, a in enumerate(row)
        if a is not None
    ]
    return Markup('<svg class="overview" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        columns * side, max(len(matrix), 1) * side, label, Markup("").join(cells)
    )


@dataclass(frozen=True)
class Branch:
    """A node of a tree, with the nodes below it.

    Attributes:
        name: the name of a leaf, drawn beside it.
        title: the text that the page shows on hover.
        notes: for a node with children two short texts, above and below the line that leads to it.
        style: CSS classes.
        square: whether a leaf is marked by a square instead of a disc.
        children: the nodes below; a leaf has none.
    """

    name: str
    title: str
    notes: tuple[str, str] = ("", "")
    style: str = ""
    square: bool = False
    children: Sequence[Branch] = ()


def tree(root: Branch, label: str) -> Markup:
    """A tree from left to right, each leaf on a line of its own with its name, in drawing units that are pixels.

    Args:
        root: the root; it may be a leaf.
        label: a description for screen readers.
    """
    return _tree(root, label, _Room(row=26, letter=6.9, names=380, columns=(96, 210), width=1044, style="chart tree"))


def small_tree(root: Branch, label: str) -> Markup:
    """The same for one of many: without notes, and without names where there are too many leaves for them."""
    many = _leaves(root) > 30
    room = _Room(
        row=6 if many else 15,
        letter=6.2,
        names=0 if many else 150,
        columns=(6, 34),
        width=246,
        style="chart tree small",
    )
    return _tree(root, label, room)


@dataclass(frozen=True)
class _Room:
    """Sizes in a drawing of a tree: of a leaf's line, a letter, the longest name, a level (least and most), and of the
    whole, if the levels allow. Levels under 60 have no notes."""

    row: int
    letter: float
    names: int
    columns: tuple[int, int]
    width: int
    style: str


def _tree(root: Branch, label: str, room: _Room) -> Markup:
    levels, leaves = _levels(root), _leaves(root)
    names = min(room.names, room.letter * max(_breadth(leaf.name) for leaf in _ends(root)) + 14)
    least, most = room.columns
    column = min(most, max(least, int((room.width - names - 24) / levels))) if levels else 0
    width, height = round(8 + column * levels + 16 + names + 4), leaves * room.row + 8
    end, lines = 8 + column * levels + 12, itertools.count()

    def drawn(node: Branch, level: int) -> tuple[float, Markup]:
        """Its height in the drawing, and itself."""
        if not node.children:
            y = 4 + room.row * (next(lines) + 0.5)
            return y, _leaf(node, end, y, names, room)
        x = 8 + column * (level + 1)
        below = [drawn(child, level + 1) for child in node.children]
        y = (below[0][0] + below[-1][0]) / 2
        ways = " ".join(
            f"M{x} {y:g}V{at:g}H{end if not child.children else x + column}"
            for child, (at, _) in zip(node.children, below, strict=True)
        )
        parts = [Markup('<path d="{}"/>').format(ways), *(part for _, part in below)]
        parts.append(_inner(node, x, y, column, room))
        return y, Markup("").join(parts)

    middle, parts = drawn(root, 0)
    stub = Markup('<path d="M8 {}H{}"/>').format(f"{middle:g}", 8 + column if root.children else end)
    return Markup(
        '<svg class="{}" viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">{}{}</svg>'
    ).format(room.style, width, height, width, height, label, stub, parts)


def _leaf(node: Branch, x: float, y: float, names: float, room: _Room) -> Markup:
    text = _cut(node.name, (names - 14) / room.letter) if names > 14 else ""
    r = 4 if room.row > 20 else 2.5
    mark = (
        Markup('<rect x="{}" y="{:g}" width="{}" height="{}"/>').format(x - r, y - r, 2 * r, 2 * r)
        if node.square
        else Markup('<circle cx="{}" cy="{:g}" r="{}"/>').format(x, y, r)
    )
    return Markup('<g class="leaf {}"><title>{}</title>{}<text x="{}" y="{:g}">{}</text></g>').format(
        node.style, node.title, mark, x + 10, y + 4, text
    )


def _inner(node: Branch, x: float, y: float, column: int, room: _Room) -> Markup:
    texts = node.notes if column >= 60 else ("", "")
    notes = [
        Markup('<text x="{}" y="{:g}" text-anchor="end">{}</text>').format(x - 9, at, _cut(text, (column - 16) / 6.6))
        for text, at in zip(texts, (y - 6, y + 15), strict=True)
        if text
    ]
    return Markup('<g class="node {}"><title>{}</title><circle cx="{}" cy="{:g}" r="{}"/>{}</g>').format(
        node.style, node.title, x, y, 3.5 if room.row > 20 else 2, Markup("").join(notes)
    )


def _levels(node: Branch) -> int:
    return max((_levels(child) + 1 for child in node.children), default=0)


def _ends(node: Branch) -> Iterator[Branch]:
    if not node.children:
        yield node
    for child in node.children:
        yield from _ends(child)


def _leaves(node: Branch) -> int:
    return sum(1 for _ in _ends(node))


def _breadth(text: str) -> int:
    """The width of a text in letters; Chinese and Japanese letters count as two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _cut(text: str, room: float) -> str:
    """The part of a text that fits, with an ellipsis if it is cut."""
    if _breadth(text) <= room:
        return text
    breadths = itertools.accumulate(map(_breadth, text))
    return text[: sum(1 for breadth in breadths if breadth <= room - 1)] + "…"


@dataclass(frozen=True)
class _Frame:
    """The scales of a drawing: from step i (from 0) and share v to x and y."""

    steps: int
    low: float
    high: float
    width: int
    height: int

    def x(self, step: int) -> float:
        room = self.width - LEFT - RIGHT
        return LEFT + room / 2 if self.steps < 2 else round(LEFT + room * step / (self.steps - 1), 1)

    def y(self, value: float) -> float:
        room = self.height - TOP - BOTTOM
        return round(TOP + room * (self.high - value) / (self.high - self.low), 1)


def _extent(lines: Sequence[Line], floor: float, top: float) -> tuple[float, float]:
    low, high = floor, top
    for line in lines:
        for i, value in enumerate(line.values):
            if value is not None:
                spread = line.spread[i] if line.spread else None
                low, high = min(low, value - (spread or 0)), max(high, value + (spread or 0))
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """At most eight round values that span the range."""
    steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100)
    step = next((s for s in steps if (high - low) / s <= 6), 10.0 ** math.ceil(math.log10((high - low) / 6)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 4) for k in range(first, max(last, first + 1) + 1)]


def _axes(frame: _Frame, ticks: Sequence[float]) -> Markup:
    right, bottom = frame.width - RIGHT, frame.height - BOTTOM
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        style = "zero" if tick == 0 else "grid"
        parts.append(Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(style, LEFT, right, y, y))
        text = form.percent(tick, 0)
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 8, y + 4, text))
    for step in _labelled(frame.steps):
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(frame.x(step), bottom + 18, step + 1)
        )
    middle = (LEFT + right) / 2
    axis = Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">tasks learned</text>')
    parts.append(axis.format(middle, frame.height - 4))
    return Markup("").join(parts)


def _labelled(steps: int) -> list[int]:
    """The steps with a number below them: the first and round ones, at most about ten."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, steps) if steps / n <= 11)
    if every == 2:
        return list(range(0, steps, 2))
    return [0, *(s for s in range(1, steps) if (s + 1) % every == 0)] if steps else []


def _runs(values: Sequence[float | None]) -> list[list[int]]:
    """Stretches of positions without a gap."""
    stretches: list[list[int]] = []
    for i, value in enumerate(values):
        if value is None:
            continue
        if stretches and stretches[-1][-1] == i - 1:
            stretches[-1].append(i)
        else:
            stretches.append([i])
    return stretches


def _points(frame: _Frame, pairs: Sequence[tuple[int, float]]) -> str:
    return " ".join(f"{frame.x(i):g},{frame.y(v):g}" for i, v in pairs)


def _band(line: Line, frame: _Frame) -> Markup:
    known = [s if v is not None else None for v, s in zip(line.values, line.spread, strict=False)]
    bands = []
    for stretch in _runs(known):
        upper = [(i, (line.values[i] or 0) + (known[i] or 0)) for i in stretch]
        lower = [(i, (line.values[i] or 0) - (known[i] or 0)) for i in reversed(stretch)]
        bands.append(Markup('<polygon class="band {}" points="{}"/>').format(line.style, _points(frame, upper + lower)))
    return Markup("").join(bands)


def _curve(line: Line, frame: _Frame) -> Markup:
    parts = [Markup('<g class="line {}"><title>{}</title>').format(line.style, line.name)]
    for stretch in _runs(line.values):
        pairs = [(i, v) for i in stretch if (v := line.values[i]) is not None]
        if len(pairs) > 1:
            parts.append(Markup('<polyline points="{}"/>').format(_points(frame, pairs)))
        if frame.steps <= MARKERS or len(pairs) == 1:
            parts += [_marker(line.name, i, v, frame) for i, v in pairs]
    return Markup("").join(parts) + Markup("</g>")


def _marker(name: str, step: int, value: float, frame: _Frame) -> Markup:
    return Markup('<circle cx="{}" cy="{}" r="3"><title>{}</title></circle>').format(
        frame.x(step), frame.y(value), f"{name}, after task {step + 1}: {form.percent(value)} %"
    )
