"""One picture under two labels, classes that are nearly called the same, and the same data learned again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import picture_folder

from perpetune import Learner
from perpetune.cli import call
from perpetune.data.names import alike
from perpetune.data.pictures.arrow import ParquetSource
from perpetune.data.pictures.folder import FolderSource
from perpetune.data.pictures.manifest import ManifestSource
from perpetune.data.pictures.view import PictureView
from perpetune.data.sources import Source
from perpetune.data.stream import StreamOptions, build_stream, single_task
from perpetune.errors import DataError
from perpetune.runtime import Silent

RECIPE = {"backbone": "perpetune:micro", "pet": "none", "method": "frozen", "head": "ridge", "run": {"device": "cpu"}}


def task(source: Source, **options):
    view = PictureView(size=8)
    return single_task(source, StreamOptions(**options), view, index=0, name="t", seed=0, holdout=0.0)


@pytest.fixture
def pics(tmp_path) -> Path:
    return picture_folder(tmp_path / "pics", ["x", "y"], 4)


ROWS = [(f"pics/{c}/{n}.png", c) for c in "xy" for n in range(4)]


def manifest(pics: Path, rows: list[tuple[str, str]]) -> ManifestSource:
    path = pics.parent / "m.csv"
    path.write_text("path,label\n" + "".join(f"{p},{label}\n" for p, label in rows))
    return ManifestSource(path=str(path))


@pytest.mark.parametrize(
    "spelled", ["pics/x/0.png", "./pics/x/0.png", "pics/y/../x/0.png", "pics//x/0.png", "{}/pics/x/0.png"]
)
def test_one_path_in_several_spellings(pics, spelled):
    again = spelled.format(pics.parent)
    with pytest.raises(DataError, match=r"m.csv line 10: .*0.png has label 'y', but 'x' before \(.*m.csv line 2\)$"):
        manifest(pics, [*ROWS, (again, "y")]).train()
    table = manifest(pics, [*ROWS, (again, "x")]).train()
    assert len(table) == 8
    assert "1 rows repeat an earlier row" in table.warnings[0]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_one_file_by_two_names(pics, link):
    link(pics / "x" / "0.png", pics / "y" / "link.png")
    message = r"one file has two labels: .*x.0.png \('x'\) = .*y.link.png \('y'\); remove it from one of them"
    for source in (FolderSource(path=str(pics)), manifest(pics, [*ROWS, ("pics/y/link.png", "y")])):
        with pytest.raises(DataError, match=message):
            task(source)
        with pytest.raises(DataError, match=message):
            build_stream(source, StreamOptions(classes_per_task=1), PictureView(size=8), seed=0)
        with pytest.raises(DataError, match=message):
            task(source, check="none")


def test_one_test_file_by_two_names(pics, tmp_path):
    test = picture_folder(tmp_path / "test", ["x", "y"], 2, first=50)
    os.symlink(test / "x" / "50.png", test / "y" / "link.png")
    with pytest.raises(DataError, match=r"one file has two labels: .*50.png \('x'\) = .*link.png \('y'\)"):
        task(FolderSource(path=str(pics), test=str(test)))


def test_twins_in_two_classes(pics, tmp_path):
    shutil.copy(pics / "x" / "1.png", pics / "y" / "copy.png")
    expected = [f"1 pictures are there under two labels, byte for byte: {pics}/x/1.png ('x') = {pics}/y/copy.png ('y')"]
    assert task(FolderSource(path=str(pics))).warnings == expected
    assert (
        build_stream(
            FolderSource(path=str(pics)), StreamOptions(classes_per_task=2), PictureView(size=8), seed=0
        ).warnings[:1]
        == expected
    )
    assert task(FolderSource(path=str(pics)), check="none").warnings == []
    import pyarrow as pa
    import pyarrow.parquet as pq

    same = (pics / "x" / "1.png").read_bytes()
    other = (pics / "y" / "1.png").read_bytes()
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"image": [same, same, other], "label": ["x", "y", "y"]}), path)
    (warning,) = task(ParquetSource(path=str(path))).warnings
    assert warning.endswith(f"byte for byte: {path} row 0 ('x') = {path} row 1 ('y')")


def test_twins_in_two_domains(pics, tmp_path):
    for domain, label in (("p", "x"), ("q", "y")):
        (tmp_path / "d" / domain / label).mkdir(parents=True)
        shutil.copy(pics / "x" / "1.png", tmp_path / "d" / domain / label / "1.png")
    assert task(FolderSource(path=str(tmp_path / "d"))).warnings == []  # each domain has its own labels


def test_alike():
    assert alike(["Ant", "ant", "bee", "Bee ", "fire-truck", "fire_truck", "no"]) == [
        *("'Ant' and 'ant'", "'bee' and 'Bee '", "'fire-truck' and 'fire_truck'"),
    ]
    assert alike(["cat", "dog"], ["Cat", "CAT", "dog"]) == ["'CAT' and 'cat'"]
    assert alike(["a1", "a-1", "ab"]) == []


def test_classes_nearly_alike_in_one_batch(pics):
    picture_folder(pics, ["Y"], 2, first=70)
    assert task(FolderSource(path=str(pics))).warnings == ["classes whose names are nearly the same: 'Y' and 'y'"]


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_months(tmp_path):
    notes = Notes()
    learner = Learner(dict(RECIPE), tmp_path / "s", progress=notes)
    first = picture_folder(tmp_path / "2026-08", ["ant", "bee"], 5)
    learner.learn(first)
    assert notes.notes == []
    learner.learn(picture_folder(tmp_path / "2026-09", ["bee", "Ant", "cat"], 5, first=100))
    assert notes.notes == [
        "task 2026-09 has new classes nearly called like earlier ones: 'ant' and 'Ant'",
        "task 2026-09 brings new classes: Ant, cat",
    ]
    notes.notes.clear()
    shutil.copytree(first, tmp_path / "copy")
    learner.learn(tmp_path / "copy", name="again")
    line = "task again learns again: 10 of 10 pictures were learned before, as task 2026-08"
    assert notes.notes == [line]
    notes.notes.clear()
    learner.learn(picture_folder(tmp_path / "2026-10", ["bee"], 5, first=200))
    assert notes.notes == []


def test_months_are_told_on_the_command_line(tmp_path, capfd):
    state = str(tmp_path / "s")
    sets = [word for key in ("pet=none", "method=frozen", "run.device=cpu") for word in ("--set", key)]
    assert call(["init", state, "--model", "perpetune:micro", *sets]) == 0
    month = picture_folder(tmp_path / "a", ["ant", "bee"], 5)
    assert call(["update", state, "--data", str(month)]) == 0
    capfd.readouterr()
    assert call(["update", state, "--data", str(month), "--name", "b", "--json"]) == 0
    said = capfd.readouterr()
    assert "learned before" in said.out + said.err
    document = json.loads((tmp_path / "s" / "tasks" / "0001-b" / "task.json").read_text())
    assert document["warnings"] == ["task b learns again: 10 of 10 pictures were learned before, as task a"]
    assert document["contents"]["count"] == 10
    assert len(document["contents"]["hashes"]) == 160
