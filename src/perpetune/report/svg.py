"""Two drawings as inline SVG, coloured by the page's style sheet, so that both screens, light and dark, fit.

Text stays text; nothing is scripted; every mark has a `<title>` that browsers show on hover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from perpetune.report import form
from perpetune.report.palette import heat_level

LEFT, RIGHT, TOP, BOTTOM = 46, 16, 14, 40  # room for the axes, in drawing units
MARKERS = 20  # more points than this are a line alone


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: shown on hover.
        values: one share for each x position; None is a gap.
        style: CSS classes, among them the colour's.
        spread: half the height of the band around each value (a standard deviation), if any.
    """

    name: str
    values: Sequence[float | None]
    style: str
    spread: Sequence[float | None] = ()


def line_chart(lines: Sequence[Line], label: str, *, width: int, height: int, floor: float, top: float) -> Markup:
    """Curves over the tasks learned (1, 2, …), in per cent.

    Args:
        lines: drawn in order, the last on top.
        label: what the chart shows, for screen readers.
        width, height: of the drawing; it scales to the space there is.
        floor, top: the least range of the vertical axis, as shares; it grows to hold all values.
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
class _Frame:
    """Where data lie in the drawing: step i (from 0) and share v to x and y."""

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
    """Steps that get a number below: the first, and round ones, at most about ten."""
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
