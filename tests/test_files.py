"""Files are there whole or not at all, and nothing torn is ever read."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetune import files
from perpetune.errors import StateError
from perpetune.files import MANIFEST, read_folder, remove_folder, remove_leftovers, to_json, write_file, write_folder

CONTENT = {"a.safetensors": bytes(range(40)), "b.json": b'{"x": 1}\n', "empty": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "0001-x", CONTENT)
    return tmp_path / "0001-x"


def test_what_is_written_is_read(folder: Path) -> None:
    assert read_folder(folder) == CONTENT
    assert sorted(path.name for path in folder.parent.iterdir()) == ["0001-x"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*CONTENT, MANIFEST])


@given(st.dictionaries(st.sampled_from(["a", "b.json", "ä ö", "c" * 100]), st.binary(max_size=200)))
def test_any_content_is_read_back(tmp_path_factory: pytest.TempPathFactory, content: dict[str, bytes]) -> None:
    folder = tmp_path_factory.mktemp("any") / "folder"
    write_folder(folder, content)
    assert read_folder(folder) == content


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_never_written_over(folder: Path) -> None:
    with pytest.raises(OSError):
        write_folder(folder, {"a.safetensors": b"other"})
    assert read_folder(folder) == CONTENT


@pytest.mark.parametrize("write", ["file", "folder"])
def test_an_error_names_what_was_to_be_written(write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("perpetune.files.os.fsync", full)
    path = tmp_path / "report.html"
    with pytest.raises(OSError, match="No space left") as found:
        write_file(path, b"x") if write == "file" else str(write_folder(path, {"a": b"x"}))
    assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(path))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist_is_named_by_what_was_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as found:
        write_file(tmp_path / "none" / "report.md", b"x")
    assert found.value.filename == str(tmp_path / "none" / "report.md")


def test_what_a_crash_left_is_written_over(tmp_path: Path) -> None:
    aside = tmp_path / ".0001-x.tmp"
    aside.mkdir()
    (aside / "stranger").write_bytes(b"half")
    write_folder(tmp_path / "0001-x", CONTENT)
    assert read_folder(tmp_path / "0001-x") == CONTENT
    assert not (tmp_path / "0001-x" / "stranger").exists()


def told(error: pytest.ExceptionInfo[StateError], name: str) -> None:
    line = str(error.value)
    assert name in line
    assert "\n" not in line
    assert "do this" in line


@pytest.mark.parametrize("name", [*CONTENT, MANIFEST])
def test_no_truncated_file_is_read(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for length in range(len(whole)):
        # The manifest's last byte is the line's end, without which it says the same.
        if name == MANIFEST and length == len(whole) - 1:
            continue
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(StateError) as error:
            read_folder(folder, "do this")
        told(error, name)


@pytest.mark.parametrize("name", ["a.safetensors", "b.json"])
def test_no_changed_bit_is_read(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        (folder / name).write_bytes(_flipped(whole, bit))
        with pytest.raises(StateError) as error:
            read_folder(folder, "do this")
        told(error, name)


def test_no_changed_bit_of_the_manifest_is_read(folder: Path) -> None:
    """A changed name or hash shows as a file that is missing or differs; nothing is read all the same."""
    whole = (folder / MANIFEST).read_bytes()
    for bit in range(0, 8 * len(whole), 7):  # bit 0, 7, 6, … of the bytes in turn
        (folder / MANIFEST).write_bytes(_flipped(whole, bit))
        with pytest.raises(StateError) as error:
            read_folder(folder, "do this")
        told(error, str(folder))


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("name", [*CONTENT, MANIFEST])
def test_no_missing_file_is_read_over(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(StateError, match="No such file") as error:
        read_folder(folder, "do this")
    told(error, name)


@pytest.mark.parametrize("name", ["a.safetensors", "b.json", MANIFEST])
def test_no_file_of_another_folder_is_read(folder: Path, name: str) -> None:
    other = folder.with_name("0002-y")
    write_folder(other, {key: value[::-1] for key, value in CONTENT.items()})
    shutil.copy(other / name, folder / name)
    with pytest.raises(StateError) as error:
        read_folder(folder, "do this")
    told(error, "a.safetensors" if name == MANIFEST else name)


def test_a_file_where_a_folder_is_expected(tmp_path: Path) -> None:
    (tmp_path / "0000-x").write_bytes(b"no folder")
    with pytest.raises(StateError, match="Not a directory") as error:
        read_folder(tmp_path / "0000-x", "do this")
    told(error, MANIFEST)


ENTRY = {"bytes": 5, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        3,
        None,
        {"a": None},
        {"a": [1, 2]},
        {"a": {"bytes": 1}},
        {"a": {"bytes": "many", "sha256": "0"}},
        {"../../secret": ENTRY},
        {"/etc/hostname": ENTRY},
        {"..": ENTRY},
        {"": ENTRY},
        {"a\0b": ENTRY},
    ],
)
def test_a_manifest_of_another_kind(folder: Path, manifest: Any) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StateError) as error:
        read_folder(folder, "do this")
    told(error, str(folder))


def test_a_removed_folder_is_gone_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is out of sight before the first of its files is deleted."""
    seen: list[bool] = []
    unlink = os.unlink

    def watched(*args: Any, **options: Any) -> None:
        seen.append(folder.exists())
        unlink(*args, **options)

    monkeypatch.setattr(os, "unlink", watched)
    remove_folder(folder)
    assert seen == [False] * (len(CONTENT) + 1)
    assert list(folder.parent.iterdir()) == []
    remove_folder(folder)  # what is not there is no fault


def test_leftovers_and_nothing_else_is_removed(tmp_path: Path) -> None:
    for name in (".0001-x.tmp", ".resume.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    (tmp_path / ".recipe.yaml.tmp").write_bytes(b"half")
    kept = [".lock", "0001-x", "notes.tmp", "recipe.yaml"]
    for name in kept:
        (tmp_path / name).write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


Write = Callable[[Path], None]


@pytest.mark.parametrize(
    ("write", "written"),
    [
        (lambda path: write_file(path, b"content"), [".x.tmp"]),
        (lambda path: write_folder(path, CONTENT), [*(f".x.tmp/{n}" for n in [*CONTENT, MANIFEST]), ".x.tmp"]),
    ],
)
def test_synced_before_the_rename_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, written: list[str]
) -> None:
    """A power cut keeps what was synced: all files, then the folder, then the name."""
    done: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def watched_fsync(descriptor: int) -> None:
        done.append(re.sub(r"\.[0-9a-f]{16}(?=\.tmp)", "", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watched(move: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def moved(source: Any, target: Any) -> None:
            done.append("rename")
            move(source, target)

        return moved

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to know what a descriptor is")
    monkeypatch.setattr(files.os, "fsync", watched_fsync)
    monkeypatch.setattr(files.os, "rename", watched(rename))
    monkeypatch.setattr(files.os, "replace", watched(replace))
    write(tmp_path / "x")
    assert done == [*(str(tmp_path / name) for name in written), "rename", str(tmp_path)]


def test_json_is_read_back_and_ends_its_line() -> None:
    value = {"ä": [1, 2.5, None], "b": {"c": "d"}}
    assert json.loads(to_json(value)) == value
    assert to_json(value).endswith(b"}\n")
