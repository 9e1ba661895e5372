"""Another package adds a section to the report: it is found by its entry point and shown in every kind of output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from test_report import Page, fake_results, told_of

from perpetune.cli import live
from perpetune.report import write_report

CODE = """
from perpetune.report.blocks import Brief, Chart, Heading, Table, Text
from perpetune.report.sections import reads
from perpetune.report.svg import Line


@reads("weather")
def sky(results):
    facts = [(entry["task"], entry["of"]["sky"]) for entry in results["facts"] if "sky" in entry["of"]]
    if not facts:
        return None
    rows = [[results["tasks"][task]["name"], told["clouds"]] for task, told in facts]
    sun = Chart([Line("sun", [1 - told["clouds"] / 8 for _, told in facts], "l0")], "Sun after each task")
    brief = Brief("weather", f"{rows[-1][1]} eighths of clouds")
    return [Heading("Weather <of> tasks", "Weather"), Text("In eighths."), Table(["task", "clouds"], rows), sun, brief]


def storm(results):
    results["tasks"].clear()
    raise ValueError("no \\n barometer")


def fog(results):
    return [Heading("Fog"), 7]
"""
POINTS = "[perpetune.sections]\nsky = weather:sky\nstorm = weather:storm\nfog = weather:fog\ngone = no_weather:gone\n"
FAULTS = (
    "section storm failed: ValueError: no barometer",
    "section fog failed: ",
    "section gone failed: UsageError: sections: 'gone' of an installed package cannot be loaded",
)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run whose method noted the weather; a package whose files lie as pip leaves them."""
    info = tmp_path / "site" / "weather-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weather\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (tmp_path / "site" / "weather.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "weather", raising=False)
    document = told_of(fake_results(3, 2))
    for entry in document["facts"]:
        entry["of"]["sky"] = {"kind": "weather", "clouds": 5 + entry["task"]}
    return document


def test_it_is_shown_everywhere(results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, _, md = (path.read_text("utf-8") for path in write_report(results, tmp_path))
    page = Page(html)
    assert html.index('<section id="drift"') < html.index('<section id="sky"') < html.index('<section id="tasks"')
    assert ">Weather</a>" in html
    assert "Weather <of> tasks" in page.shown
    assert 'aria-label="Sun after each task"' in html
    assert "## Weather \\<of\\> tasks\n\nIn eighths.\n\n| task | clouds |" in md
    assert "| task-3 | 7 |" in md
    assert "| sky |" not in md, "the section on heads shows no facts that another section reads"
    live.show_results(results)
    shown = " ".join(capsys.readouterr().out.split())
    assert "weather: 7 eighths of clouds" in shown
    for said in (page.shown, md, shown):  # those that fail are a line each, and the report is whole
        assert all(fault in said.replace("\\_", "_") for fault in FAULTS)
        assert "task-1" in said
