"""The section about problems: the run's warnings, and files that could not be read."""

from __future__ import annotations

from perpetune.report import form
from perpetune.report.blocks import Banner, Block, Bullets, Column, Columns, Heading, Panel, Table
from perpetune.report.results_schema import Results


def section(results: Results) -> list[Block] | None:
    blocks: list[Block] = []
    if results["warnings"]:
        blocks.append(Bullets(results["warnings"], limit=20, noun="warning"))
    if results["bad_files"]:
        columns: Columns = [Column(heading, left=True) for heading in ("file", "task", "reason")]
        rows = [[bad["file"], _task_name(results, bad["task"]), bad["reason"]] for bad in results["bad_files"]]
        blocks.append(Panel([Table(columns, rows, limit=20, noun="file")], "Files that could not be read"))
    return [Heading("Warnings"), *blocks] if blocks else None


def banner(results: Results) -> list[Banner]:
    """The numbers of warnings and of unreadable files, for the top of the page."""
    parts = [form.plural(len(results["warnings"]), "warning")] if results["warnings"] else []
    parts += [form.plural(len(results["bad_files"]), "unreadable file")] if results["bad_files"] else []
    return [Banner(" and ".join(parts), link="problems")] if parts else []


def _task_name(results: Results, index: int | None) -> str:
    known = index is not None and 0 <= index < len(results["tasks"])
    return results["tasks"][index]["name"] if known and index is not None else ""
