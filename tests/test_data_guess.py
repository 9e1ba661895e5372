"""What a path holds, asked with the backbone in mind; keys of the data section for `update` and `evaluate`."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import picture, picture_folder, written

from perpetune import Learner, registry
from perpetune.cli import call
from perpetune.data.guess import guess_source
from perpetune.data.pictures.manifest import ManifestSource
from perpetune.data.sources import Source
from perpetune.errors import DataError, MissingExtra, UsageError
from perpetune.sequence import origin_of

CLASSES = ("ant", "bee")
ROWS = [(label, number) for label in CLASSES for number in range(5)]


def made(path: str | Path, kind: str | None = "pictures") -> str:
    return guess_source(str(path), registry.every("data"), kind)[0]  # type: ignore[arg-type]


def source(path: str | Path, kind: str = "pictures") -> Source:
    origin = origin_of(path, kind)  # type: ignore[arg-type]
    name = origin.pop("name")
    found: Source = registry.find("data", name)(**registry.options("data", name, origin))
    return found


def png(label: str, number: int) -> bytes:
    stream = io.BytesIO()
    picture(label, number).save(stream, "PNG")
    return stream.getvalue()


def lines(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, **columns: list[object]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    return picture_folder(tmp_path / "pics", CLASSES, 5)


BESIDE = {
    "captions.jsonl": '{"file": "ant/0.png", "prompt": "a photo"}\n',
    "train.jsonl": '{"prompt": "x", "answer": "y"}\n',
    "dataset_info.json": '{"name": "bugs", "version": "1.0"}',
    "state.json": "{}",
    "labels.json": '["ant", "bee"]',
    "_annotations.coco.json": '{"prompt": []}',
    "metadata.csv": "file_name,prompt\nant/0.png,x\n",
    "ant/prompts.jsonl": '{"messages": []}\n',
    "ant/train.jsonl": '{"prompt": "x", "answer": "y"}\n',
}


@pytest.mark.parametrize("name", [*BESIDE, "metadata.parquet"])
@pytest.mark.parametrize("kind", ["pictures", None])
def test_files_beside_class_folders(pictures, name, kind):
    if name.endswith(".parquet"):
        parquet(pictures / name, prompt=["x"])
    else:
        (pictures / name).write_text(BESIDE[name])
    assert made(pictures, kind) == "folder"
    assert sorted(source(pictures).train().labels) == ["ant"] * 5 + ["bee"] * 5


def test_manifests_with_prompts(pictures, tmp_path):
    rows = [{"path": f"pics/{c}/{n}.png", "label": c, "prompt": "a photo"} for c, n in ROWS]
    with open(tmp_path / "m.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "prompt"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "m.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in (lines(tmp_path / "m.jsonl", rows), tmp_path / "m.csv", tmp_path / "m.json", tmp_path / "lines.json"):
        assert made(path) == "manifest"
        assert sorted(source(path).train().labels) == ["ant"] * 5 + ["bee"] * 5
    table = parquet(
        tmp_path / "p.parquet", image=[png(*r) for r in ROWS], label=[r[0] for r in ROWS], prompt=["x"] * 10
    )
    assert made(table) == "parquet"
    assert source(table).train().labels == [r[0] for r in ROWS]
    assert made(tmp_path / "m.jsonl", "texts") == made(tmp_path / "m.json", "texts") == "text"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"m.json item 1: expected an object"),
        ('{"path": 1', r"m.json line 1: not JSON"),
        ("7", r"m.json: expected an array of objects"),
        ("[", r"m.json: not JSON"),
        ("[]", r"m.json: no rows"),
        ("", r"m.json: not JSON"),
    ],
)
def test_faulty_json_manifests(tmp_path, text, message):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(DataError, match=message):
        ManifestSource(path=str(tmp_path / "m.json")).train()


def test_another_kind_is_said(pictures, tmp_path):
    (tmp_path / "m.csv").write_text("path,label\na,b\n")
    for path, reader in ((pictures, "folder"), (tmp_path / "m.csv", "manifest")):
        with pytest.raises(
            UsageError, match=f"for the reader `{reader}`: these are pictures, and the backbone takes texts"
        ):
            made(path, "texts")
    (tmp_path / "t").mkdir()
    lines(tmp_path / "t" / "train.jsonl", [{"prompt": "x", "answer": "y"}])
    with pytest.raises(UsageError, match="for the reader `text`: these are texts, and the backbone takes pictures"):
        made(tmp_path / "t")
    with pytest.raises(
        DataError, match=r"found: prompt, answer; .*; a column prompt is of texts, and these are read as"
    ):
        source(tmp_path / "t" / "train.jsonl").train()
    assert made(tmp_path / "t", "texts") == "text"


@pytest.mark.parametrize(
    "path", ["2026-12", "./2026-12", "pics/2026-12", "a/b/c", "x/y.csv.gz", "my folder", "C:\\d", "s3://b/x"]
)
@pytest.mark.parametrize("kind", ["pictures", "texts", None])
def test_a_path_that_is_not_there(pictures, tmp_path, monkeypatch, path, kind):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder") as caught:
        made(path, kind)
    assert str(caught.value).startswith(f"{path}: no such file or folder")


@pytest.mark.parametrize("path", ["", " ", "\t"])
def test_an_empty_path(path):
    with pytest.raises(UsageError, match="the path is empty"):
        origin_of(path)


@pytest.mark.parametrize(
    ("name", "cure"), [("d.zip", "unpack this archive"), ("a.tar.gz", "unpack"), ("a.xlsx", "as CSV")]
)
@pytest.mark.parametrize("kind", ["pictures", "texts", None])
def test_other_forms(tmp_path, name, cure, kind):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UsageError, match=f"{name}: expected .*; .*{cure}"):
        made(tmp_path / name, kind)


@pytest.mark.filterwarnings("ignore:owner/name")
def test_the_hub_is_asked_for_ids_alone(monkeypatch):
    with pytest.warns(UserWarning, match="^owner/name: no such file or folder here; the reader `hf` is asked for data"):
        assert made("owner/name") == "hf"
    with pytest.raises(DataError, match=r"^owner/name: no such file or folder"):
        made("owner/name", "texts")
    with pytest.raises(
        DataError, match=r"data set owner/name: no such file or folder, and from the Hugging Face hub: "
    ):
        source("owner/name").train()
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        MissingExtra, match=r"^owner/name: no such file or folder; to ask the Hugging Face hub needs a pa"
    ):
        source("owner/name").train()


@pytest.mark.parametrize("name", ["pipe", "pipe.csv", "pipe.jsonl", "pipe.json", "pipe.parquet"])
@pytest.mark.parametrize("kind", ["pictures", "texts", None])
def test_pipes_are_refused(tmp_path, name, kind):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: neither a file nor a folder"):
        made(tmp_path / name, kind)


def test_columns_by_another_name(pictures, tmp_path):
    rows = [{"file_name": f"pics/{c}/{n}.png", "class": c} for c, n in ROWS]
    path = lines(tmp_path / "m.jsonl", rows)
    with pytest.raises(
        DataError, match=r"no column 'path'; .*named with data.path_column or --set path_column=file_name$"
    ):
        ManifestSource(path=str(path)).train()
    with pytest.raises(DataError, match=r"no column 'label'; .*data.label_column or --set label_column=class$"):
        ManifestSource(path=str(path), path_column="file_name").train()
    table = parquet(tmp_path / "p.parquet", img=[png(*r) for r in ROWS], fine_label=[r[0] for r in ROWS])
    with pytest.raises(DataError, match=r"no column 'image'; .*data.image_column or --set image_column=img$"):
        source(table).train()


def test_update_and_evaluate_take_the_same_keys(pictures, tmp_path, capfd):
    state = tmp_path / "s"
    rows = [{"file_name": f"pics/{c}/{n}.png", "class": c, "prompt": "x"} for c, n in ROWS]
    path = lines(tmp_path / "m.jsonl", rows)
    sets = ["--set", "path_column=file_name", "--set", "label_column=class"]
    recipe = ["--set", "pet=none", "--set", "method=frozen", "--set", "run.device=cpu"]
    assert call(["init", str(state), "-q", "--model", "perpetune:micro", *recipe]) == 0
    assert call(["update", str(state), "--data", str(path), *sets, "-q"]) == 0
    capfd.readouterr()
    assert call(["evaluate", str(state), "--data", str(path), "--json"]) == 1
    assert "--set path_column=file_name" in capfd.readouterr().err
    assert call(["evaluate", str(state), "--data", str(path), *sets, "--json"]) == 0
    (cell,) = written(capfd.readouterr().out, "done")[0]["cells"].values()
    assert cell["total"] == 10
    named = ["--set", "name=folder"]  # the reader by name: nothing is guessed
    shutil.copy(path, pictures / "captions.jsonl")
    assert call(["evaluate", str(state), "--data", str(pictures), *named, "--json"]) == 0
    assert call(["evaluate", str(state), "--set", "path_column=file"]) == 2
    assert "there is no --data" in capfd.readouterr().err
    assert call(["evaluate", str(state), "--data", str(path), "--set", "pth=x"]) == 2
    assert "pth is not an option" in capfd.readouterr().err
    learner = Learner.load(state)
    with pytest.raises(UsageError, match="options need data that are a path or an id"):
        learner.evaluate(options={"path_column": "x"})
