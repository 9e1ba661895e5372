"""Output: any encoding takes it, and a command whose work is done says so even if nobody can read it."""

from __future__ import annotations

import csv
import errno
import io
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import every, paired, picture_folder, recipe, vit_folder, written

from perpetune import Learner, cli
from perpetune.cli import call, main
from perpetune.cli.output import SIMPLER, Steady
from perpetune.trained import Trained

NAMES = ("犬", "Café", "ž–ł")
ENCODINGS = ("cp1252", "latin-1", "ascii", "utf-8")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `main` changes in the process."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a state that has learned `m1`, and pictures for one more month."""
    root = tmp_path_factory.mktemp("output")
    vit_folder(root / "model")
    picture_folder(root / "m1", NAMES, 6)
    picture_folder(root / "m2", ("ant", "bee"), 6)
    Learner(recipe(root / "model", train={"epochs": 6, "batch_size": 4, "lr": 0.05}), root / "state").learn(root / "m1")
    return root


@pytest.fixture
def state(world: Path, tmp_path: Path) -> Path:
    return Learner.load(world / "state").save(tmp_path / "s")


def run(arguments: list[Any], encoding: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str, str]:
    """`perpetune …` as a program whose streams have this encoding: the exit code and the two texts."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        for stream in streams:
            stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    return stop.value.code, out, err


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_update_is_learned_and_reported_whatever_the_encoding(
    encoding: str, world: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(["update", state, "--data", world / "m2"], encoding, monkeypatch)
    assert (code, err) == (0, "")
    assert [t["name"] for t in json.loads((state / "report.json").read_bytes())["tasks"]] == ["m1", "m2"]
    falls = "▼" if encoding == "utf-8" else "-"
    assert re.search(rf"after 2 m2: .* {falls}\.\d\d", out), out
    assert f"report: {state / 'report.html'}" in out


@pytest.mark.parametrize("encoding", every(ENCODINGS, 4))
def test_every_verb_prints_in_every_encoding(
    encoding: str, world: Path, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = world / "m1" / "犬" / "0.png"
    verbs: list[list[Any]] = [
        ["predict", state, picture], ["predict", state, picture, "--json"], ["evaluate", state], ["report", state],
        ["log", state], ["compare", state], ["methods"], ["recipes"], ["show", "pegp-lora-cifar100-10"], ["--help"],
        ["export", state, tmp_path / "exported"], ["resume", state], ["rollback", state, "--to", "start"],
        ["init", tmp_path / "新しい", "--model", f"folder:{world / 'model'}"],
    ]  # fmt: skip
    for verb in verbs:
        code, out, err = run(verb, encoding, monkeypatch)
        assert code == 0, (verb, err)
        assert out.strip(), verb
    code, _, err = run(["predict", tmp_path / "ñ犬"], encoding, monkeypatch)
    assert code == 2
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_names_in_json_and_csv_are_the_users_own(encoding: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [world / "m1" / name / "0.png" for name in NAMES]
    code, out, _ = run(["predict", world / "state", *pictures, "--json"], encoding, monkeypatch)
    rows = written(out, "prediction")
    assert code == 0
    assert [row["image"] for row in rows] == [str(p) for p in pictures]
    assert {c["name"] for row in rows for c in row["classes"]} == set(NAMES)
    code, out, _ = run(["predict", world / "state", *pictures, "--csv"], encoding, monkeypatch)
    table = list(csv.DictReader(io.StringIO(out)))
    escapes = [name.encode(encoding, "backslashreplace").decode(encoding) for name in NAMES]
    for row, name in zip(table, escapes, strict=True):
        assert {row["name_1"], row["name_2"], row["name_3"]} == {*escapes}
        assert f"{name}/0.png" in row["image"]


def test_signs_of_ours_have_a_simpler_form(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    cli.output.encode_anything()
    print("".join(SIMPLER), "犬 \udcff", end="", flush=True)
    assert out.buffer.getvalue().decode() == "".join(SIMPLER.values()) + " \\u72ac \\udcff"  # type: ignore[attr-defined]


class Broken(io.TextIOWrapper):
    """A stream that takes nothing any more, after `after` characters."""

    def __init__(self, error: int, after: int = 0):
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.error, self.left = error, after

    def write(self, text: str) -> int:
        self.left -= len(text)
        if self.left < 0:
            raise OSError(self.error, {errno.EPIPE: "Broken pipe", errno.ENOSPC: "No space left on device"}[self.error])
        return len(text)


@pytest.mark.parametrize(("error", "after"), paired([errno.EPIPE, errno.ENOSPC], [0, 30]))
@pytest.mark.parametrize("json_too", [False, True])
def test_output_that_is_lost_loses_no_learning(
    error: int, after: int, json_too: bool, world: Path, state: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdout", Broken(error, after))
    assert call(["update", str(state), "--data", str(world / "m2"), *(["--json"] if json_too else [])]) == 0
    err = capsys.readouterr().err
    reason = {errno.EPIPE: "Broken pipe", errno.ENOSPC: "No space left on device"}[error]
    assert err == f"perpetune: the work is done, but its output could not be written: {reason}\n"
    assert [t["name"] for t in json.loads((state / "report.json").read_bytes())["tasks"]] == ["m1", "m2"]


def test_lost_output_of_a_verb_that_only_shows_is_an_error(
    state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    assert call(["log", str(state)]) == 1
    assert capsys.readouterr().err == "perpetune: the system: No space left on device\n"


def test_a_steady_stream_is_the_stream_in_every_other_way() -> None:
    out = Steady(io.StringIO())
    print("a", file=out)  # type: ignore[arg-type]
    assert (out.getvalue(), out.isatty(), out.lost) == ("a\n", False, None)


# -- notes in a file ----------------------------------------------------------------------------------------


def test_a_line_in_a_file_is_not_wrapped(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    pictures = picture_folder(tmp_path / "m2", ("ant", "bee"), 6)
    for number in range(4):
        (pictures / "ant" / f"a-very-long-name-of-a-broken-picture-{number}.png").write_bytes(b"no picture")
    state = Learner.load(world / "state").save(tmp_path / "s")
    code, out, err = run(["update", state, "--data", pictures], "utf-8", monkeypatch)
    assert code == 0, err
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2, "broken pictures, and new classes"
    assert notes[0].count("a-very-long-name-of-a-broken-picture-") >= 3
    assert any(line.startswith("report: ") for line in out.splitlines())


# -- the last resort ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [TypeError("unhashable type: 'list'"), RuntimeError("shapes\ndo not fit"), ValueError(), RecursionError("too deep"),
     EOFError("ended before the end-of-stream marker"), IndexError("index out of range in self")],
)  # fmt: skip
def test_an_unforeseen_error_is_one_line_and_a_log(
    error: Exception, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.delenv("PERPETUNE_DEBUG", raising=False)
    monkeypatch.setattr(Trained, "load", fail)
    assert call(["evaluate", str(state)]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) <= 2  # typer ends the line that Ctrl-D would have begun
    line = err.strip()
    assert type(error).__name__ in line
    assert " at use.py:" in line
    log = Path(str(re.search(r"the full log is (\S+\.log)", line)[1]))  # type: ignore[index]
    assert log.parent == tmp_path
    assert "Traceback (most recent call last)" in log.read_text(encoding="utf-8")
    assert "test_output.py" in log.read_text(encoding="utf-8")


def test_with_debug_the_traceback_is_shown(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise TypeError("unhashable")

    monkeypatch.setenv("PERPETUNE_DEBUG", "1")
    monkeypatch.setattr(Trained, "load", fail)
    with pytest.raises(TypeError):
        call(["evaluate", str(state)])


# -- devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("mps", "mps is the GPU of a Mac with Apple silicon"),
        ("cuda", "there is no NVIDIA GPU here"),
        ("cuda:7", "GPU"),
        ("gpu", "no device has this name; auto, cpu, cuda, cuda:1 or mps is expected"),
        ("cuda:x", "GPU"),
        ("meta", ""),
        ("xla", "no device has this name"),
    ],
)
def test_a_device_that_is_not_there_is_one_honest_line(
    device: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if (device == "mps" and torch.backends.mps.is_available()) or (device == "cuda" and torch.cuda.is_available()):
        pytest.skip("it is there")
    assert call(["init", str(tmp_path / "n"), "--device", device]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert f"run.device {device!r} cannot be used here: " in err
    assert says in err
    assert err.endswith("; `auto` picks one\n")
    assert not (tmp_path / "n").exists()
