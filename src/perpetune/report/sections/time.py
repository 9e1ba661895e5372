"""The section about time and memory: each task's duration, training speed and peak memory."""

from __future__ import annotations

from perpetune.report import form
from perpetune.report.blocks import Block, Cell, Column, Columns, Heading, Rows, Table
from perpetune.report.document import examples
from perpetune.report.results_schema import Results


def section(results: Results) -> list[Block]:
    timings, what = results["timings"], examples(results)
    tokens = any("tokens" in timing for timing in timings)
    slowest = max((timing["learn_s"] for timing in timings), default=0.0)
    columns: Columns = [Column("task", left=True), "learning", "evaluation", f"{what} trained on", f"{what}/s"]
    columns += ["tokens trained on", "tokens/s"] if tokens else []
    rows: Rows = [
        [
            results["tasks"][timing["task"]]["name"],
            Cell(form.duration(timing["learn_s"]), bar=timing["learn_s"] / slowest if slowest else 0.0),
            form.duration(timing["evaluate_s"]),
            form.count(timing["images"]),
            form.count(timing["images_per_s"]),
            *([form.count(timing.get("tokens")), form.count(timing.get("tokens_per_s"))] if tokens else []),
            form.size(timing["peak_memory_bytes"]),
        ]
        for timing in timings
    ]
    return [Heading("Time and memory"), Table([*columns, "peak memory"], rows, limit=30, noun="task")]
