"""What spreadsheets, Git LFS and other programs leave: rows and columns of nothing, pointers, pipes, large inputs."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from tiny import picture_folder

from perpetune.data.parquet import read_schema
from perpetune.data.pictures import read, tables, view
from perpetune.data.pictures.arrow import ParquetSource
from perpetune.data.pictures.folder import FolderSource
from perpetune.data.pictures.manifest import ManifestSource
from perpetune.data.pictures.read import read_header, read_picture
from perpetune.data.stream import StreamOptions, single_task
from perpetune.data.texts.files import FileSource
from perpetune.errors import DataError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ROWS = [("1.png", "x"), ("2.png", "y"), ("3.png", "x")]


def learned(path: Path, **options):
    table = ManifestSource(path=str(path), **options).train()
    return list(zip(table.paths, table.labels, strict=True)), table.warnings


def task(source, **options):
    return single_task(
        source, StreamOptions(**options), view.PictureView(size=8), index=0, name="t", seed=0, holdout=0.0
    )


# -- what Excel leaves ---------------------------------------------------------------------------------

BODY = "path,label\n1.png,x\n2.png,y\n3.png,x\n"
SHEETS = {
    "trailing_comma": "path,label,\n1.png,x,\n2.png,y,\n3.png,x,\n",
    "trailing_commas": "path,label,,\n1.png,x,,\n2.png,y,,\n3.png,x,,\n",
    "commas_in_rows_alone": "path,label\n1.png,x,,\n2.png,y\n3.png,x,\n",
    "rows_of_commas": BODY + ",\n,\n\n , \n",
    "rows_of_many_commas": BODY + ",,,,,\n",
    "sep": "sep=;\r\n" + BODY.replace(",", ";").replace("\n", "\r\n"),
    "sep_comma": "SEP=,\n" + BODY,
    "tabs": BODY.replace(",", "\t"),
    "old_mac": BODY.replace("\n", "\r"),
    "mark": "\ufeff" + BODY,
    "mark_and_sep": "\ufeffsep=;\n" + BODY.replace(",", ";"),
}


@pytest.mark.parametrize("name", SHEETS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_sheets(tmp_path, name, encoding):
    text = SHEETS[name].lstrip("\ufeff") if encoding == "utf-16" else SHEETS[name]
    (tmp_path / "m.csv").write_bytes(text.encode(encoding))
    assert learned(tmp_path / "m.csv") == (ROWS, [])


@pytest.mark.parametrize(
    ("text", "unused"),
    [
        (",path,label\n0,1.png,x\n1,2.png,y\n2,3.png,x\n", "(column 1)"),
        ("path,,label,\n1.png,a,x,\n2.png,,y,b\n3.png,,x,\n", "(column 2), (column 4)"),
        ("path,label,when,who\n1.png,x,a,b\n2.png,y,,\n3.png,x,,\n", "when, who"),
    ],
)
def test_columns_that_are_not_used_are_said(tmp_path, text, unused):
    (tmp_path / "m.csv").write_text(text)
    assert learned(tmp_path / "m.csv") == (ROWS, [f"{tmp_path / 'm.csv'}: columns that are not used: {unused}"])


def test_unused_columns_of_the_other_readers(tmp_path):
    rows = [{"path": path, "label": label, "prompt": "x", "split": "train"} for path, label in ROWS]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert learned(tmp_path / "m.jsonl") == (ROWS, [f"{tmp_path / 'm.jsonl'}: columns that are not used: prompt"])
    source = ManifestSource(path=str(tmp_path / "m.jsonl"), test=str(tmp_path / "m.jsonl"))
    assert source.train().warnings == [f"{tmp_path / 'm.jsonl'}: columns that are not used: prompt, split"]
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"image": [b"x"], "label": ["a"], "prompt": ["x"], "id": [1], "task": ["t"]}), path)
    assert ParquetSource(path=str(path)).train().warnings == [f"{path}: columns that are not used: prompt, id"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n1.png,x,extra\n", "m.csv line 2: 3 cells; the header has 2"),
        ("path,label,\n1.png,x\n", "m.csv line 2: 2 cells; the header has 3"),
        ("sep=;\npath;label\n1.png;x;extra\n", "m.csv line 3: 3 cells; the header has 2"),
        ("path,label\n,\n,\n", "m.csv: no rows"),
        ("sep=;\n", "m.csv: no header line"),
        (
            "Path,Label\n1.png,x\n",
            "found: Path, Label; another one is named with data.path_column or --set path_column=Path",
        ),
    ],
)
def test_faulty_sheets(tmp_path, text, message):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        learned(tmp_path / "m.csv")
    assert message in str(caught.value)


def test_broken_utf16(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"\xff\xfea")
    with pytest.raises(DataError, match=r"m\.csv: not UTF-16 text"):
        learned(tmp_path / "m.csv")


# -- Git LFS -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "m.json", "m.tsv", "p.parquet", "t.jsonl", "t.json"])
def test_pointers(tmp_path, name):
    path = tmp_path / name
    path.write_text(POINTER)
    reader = {"m": ManifestSource, "p": ParquetSource, "t": FileSource}[name[0]]
    with pytest.raises(DataError, match=r"a Git LFS pointer, and not the file itself: run `git lfs pull`") as caught:
        reader(path=str(path)).train()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pictures_that_are_pointers(tmp_path):
    picture_folder(tmp_path, ["a", "b"], 3)
    (tmp_path / "a" / "lfs.png").write_text(POINTER)
    line = f"{tmp_path}/a/lfs.png: a Git LFS pointer, and not the file itself: run `git lfs pull` where it lies"
    for look in (read_picture, read_header):
        for source in (str(tmp_path / "a" / "lfs.png"), POINTER.encode()):
            with pytest.raises(DataError) as caught:
                look(source, f"{tmp_path}/a/lfs.png")
            assert str(caught.value) == line
    data = task(FolderSource(path=str(tmp_path)))
    data.check()
    assert data.bad == [line]


# -- what is no file -----------------------------------------------------------------------------------


@pytest.fixture
def pipe(tmp_path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("at", ["/dev/zero", "pipe", "link"])
def test_pipes_and_devices_are_no_pictures(tmp_path, pipe, at):
    os.symlink(pipe, tmp_path / "link")
    path = str(tmp_path / at)
    for look in (read_picture, read_header):
        with pytest.raises(DataError, match="x: not a file, but a pipe, a socket or a device"):
            look(path, "x")
    (tmp_path / "m.csv").write_text(f"path,label\n{path},a\n")
    data = task(ManifestSource(path=str(tmp_path / "m.csv")))
    with pytest.raises(DataError, match=r"no training picture can be read: .*not a file"):
        data.check()


def test_a_pipe_in_a_class_folder(tmp_path, pipe):
    picture_folder(tmp_path / "pics", ["a", "b"], 2)
    os.mkfifo(tmp_path / "pics" / "a" / "pipe.png")
    os.symlink(pipe, tmp_path / "pics" / "b" / "link.png")
    data = task(FolderSource(path=str(tmp_path / "pics")))
    data.check()
    assert len(data.train) == 4
    assert data.bad == [f"{tmp_path}/pics/b/link.png: not a file, but a pipe, a socket or a device"]


@pytest.mark.parametrize("reader", [ManifestSource, ParquetSource, FolderSource, FileSource])
def test_pipes_are_no_data(pipe, reader):
    with pytest.raises(DataError, match="pipe: neither a file nor a folder"):
        reader(path=str(pipe)).train()


def test_a_pipe_is_no_parquet_file(pipe):
    with pytest.raises(DataError, match="pipe: neither a file nor a folder"):
        read_schema(str(pipe))


# -- very large ----------------------------------------------------------------------------------------


def test_large_pictures_are_said_and_read_one_at_a_time(tmp_path, monkeypatch):
    picture_folder(tmp_path, ["a"], 90)
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "small.png")
    for module in (read, tables):
        monkeypatch.setattr(module, "LARGE", 100)
    monkeypatch.setattr(view, "LARGE", 10**6)
    inside, most, real = [], [], read.as_rgb

    def watched(image):
        if image.width > 10:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.001)
            inside.pop()
        return real(image)

    monkeypatch.setattr(read, "as_rgb", watched)
    data = task(FolderSource(path=str(tmp_path)))
    data.check()
    assert max(most) == 1
    (note,) = data.warnings
    assert note.startswith(
        "task t: 90 pictures have more than 1 million pixels, and each is read anew in every epoch; "
    )
    assert note.endswith("and 85 more")
    assert threading.active_count() < 50


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_over_the_limit(monkeypatch):
    stream = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(stream, "PNG")
    with pytest.raises(DataError, match="x: larger than Pillow's limit of 89478485 pixels"):
        read_picture(stream.getvalue(), "x")


LONG = "x" * 10_000_000


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": LONG, "label": "a"}, "column 'path' holds 10000000 characters; at most 4096 are a name"),
        ({"path": "a.png", "label": LONG}, "column 'label' holds 10000000 characters; at most 4096 are a name"),
        ({"path": "a.png", "label": "a", "task": LONG}, "column 'task' holds 10000000 characters; at most 4096"),
        ({"path": "a.png", LONG: "a"}, "no column 'label'; found: path, xxx"),
    ],
)
def test_names_of_ten_megabytes(tmp_path, row, message):
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError) as caught:
        ManifestSource(path=str(tmp_path / "m.jsonl")).train()
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_labels_of_ten_megabytes_in_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [b"x"], "label": [LONG]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="row 0: column 'label' holds 10000000 characters; at most 4096 are a name"):
        ParquetSource(path=str(tmp_path / "p.parquet")).train()
