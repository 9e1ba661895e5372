"""The tutorials do what they show, and the runner that says so would see if they did not."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import blocks, faults, matches
from warm import Warm

DOCS = Path(__file__).resolve().parents[1] / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_prints_what_it_shows(page: Path, tmp_path: Path, warm: Warm) -> None:
    found = faults(page, tmp_path, warm.command)
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_what_a_tutorial_does_not_run_is_an_installation(page: Path) -> None:
    found = blocks(page.read_text(encoding="utf-8"))
    assert sum(block.language == "console" for block in found) >= 4
    for block in found:
        if block.language == "sh":
            assert all(line.startswith(("pip install ", "#")) for line in block.text.splitlines()), block


SHOWN = ["a table", "", " name   figure ", " ──────────── ", " x       1.25 ", "...", "3 files in ..."]
PRINTED = ["a table", " name  figure", " ───────", " x       1.3", "more", "3 files in /tmp/x"]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({3: " x  1.0"}, False),  # 1.25 is not within a tenth
        ({3: " x  1"}, False),
        ({3: " y  1.25"}, False),
        ({4: ""}, True),
        ({5: "4 files in /tmp/x"}, False),
        ({0: "one more", 1: "a table"}, False),
    ],
)
def test_printed_lines_are_compared(change: dict[int, str], same: bool) -> None:
    assert matches(SHOWN, [change.get(i, line) for i, line in enumerate(PRINTED)]) is same


def test_each_fault_of_a_page_is_named(tmp_path: Path, warm: Warm) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '```python title="say.py"\nimport sys\n\nprint("said", *sys.argv[1:])\nsys.exit(len(sys.argv) - 1)\n```\n\n'
        "```console\n$ python say.py\nsaid\n$ python say.py 1 2\nsaid 1 2\n$ echo $?\n2\n$ python say.py x\nsaid x\n"
        "$ perpetune nothing\n...\n$ echo $?\n2\n```\n\n```python\nprint('one')\n```\n\n```text\ntwo\n```\n"
    )
    found = faults(page, tmp_path, warm.command)
    assert [one.split(":\n")[0].split("\n")[0] for one in found] == [
        "page.md:15: `python say.py x` ends with code 1",
        "page.md:23: `python .block.py` prints",
    ]
    page.write_text("```yaml\na: 1\n```\n")
    with pytest.raises(ValueError, match=r"page.md:1: a block in yaml needs a title"):
        faults(page, tmp_path, warm.command)
