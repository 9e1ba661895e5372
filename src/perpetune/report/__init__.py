"""What people read after a run: a page, its Markdown and JSON, several runs beside each other, the terminal.

Everything here starts from one plain dict, the results document (`results_schema.Results`).
"""

from __future__ import annotations

from perpetune.report.compare import compare
from perpetune.report.page import headroom_beside, is_comparison, write_comparison, write_report
from perpetune.report.results_schema import Results, checked

__all__ = ["Results", "checked", "compare", "headroom_beside", "is_comparison", "write_comparison", "write_report"]
