"""The section about the files that the run keeps on disk."""

from __future__ import annotations

from dataclasses import dataclass

from perpetune.report import form
from perpetune.report.blocks import Block, Cell, Column, Columns, Heading, Panel, Rows, Shares, Table, Text
from perpetune.report.document import backbone_bytes
from perpetune.report.palette import LIGHT_LINES
from perpetune.report.results_schema import Results


@dataclass(frozen=True)
class StorageRow:
    """One kind of file: its bytes for the last task, and for all tasks together."""

    kind: str
    last: int
    total: int


def section(results: Results) -> list[Block]:
    note = (
        "What the run keeps of the model. Tasks share on the disk what is the same in both. The frozen backbone is not "
        "counted; it is stored once, elsewhere."
    )
    listed, backbone, stored = storage_rows(results), backbone_bytes(results), stored_bytes(results)
    if not listed:
        return [Heading("Storage"), Text(note), Panel([Text("The run has recorded no files.")])]
    colours = [f"l{i % len(LIGHT_LINES)}" for i in range(len(listed))]
    columns: Columns = [Column("kind", left=True), "last task", "all tasks", "share of the backbone"]
    rows: Rows = [
        [Cell(row.kind, swatch=colour), form.size(row.last), form.size(row.total), form.relative(row.total, backbone)]
        for row, colour in zip(listed, colours, strict=True)
    ]
    last, total = sum(row.last for row in listed), sum(row.total for row in listed)
    shared: Rows = [["all, each thing once for every task", form.size(last), form.size(total), ""]]
    foot: Rows = [
        *(shared if "disk" in results else []),
        [Cell("on the disk", style="best"), "", Cell(form.size(stored), style="best"), form.relative(stored, backbone)],
        ["backbone, as float32", "", form.size(backbone), ""],
    ]
    bar = Shares([(colour, row.total) for row, colour in zip(listed, colours, strict=True)])
    return [Heading("Storage"), Text(note), Panel([bar, Table(columns, rows, foot)])]


def storage_rows(results: Results) -> list[StorageRow]:
    """Kinds of file in the order in which they first occur."""
    entries = sorted(results["storage"], key=lambda entry: entry["task"])
    kinds = dict.fromkeys(kind for entry in entries for kind in entry if kind != "task")
    return [StorageRow(k, entries[-1].get(k, 0), sum(entry.get(k, 0) for entry in entries)) for k in kinds]


def stored_bytes(results: Results) -> int:
    """What the tasks take on the disk together. Older versions stored all for every task."""
    if "disk" in results:
        return sum(entry["bytes"] for entry in results["disk"])
    return sum(row.total for row in storage_rows(results))
