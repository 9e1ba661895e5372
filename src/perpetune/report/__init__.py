"""Reports about runs: an HTML page, the same in Markdown and JSON, a comparison of several runs, and terminal output.

All of them are made from one plain dict, the results document (`results_schema.Results`).
"""

from __future__ import annotations

from perpetune.report.compare import compare
from perpetune.report.page import headroom_beside, is_comparison, write_comparison, write_report
from perpetune.report.results_schema import Results, checked

__all__ = ["Results", "checked", "compare", "headroom_beside", "is_comparison", "write_comparison", "write_report"]
