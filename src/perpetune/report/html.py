"""Draw blocks as HTML, with the classes of `templates/page.css`. All texts are escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup, escape

from perpetune.report import svg
from perpetune.report.blocks import (
    Block,
    Brief,
    Bullets,
    Cell,
    Chart,
    Code,
    Figures,
    Fold,
    Gallery,
    Heading,
    Heat,
    HeatCell,
    HeatRow,
    Legend,
    Pair,
    Panel,
    Section,
    Shares,
    Table,
    Text,
    Tree,
    cell,
    column,
    only,
)
from perpetune.report.palette import STEPS

NOTHING = Markup("")
MANY_EMPTY = 20  # empty cells of a matrix that are drawn as one
WIDEST = 1000  # browsers know no wider cell


def section(of: Section) -> Markup:
    """A section; without a title, only its blocks."""
    inner = blocks(of.blocks)
    return Markup('<section id="{}">\n{}</section>\n').format(of.name, inner) if of.heading else inner


def blocks(found: Sequence[Block]) -> Markup:
    """Blocks one below the other. A block that needs a frame and has none gets one."""
    parts = []
    for block in only(found, "page"):
        if isinstance(block, FRAMED):
            parts.append(_panel(Panel([block])))
        elif not isinstance(block, Brief):
            parts.append(DRAW[type(block)](block))
    return NOTHING.join(parts)


def _inside(found: Sequence[Block]) -> Markup:
    """Blocks that are already in a frame."""
    return NOTHING.join(DRAW[type(block)](block) for block in only(found, "page") if not isinstance(block, Brief))


def _heading(block: Heading) -> Markup:
    return Markup("<h2>{}</h2>\n").format(block.title)


def _text(block: Text) -> Markup:
    return Markup('<p class="note">{}</p>\n').format(block.text)


def _bullets(block: Bullets) -> Markup:
    items = NOTHING.join(Markup("<li>{}</li>").format(item) for item in block.items)
    return _limited(Markup('<ul class="problems">{}</ul>\n').format(items), len(block.items), block.limit, block.noun)


def _code(block: Code) -> Markup:
    return Markup("<pre><code>{}</code></pre>\n").format(block.text)


def _figures(block: Figures) -> Markup:
    card = '<div class="label">{}</div><div class="value">{}{}</div><div class="hint">{}</div>'
    cards = NOTHING.join(
        Markup(f'<div class="card{{}}">{card}</div>\n').format(
            " absent" if one.absent else "",
            one.label,
            one.text,
            NOTHING if one.absent else Markup('<span class="unit">{}</span>').format(one.unit),
            one.note,
        )
        for one in block.large
    )
    small = NOTHING.join(
        Markup('<div><dt>{}</dt><dd><div class="value">{}</div><div class="hint">{}</div></dd></div>\n').format(
            one.label, one.text, one.note
        )
        for one in block.small
    )
    parts = [Markup('<section class="cards" aria-label="Headline figures">\n{}</section>\n').format(cards)]
    parts += [Markup('<dl class="facts">\n{}</dl>\n').format(small)] if small else []
    return NOTHING.join(parts)


def _table(block: Table) -> Markup:
    columns = [column(one) for one in block.columns]
    left = [one.left for one in columns]
    head = NOTHING.join(
        Markup('<th scope="col"{}{}>{}</th>').format(
            Markup(' class="text"') if one.left else "", _attribute("title", one.hint), one.short or one.title
        )
        for one in columns
    )
    style = " ".join(["list", *(["told"] if block.wrap else []), *(["sortable"] if block.sortable else [])])
    body = NOTHING.join(_row(row, left) for row in block.rows)
    foot = Markup("<tfoot>\n{}</tfoot>\n").format(NOTHING.join(_row(row, left) for row in block.foot))
    drawn = Markup('<table class="{}">\n<thead><tr>{}</tr></thead>\n<tbody>\n{}</tbody>\n{}</table>\n').format(
        style, head, body, foot if block.foot else ""
    )
    return _limited(drawn, len(block.rows), block.limit, block.noun)


def _row(cells: Sequence[Cell | str | float], left: Sequence[bool]) -> Markup:
    """A row of a table; its first cell names it."""
    parts = []
    for i, (one, text) in enumerate(zip(map(cell, cells), left, strict=True)):
        styles = " ".join([*(["text"] if text and i else []), *([one.style] if one.style else [])])
        about = _attribute("class", styles) + (NOTHING if one.key is None else _attribute("data-v", one.key, True))
        tag = Markup('<th scope="row"{}>{}</th>' if i == 0 else "<td{}>{}</td>")
        parts.append(tag.format(about, _cell(one)))
    return Markup("<tr>{}</tr>\n").format(NOTHING.join(parts))


def _cell(one: Cell) -> Markup:
    text = escape(one.text)
    if one.fold:
        text = Markup('<details class="inline"><summary>{}</summary> {}</details>').format(one.fold, text)
    if one.indent:
        text = Markup('<span style="padding-left:{}em">{}</span>').format(min(one.indent, 12), text)
    swatch = _swatch(one.swatch) if one.swatch else NOTHING
    share = Markup('<span class="bar"><i style="width:{:.0f}%"></i></span>')
    bar = NOTHING if one.bar is None else share.format(100 * one.bar)
    return swatch + text + bar


def _heat(block: Heat) -> Markup:
    numbers = Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}">\n<table class="{}">\n{}{}{}</table>\n</div>\n'
    ).format(block.label, f"matrix {block.style}".rstrip(), _heat_head(block), _heat_body(block), _heat_foot(block))
    scale = _legend(Legend([(f"h{i}", "") for i in range(STEPS)], block.scale)) if block.scale else NOTHING
    if not block.folded:
        return numbers + scale
    on_demand = Markup("<details><summary>All numbers</summary>{}</details>\n").format(numbers)
    if not block.overview:
        return on_demand + scale
    values = [[None if one is None else one.value for one in row.cells] for row in block.rows]
    return svg.heat_overview(values, len(block.names), block.overview) + scale + on_demand


def _heat_head(block: Heat) -> Markup:
    heads = [Markup('<th scope="col">{}</th>').format(block.corner)]
    for one in [*block.beside, *([block.mean] if block.mean else [])]:
        heads.append(Markup('<th scope="col"{}>{}</th>').format(_attribute("title", one.hint), one.short or one.title))
    for name, heading in zip(block.names, block.headings, strict=True):
        heads.append(Markup('<th scope="col" title="{}">{}</th>').format(name, heading))
    return Markup("<thead><tr>{}</tr></thead>\n").format(NOTHING.join(heads))


def _heat_body(block: Heat) -> Markup:
    if not block.parts:
        return Markup("<tbody>\n{}</tbody>\n").format(NOTHING.join(_heat_row(block, row) for row in block.rows))
    bodies: dict[tuple[str, str], list[Markup]] = {}
    for row in block.rows:
        bodies.setdefault((row.number, row.name), []).append(_heat_row(block, row))
    group = Markup('<tbody>\n<tr><th scope="rowgroup" title="{}"><b>{}</b>{}</th></tr>\n{}</tbody>\n')
    return NOTHING.join(group.format(name, number, name, NOTHING.join(rows)) for (number, name), rows in bodies.items())


def _heat_row(block: Heat, row: HeatRow) -> Markup:
    name = Markup('<th scope="row" title="{}"><b>{}</b>{}</th>').format(row.name, row.number, row.name)
    if block.parts:
        name = Markup('<th scope="row" class="part" title="{}">{}</th>').format(row.part, row.part)
    beside = NOTHING.join(Markup("<td>{}</td>").format(text) for text in row.beside)
    mean = Markup('<td class="mean">{}</td>').format(row.mean) if block.mean else NOTHING
    return Markup("<tr>{}{}{}{}</tr>\n").format(name, beside, mean, _heat_cells(row.cells))


def _heat_cells(cells: Sequence[HeatCell | None]) -> Markup:
    """The cells of a row. Many empty ones side by side are one wide cell: of a thousand tasks, most have no figure."""
    made: list[Markup] = []
    for empty, some in groupby(cells, lambda one: one is None):
        found = list(some)
        while empty and len(found) >= MANY_EMPTY:
            made.append(Markup('<td colspan="{}"></td>').format(len(found[:WIDEST])))
            found = found[WIDEST:]
        made += map(_heat_cell, found)
    return NOTHING.join(made)


def _heat_cell(one: HeatCell | None) -> Markup:
    if one is None:
        return Markup("<td></td>")
    return Markup('<td class="heat {} h{}"{}>{}</td>').format(
        one.kind, one.level, _attribute("title", one.title), one.text
    )


def _heat_foot(block: Heat) -> Markup:
    if block.foot is None:
        return NOTHING
    name, texts = block.foot
    empty = Markup("<td></td>") * (len(block.beside) + (block.mean is not None))
    cells = NOTHING.join(Markup("<td>{}</td>").format(text) for text in texts)
    return Markup('<tfoot><tr><th scope="row">{}</th>{}{}</tr></tfoot>\n').format(name, empty, cells)


def _chart(block: Chart) -> Markup:
    width, height = (1104, 380) if block.wide else (540, 300)
    return svg.line_chart(block.lines, block.label, width=width, height=height, floor=block.floor, top=block.top)


def _legend(block: Legend) -> Markup:
    if block.ends is None:
        items = (Markup("<li>{}{}</li>").format(_swatch(style), name) for style, name in block.colours)
        return Markup('<ul class="legend">{}</ul>\n').format(NOTHING.join(items))
    ramp = NOTHING.join(Markup('<i class="{}"></i>').format(style) for style, _ in block.colours)
    text = Markup('<p class="scale">{} <span class="ramp" aria-hidden="true">{}</span> {}</p>\n')
    return text.format(block.ends[0], ramp, block.ends[1])


def _shares(block: Shares) -> Markup:
    part = Markup('<i class="{}" style="flex:{}"></i>')
    parts = NOTHING.join(part.format(style, size) for style, size in block.parts)
    return Markup('<div class="stack" aria-hidden="true">{}</div>\n').format(parts)


def _tree(block: Tree) -> Markup:
    return svg.tree(block.root, block.label)


def _gallery(block: Gallery) -> Markup:
    figure = Markup('<figure><figcaption title="{}"><b>{}</b> {}</figcaption>{}</figure>\n')
    figures = NOTHING.join(
        figure.format(one.name, one.number, one.name, svg.small_tree(one.root, one.label)) for one in block.trees
    )
    drawn = Markup('<div class="trees">\n{}</div>\n').format(figures)
    return _limited(drawn, len(block.trees), block.limit, "tree")


def _fold(block: Fold) -> Markup:
    return Markup("<details><summary>{}</summary>{}</details>\n").format(block.summary, _inside(block.blocks))


def _panel(block: Panel) -> Markup:
    title = Markup("<h3>{}</h3>").format(block.title) if block.title else NOTHING
    about = Markup('<p class="sub">{}</p>\n').format(block.about) if block.about else NOTHING
    wide = any(isinstance(one, WIDE) or (isinstance(one, Chart) and one.wide) for one in block.blocks)
    style = "panel wide" if wide else "panel"
    return Markup('<div class="{}">{}{}{}</div>\n').format(style, title, about, _inside(block.blocks))


def _pair(block: Pair) -> Markup:
    return Markup('<div class="pair">\n{}</div>\n').format(NOTHING.join(map(_panel, block.panels)))


def _limited(drawn: Markup, count: int, limit: int, noun: str) -> Markup:
    if not limit or count <= limit:
        return drawn
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return Markup("<details><summary>Show all {} {}</summary>{}</details>\n").format(count, plural, drawn)


def _swatch(style: str) -> Markup:
    return Markup('<i class="swatch {}"></i>').format(style)


def _attribute(name: str, value: object, empty: bool = False) -> Markup:
    """An attribute of a tag; no attribute if the value is empty, unless `empty` is set."""
    return Markup(' {}="{}"').format(name, value) if value or empty else NOTHING


DRAW: dict[type, Callable[[Any], Markup]] = {
    Heading: _heading, Text: _text, Bullets: _bullets, Code: _code, Figures: _figures, Table: _table, Heat: _heat,
    Chart: _chart, Legend: _legend, Shares: _shares, Tree: _tree, Gallery: _gallery, Fold: _fold, Panel: _panel,
    Pair: _pair,
}  # fmt: skip
FRAMED = (Bullets, Code, Table, Heat, Chart, Shares, Tree, Gallery, Fold)
WIDE = (Table, Fold, Tree, Gallery, Shares)  # blocks whose frame scrolls sideways if there is no room
