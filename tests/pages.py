"""The code of a page of the documentation, run as a reader runs it, and what it prints against what the page shows.

What a fenced block is:

* with `title="NAME"`: a file that the reader writes.
* `console`: lines that begin with `$ ` are commands for bash, `perpetune` and `python` among them. The lines behind a
  command are what it prints, on both of its streams. `$?` is the code of the command before. A command whose code is
  not 0 is a fault unless the next one asks for `$?`.
* `python`: a script of its own. The next block, if it is `text`, is what it prints.
* `sh`: what a test cannot run, such as an installation. Other languages need a title.

Of what is printed, empty lines, indentation and the width of columns do not count. `...` stands for any text in a line,
or alone for any lines. A decimal number may differ by a tenth of itself, or by 0.1; whole numbers and words may not.

`python tests/pages.py PAGE FOLDER` prints each command with what it prints now.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')
_PERPETUNE = """from perpetune.cli import jobs, main
jobs.CHILD = (*{python}, *jobs.CHILD[1:])  # the processes of several runs begin as the page's commands do
main()
"""
_DECIMAL = re.compile(r"\d*\.\d+")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is where it stands in its page, from 1."""

    language: str
    title: str | None
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """A command for bash, and the lines that the page shows behind it."""

    text: str
    shown: list[str]
    line: int


def blocks(page: str) -> list[Block]:
    found = []
    for match in _FENCE.finditer(page):
        title = _TITLE.search(match[2])
        line = page.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], title[1] if title else None, match[3], line))
    return found


def faults(page: Path, folder: Path, python: Sequence[str]) -> list[str]:
    """What does not come out as the page shows it, each with its line.

    Args:
        folder: where the reader works; the page's files and states are left there.
        python: the command that stands for `python`.
    """
    found = []
    for command, code, printed, asked in _run(page, folder, python):
        said = "\n".join(printed)
        if code and not asked:
            found.append(f"{page.name}:{command.line}: `{command.text}` ends with code {code}:\n{said}")
        elif not matches(command.shown, printed):
            wanted = "\n".join(command.shown)
            found.append(f"{page.name}:{command.line}: `{command.text}` prints\n{said}\nand not\n{wanted}")
    return found


def matches(shown: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether lines that were printed are those that a page shows."""
    numbers: list[float] = []
    parts = [r"(?:.*\n)*?" if line == "..." else f"{_pattern(line, numbers)}\n" for line in map(_plain, shown) if line]
    text = "".join(f"{line}\n" for line in map(_plain, printed) if line)
    match = re.fullmatch("".join(parts), text)
    if match is None:
        return False
    return all(abs(a - float(b)) <= max(0.1, abs(a) / 10) + 1e-9 for a, b in zip(numbers, match.groups(), strict=True))


def _plain(line: str) -> str:
    return re.sub("─+", "─", re.sub(r"\s+", " ", line)).strip()


def _pattern(line: str, numbers: list[float]) -> str:
    """An expression for one line; the decimal numbers in it are its groups, and they are added to `numbers`."""
    parts = []
    for free in line.split("..."):
        at, pieces = 0, []
        for number in _DECIMAL.finditer(free):
            numbers.append(float(number[0]))
            pieces += [re.escape(free[at : number.start()]), rf"({_DECIMAL.pattern})"]
            at = number.end()
        parts.append("".join([*pieces, re.escape(free[at:])]))
    return ".*?".join(parts)


def _run(page: Path, folder: Path, python: Sequence[str]) -> Iterator[tuple[Command, int, list[str], bool]]:
    """Each command of a page with its code, what it printed, and whether the page asks for its code."""
    started = shlex.join(python)
    (folder / ".perpetune.py").write_text(_PERPETUNE.format(python=list(python)), encoding="utf-8")
    begin = f'perpetune() {{ {started} .perpetune.py "$@"; }}; python() {{ {started} "$@"; }}'
    code = 0
    for commands in _commands(page, folder):
        for i, command in enumerate(commands):
            done = subprocess.run(
                ["bash", "-c", f"{begin}\n(exit {code})\n{command.text}"],
                cwd=folder,
                env={**os.environ, "COLUMNS": "100", "TERM": "dumb"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                timeout=170,
                check=False,
            )
            code = done.returncode
            asked = i + 1 < len(commands) and "$?" in commands[i + 1].text
            yield command, code, done.stdout.splitlines(), asked


def _commands(page: Path, folder: Path) -> Iterator[list[Command]]:
    """The commands of each block, after the files that stand before it are written."""
    found = blocks(page.read_text(encoding="utf-8"))
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.title is not None:
            (folder / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "console":
            yield _typed(page, block)
        elif block.language == "python":
            (folder / ".block.py").write_text(block.text, encoding="utf-8")
            output = after.text.splitlines() if after is not None and after.language == "text" else ["..."]
            yield [Command("python .block.py", output, block.line)]
        elif block.language not in ("text", "sh"):
            raise ValueError(f"{page.name}:{block.line}: a block in {block.language} needs a title")


def _typed(page: Path, block: Block) -> list[Command]:
    commands: list[Command] = []
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if line.startswith("$ "):
            commands.append(Command(line[2:], [], number))
        elif commands:
            commands[-1].shown.append(line)
        else:
            raise ValueError(f"{page.name}:{number}: the first line of a block in console begins with `$ `")
    return commands


if __name__ == "__main__":
    for ran, ended, lines, _ in _run(Path(sys.argv[1]), Path(sys.argv[2]), [sys.executable]):
        print(f"$ {ran.text}" + (f"   [{ended}]" if ended else ""), *lines, sep="\n", flush=True)
