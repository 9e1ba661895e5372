"""Write blocks as Markdown, for a pull request or a lab book. Texts are escaped; drawings are left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from perpetune.report.blocks import (
    Block,
    Bullets,
    Cell,
    Code,
    Figures,
    Fold,
    Heading,
    Heat,
    Page,
    Pair,
    Panel,
    Section,
    Table,
    Text,
    Tree,
    cell,
    column,
    only,
)
from perpetune.report.svg import Branch


def page(of: Page) -> str:
    """The whole file."""
    parts = [f"# {plain(of.title)}", plain(of.lead), " · ".join(f"{axis} {plain(name)}" for axis, name in of.chips)]
    for banner in of.banners:
        parts += [f"**{plain(banner.text)}**", _bullets(Bullets(banner.items))]
    parts += map(section, of.sections)
    return "\n\n".join(filter(None, parts)) + "\n"


def section(of: Section) -> str:
    """A section; empty if it has only drawings."""
    heading = of.heading
    body = blocks([block for block in of.blocks if block is not heading])
    return f"## {plain(heading.title)}\n\n{body}" if heading and body else body


def blocks(found: Sequence[Block]) -> str:
    """Blocks one below the other."""
    texts = (DRAW[type(block)](block) for block in only(found, "markdown") if type(block) in DRAW)
    return "\n\n".join(filter(None, texts))


def plain(text: object) -> str:
    """`text` on one line, escaped so that Markdown and HTML show it unchanged."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(str(text).split()))


def _text(block: Text) -> str:
    return plain(block.text)


def _heading(block: Heading) -> str:
    return f"## {plain(block.title)}"


def _bullets(block: Bullets) -> str:
    return "\n".join(f"- {plain(item)}" for item in block.items)


def _code(block: Code) -> str:
    ticks = max((len(run) for run in re.findall(r"`+", block.text)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}{block.language}\n{block.text.rstrip()}\n{fence}"


def _figures(block: Figures) -> str:
    large = [[f.label, f.text if f.absent else f"{f.text} {f.unit}", f.note] for f in block.large]
    return _rows(["figure", "value", ""], [*large, *([f.label, f.text, f.note] for f in block.small)])


def _table(block: Table) -> str:
    heads = [column(one).title for one in block.columns]
    lines = [[_cell(cell(one)) for one in row] for row in [*block.rows, *block.foot]]
    return _lines([plain(head) for head in heads], lines)


def _cell(one: Cell) -> str:
    text = plain(one.text)
    return f"**{text}**" if one.style == "best" and text else text


def _heat(block: Heat) -> str:
    beside = [*([block.mean] if block.mean else []), *block.beside]
    heads = [block.corner, *([block.parts] if block.parts else []), *(one.title for one in beside), *block.names]
    rows = [
        [
            f"{row.number} {row.name}".strip(),
            *([row.part] if block.parts else []),
            *([row.mean] if block.mean else []),
            *row.beside,
            *(one.text if one else "" for one in row.cells),
        ]
        for row in block.rows
    ]
    return _rows(heads, rows)


def _tree(block: Tree) -> str:
    def lines(node: Branch, level: int) -> Iterable[str]:
        yield "  " * level + "- " + plain(node.title)
        for child in node.children:
            yield from lines(child, level + 1)

    return "\n".join(lines(block.root, 0))


def _fold(block: Fold) -> str:
    return blocks(block.blocks)


def _panel(block: Panel) -> str:
    body = blocks(block.blocks)
    parts = [f"### {plain(block.title)}" if block.title else "", plain(block.about), body]
    return "\n\n".join(filter(None, parts)) if body else ""


def _pair(block: Pair) -> str:
    return "\n\n".join(filter(None, map(_panel, block.panels)))


def _rows(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return _lines([plain(head) for head in heads], [[plain(text) for text in row] for row in rows])


def _lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table of cells that are already escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


DRAW: dict[type, Callable[[Any], str]] = {
    Heading: _heading, Text: _text, Bullets: _bullets, Code: _code, Figures: _figures, Table: _table, Heat: _heat,
    Tree: _tree, Fold: _fold, Panel: _panel, Pair: _pair,
}  # fmt: skip
