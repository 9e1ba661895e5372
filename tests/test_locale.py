"""What fails first on Windows and macOS, as far as Linux can show it: a locale that is not UTF-8, and paths with spaces
and letters outside of ASCII."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import picture_folder

# `LC_ALL=C` is what services and containers have; Python takes UTF-8 all the same, unless somebody forbids it.
C = {"LC_ALL": "C", "LANG": "C"}
ASCII = {**C, "PYTHONUTF8": "0"}
SEVERAL = """
import sys
from perpetune import cli
from perpetune.cli.output import encode_anything
encode_anything()
rest = sys.argv[1:]
while rest:
    end = rest.index(";")
    if cli.call(rest[:end]):
        sys.exit(f"{rest[:end]} failed")
    rest = rest[end + 1 :]
"""
PLAIN = {"state": "my state", "month": "june 2026", "out": "the report"}
LETTERS = {"state": "mon état", "month": "juin 2026 é", "out": "le rapport é"}


def _run(folder: Path, how: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**{key: value for key, value in os.environ.items() if not key.startswith(("LC_", "PYTHONUTF8"))}, **how},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=170,
        check=False,
    )
    said = done.stdout.decode("utf-8", "backslashreplace")
    assert done.returncode == 0, said
    assert "did not foresee" not in said
    return said


def _month(place: Path, names: dict[str, str]) -> list[list[str]]:
    """A month in `place` whose classes are named by a manifest, and the verbs that learn and use it."""
    month = picture_folder(place / names["month"], ("chat noir", "x"), 6)
    rows = [
        f"{name}/{i}.png,{label}\n" for name, label in (("chat noir", "chat noir é"), ("x", "犬")) for i in range(6)
    ]
    (month / "all.csv").write_text("".join(["path,label\n", *rows]), encoding="utf-8")
    state = names["state"]
    return [
        ["init", state, "--model", "perpetune:micro"],
        ["update", state, "--data", f"{names['month']}/all.csv", "--name", "june"],
        ["predict", state, f"{names['month']}/chat noir", f"{names['month']}/x/0.png"],
        ["predict", state, f"{names['month']}/x", "--json"],
        ["log", state],
        ["report", state, "--out", names["out"]],
    ]


def _holds(said: str, place: Path, names: dict[str, str]) -> None:
    assert "task 1 june  2 classes, 10 training examples" in said
    assert "/chat noir/0.png: chat noir " in said
    report = (place / names["out"] / "report.html").read_text(encoding="utf-8")
    assert "chat noir é" in report
    assert "犬" in report


CASES = [
    pytest.param(C, "Mes données 犬", LETTERS, id="letters in paths, LC_ALL=C"),
    pytest.param(ASCII, "My data", PLAIN, id="spaces in paths, letters in classes, no UTF-8 at all"),
    pytest.param(ASCII, "Mes données 犬", LETTERS, id="letters in paths, no UTF-8 at all"),
]


def test_the_locale_is_narrow_here(tmp_path: Path) -> None:
    code = "import sys; print(sys.getfilesystemencoding(), sys.stdout.encoding)"
    assert _run(tmp_path, ASCII, "-c", code).split() == ["ascii", "ascii"]
    assert _run(tmp_path, C, "-c", code).split() == ["utf-8", "utf-8"]


@pytest.mark.parametrize(("how", "folder", "names"), CASES[1:2])
def test_verbs_in_a_narrow_locale(how: dict[str, str], folder: str, names: dict[str, str], tmp_path: Path) -> None:
    verbs = _month(tmp_path / folder, names)
    said = _run(tmp_path / folder, how, "-c", SEVERAL, *[word for verb in verbs for word in (*verb, ";")])
    _holds(said, tmp_path / folder, names)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "folder", "names"), CASES)
def test_each_verb_as_a_process_of_its_own(
    how: dict[str, str], folder: str, names: dict[str, str], tmp_path: Path
) -> None:
    verbs = _month(tmp_path / folder, names)
    said = "".join(_run(tmp_path / folder, how, "-m", "perpetune", *verb) for verb in verbs)
    _holds(said, tmp_path / folder, names)
