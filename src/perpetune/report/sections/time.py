"""The section about time and memory: each task's duration, training speed and peak memory."""

from __future__ import annotations

from perpetune.report import form
from perpetune.report.blocks import Block, Cell, Column, Columns, Heading, Rows, Table, Text
from perpetune.report.document import examples
from perpetune.report.results_schema import Results

PARTS = (
    ("prepare_s", "prepare"),
    ("learn_s", "learn"),
    ("statistics_s", "… statistics"),
    ("protect_s", "… protect"),
    ("new_s", "evaluate new"),
    ("earlier_s", "evaluate earlier"),
    ("drift_s", "drift"),
    ("exams_s", "exams"),
    ("oracle_s", "oracle"),
    ("commit_s", "commit"),
    ("report_s", "report"),
)
MEANING = (
    "Where the time went. Statistics and protection are parts of learning. Preparing is finding the data and checking "
    "the examples. What is kept of earlier tasks costs the time of the head alone."
)


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
    blocks: list[Block] = [Heading("Time and memory"), Table([*columns, "peak memory"], rows, limit=30, noun="task")]
    present = [(key, name) for key, name in PARTS if any(key in timing for timing in timings)]
    if not any("prepare_s" in timing for timing in timings):  # a document of an earlier version
        return blocks
    parts: Rows = [
        [
            results["tasks"][timing["task"]]["name"],
            *(form.duration(timing.get(key)) for key, _ in present),  # type: ignore[arg-type]
        ]
        for timing in timings
    ]
    shares: Columns = [Column("task", left=True), *(name for _, name in present)]
    return [*blocks, Text(MEANING), Table(shares, parts, limit=30, noun="task")]
