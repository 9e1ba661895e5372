"""The tutorials do what they show, and the runner that says so would see if they did not."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from pages import Block, blocks, faults, matches
from tiny import chiefly
from warm import Warm

from perpetune.cli import app

DOCS = Path(__file__).resolve().parents[1] / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", chiefly(TUTORIALS, [DOCS / "tutorials" / "images.md"]), ids=lambda page: page.stem)
def test_a_tutorial_prints_what_it_shows(page: Path, tmp_path: Path, warm: Warm) -> None:
    found = faults(page, tmp_path, warm.command)
    assert not found, "\n\n".join(found)


def unread(found: list[Block]) -> Iterator[str]:
    """What of a page cannot work and is seen without running it: a command that does not exist or has no such option,
    code that does not compile, a recipe that is no YAML, a script that no block before it writes."""
    commands = getattr(typer.main.get_command(app), "commands", {})
    written = set[str]()
    for block in found:
        for line in re.findall(r"^\$ (.*)", block.text, re.MULTILINE) if block.language == "console" else []:
            program, *words = shlex.split(line)
            if program == "python" and words[0] not in written:
                yield f"{line}: no block writes {words[0]}"
            elif program == "perpetune":
                try:
                    commands[words[0]].make_context(words[0], words[1:])
                except Exception as error:  # noqa: BLE001  whatever it is, the command does not begin
                    yield f"{line}: {error!r}"
        try:
            if block.language == "python":
                compile(block.text, str(block.title), "exec")
            elif block.language == "yaml":
                yaml.safe_load(block.text)
        except (SyntaxError, yaml.YAMLError) as error:
            yield f"{block.title}: {error}"
        written.add(str(block.title))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_each_command_and_file_of_a_tutorial_can_be_read(page: Path) -> None:
    assert list(unread(blocks(page.read_text(encoding="utf-8")))) == []


def test_what_cannot_be_read_would_be_seen() -> None:
    page = (
        '```python title="good.py"\nprint(1)\n```\n```python title="bad.py"\nprint(\n```\n'
        '```yaml title="bad.yaml"\na: [\n```\n```console\n$ python good.py x\n1\n$ python none.py\n'
        "$ perpetune nothing\n$ perpetune log s --no-such\n$ perpetune init s --data\n$ perpetune log s\n$ ls\n```\n"
    )
    assert [re.split("[:,]", one)[0] for one in unread(blocks(page))] == [
        "bad.py", "bad.yaml", "python none.py", "perpetune nothing", "perpetune log s --no-such",
        "perpetune init s --data",
    ]  # fmt: skip


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
