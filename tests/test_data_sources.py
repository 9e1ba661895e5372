"""Folders, manifests, parquet files, data sets and the digits all give the same kind of table."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perpetune import registry
from perpetune.data.guess import guess_source
from perpetune.data.pictures.arrow import ParquetSource
from perpetune.data.pictures.digits import DigitsSource
from perpetune.data.pictures.folder import FolderSource
from perpetune.data.pictures.hub import HubSource
from perpetune.data.pictures.manifest import ManifestSource
from perpetune.data.sources import Source
from perpetune.errors import DataError, MissingExtra, UsageError


def guess(path: str) -> tuple[str, dict[str, Any]]:
    return guess_source(path, registry.every("data"))


def png(color=(1, 2, 3), size=(2, 2)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def tree(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((i, i, i)))
    return root


def records(table):
    groups = table.groups or [None] * len(table)
    return sorted((table.key(i), table.labels[i], groups[i]) for i in range(len(table)))


# -- folders ------------------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    tree(
        tmp_path, "cat/10.png", "cat/2.png", "Cat/x.png", "dög/y.JPG", "dög/deep/z.png", "cat/.hidden.png", ".git/z.png"
    )
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "fish").mkdir()
    source = FolderSource(path=str(tmp_path))
    table = source.train()
    assert table.paths == ["Cat/x.png", "cat/2.png", "cat/10.png", "dög/y.JPG", "dög/deep/z.png"]
    assert table.labels == ["Cat", "cat", "cat", "dög", "dög"]
    assert table.groups is None
    assert table.warnings == [
        f"{tmp_path}: no picture in fish",
        f"{tmp_path}: ignored 1 files that are not pictures in a class folder: 1 .txt",
    ]
    assert table.name(1) == str(tmp_path / "cat/2.png")
    assert table.open(1).getpixel((0, 0)) == (1, 1, 1)
    assert source.test() is None


def test_files_that_are_no_pictures_are_told_by_suffix(tmp_path):
    tree(tmp_path, "cat/1.png")
    for name in ("a.txt", "b.TXT", "c.txt", "d.HEIC", "README"):
        (tmp_path / "cat" / name).write_text("x")
    (warning,) = FolderSource(path=str(tmp_path)).train().warnings
    assert warning.endswith("in a class folder: 1 .heic, 3 .txt, 1 without a suffix")


def test_no_suffix_of_ignored_files_is_hidden(tmp_path):
    tree(tmp_path, "cat/1.png")
    for name in ("a.txt", "b.ico", "c.svg", "d.heic", "e.tga", "f.mp4", "README"):
        (tmp_path / "cat" / name).write_text("x")
    (warning,) = FolderSource(path=str(tmp_path)).train().warnings
    assert warning.endswith("class folder: 1 .heic, 1 .ico, 1 .mp4, 1 .svg, 1 .tga, 1 .txt, 1 without a suffix")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take these names for one already")
def test_folders_of_one_class_are_told(tmp_path):
    tree(tmp_path, "cat/1.png", "cat /2.png", "Café/1.png", "Cafe\u0301/2.png", "dog/1.png")
    table = FolderSource(path=str(tmp_path)).train()
    assert Counter(table.labels) == {"cat": 2, "Café": 2, "dog": 1}
    assert table.warnings == [
        f"{tmp_path}: spelled in several ways, and taken for one: 'Cafe\\u0301' and 'Café', 'cat' and 'cat '"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take these names for one already")
def test_domains_and_their_classes_are_told_apart(tmp_path):
    tree(tmp_path, "photo/cat/1.png", "photo /cat/1.png", "sketch/cat /1.png", "sketch/photo  /1.png")
    table = FolderSource(path=str(tmp_path)).train()
    assert Counter(table.groups) == {"photo": 2, "sketch": 2}
    start = f"{tmp_path}: spelled in several ways, and taken for one: "
    assert table.warnings == [f"{start}'cat' and 'cat '", f"{start}'photo' and 'photo '"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_cells_of_one_class_are_told(tmp_path, suffix):
    rows = [("a.png", "cat", "x"), ("b.png", " cat", "x "), ("c.png", "dog", "x")]
    if suffix == "csv":
        lines = ["path,label,domain", *(",".join(row) for row in rows)]
    else:
        lines = [json.dumps(dict(zip(("path", "label", "domain"), row, strict=True))) for row in rows]
    manifest = tmp_path / f"m.{suffix}"
    manifest.write_text("\n".join(lines) + "\n")
    table = ManifestSource(path=str(manifest)).train()
    assert (table.labels, table.groups) == (["cat", "cat", "dog"], ["x", "x", "x"])
    told = "spelled in several ways, and taken for one"
    assert table.warnings == [
        f"{manifest}: column 'label': {told}: 'cat' and ' cat'",
        f"{manifest}: column 'domain': {told}: 'x' and 'x '",
    ]


def test_cells_of_one_class_in_parquet_are_told(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures = [{"bytes": png(c), "path": None} for c in ((1, 1, 1), (2, 2, 2), (3, 3, 3))]
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": pictures, "label": ["cat", "dog", "cat "]}), file)
    table = ParquetSource(path=str(file)).train()
    assert table.labels == ["cat", "dog", "cat"]
    assert table.warnings == [f"{file}: column 'label': spelled in several ways, and taken for one: 'cat' and 'cat '"]


def test_domain_folders(tmp_path):
    tree(tmp_path, "photo/cat/1.png", "photo/dog/1.png", "sketch/cat/1.png", "sketch/loose.png")
    with pytest.raises(
        DataError, match=r"some folders have pictures \(sketch\), others have only .* \(photo\); set layout"
    ):
        FolderSource(path=str(tmp_path)).train()
    table = FolderSource(path=str(tmp_path), layout="domains").train()
    assert records(table) == [
        ("photo/cat/1.png", "cat", "photo"),
        ("photo/dog/1.png", "dog", "photo"),
        ("sketch/cat/1.png", "cat", "sketch"),
    ]
    assert table.warnings == [f"{tmp_path}: ignored 1 files that are not pictures in a class folder: 1 .png"]
    (tmp_path / "sketch/loose.png").unlink()
    assert records(FolderSource(path=str(tmp_path)).train()) == records(table)
    classes = FolderSource(path=str(tmp_path), layout="classes").train()
    assert (Counter(classes.labels), classes.groups) == ({"photo": 2, "sketch": 1}, None)


@pytest.mark.parametrize("split", ["test", "val", "validation"])
def test_splits_as_first_folder(tmp_path, split):
    tree(tmp_path, "train/a/1.png", "train/b/1.png", f"{split}/a/2.png", "other/c/1.png")
    source = FolderSource(path=str(tmp_path))
    assert records(source.train()) == [("a/1.png", "a", None), ("b/1.png", "b", None)]
    assert records(source.test()) == [("a/2.png", "a", None)]
    assert source.train().warnings == [f"{tmp_path}: not used beside train: other"]


def test_splits_inside_each_domain(tmp_path):
    names = [f"{d}/{s}/{c}/{s}{i}.png" for d in "pq" for s in ("train", "test") for c in "ab" for i in range(2)]
    source = FolderSource(path=str(tree(tmp_path, *names)))
    train, test = source.train(), source.test()
    assert Counter(zip(train.groups, train.labels, strict=True)) == {(d, c): 2 for d in "pq" for c in "ab"}
    assert Counter(test.groups) == {"p": 4, "q": 4}
    assert not set(train.paths) & set(test.paths)


def test_test_folder_has_the_layout_of_train(tmp_path):
    tree(tmp_path, "train/p/a/1.png", "elsewhere/p/a/2.png")
    source = FolderSource(path=str(tmp_path / "train"), test=str(tmp_path / "elsewhere"))
    assert records(source.test()) == [("p/a/2.png", "a", "p")]
    with pytest.raises(DataError, match=r"folder .*none: no such file or folder"):
        FolderSource(path=str(tmp_path / "train"), test=str(tmp_path / "none")).test()


def test_no_pictures(tmp_path):
    with pytest.raises(DataError, match=r"folder .*none: no such file or folder"):
        FolderSource(path=str(tmp_path / "none")).train()
    with pytest.raises(DataError, match=r"no pictures in class folders; expected PATH/CLASS/PICTURE"):
        FolderSource(path=str(tmp_path)).train()
    tree(tmp_path, "1.png", "2.png")
    with pytest.raises(DataError, match=r"expected PATH/CLASS/PICTURE \(.*ignored 2 files"):
        FolderSource(path=str(tmp_path)).train()


def test_undecodable_names(tmp_path):
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    (tmp_path / os.fsdecode(b"caf\xe9") / "a.png").write_bytes(png())
    table = FolderSource(path=str(tmp_path)).train()
    assert table.labels == ["caf\\udce9"]
    assert table.name(0).encode()
    table.open(0)


# -- manifests ----------------------------------------------------------------------------------------


def manifest(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_csv_manifest(tmp_path):
    tree(tmp_path, "pics/1.png", "pics/2.png", "3.png")
    text = "label,path,domain,split\ncat,pics/1.png,p,train\n0,pics/2.png,q,Train\n\ncat,3.png,p,test\n"
    source = ManifestSource(path=manifest(tmp_path / "m.csv", "\ufeff" + text))
    assert records(source.train()) == [("pics/1.png", "cat", "p"), ("pics/2.png", "0", "q")]
    assert records(source.test()) == [("3.png", "cat", "p")]
    assert source.train().open(1).getpixel((0, 0)) == (1, 1, 1)
    for delimiter in ";\t":
        source = ManifestSource(path=manifest(tmp_path / "n.csv", text.replace(",", delimiter)))
        assert len(source.train()) == 2


def test_jsonl_manifest_with_its_own_columns(tmp_path):
    lines = [{"file": "a.png", "y": 3, "when": "t1"}, {"file": "b.png", "y": "x", "when": "t2"}]
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    path = manifest(tmp_path / "m.jsonl", text)
    source = ManifestSource(path=path, path_column="file", label_column="y", group_column="when")
    assert records(source.train()) == [("a.png", "3", "t1"), ("b.png", "x", "t2")]
    assert source.test() is None
    other = manifest(tmp_path / "t.jsonl", json.dumps({"file": "c.png", "y": 3, "split": "train"}))
    source = ManifestSource(path=path, test=other, path_column="file", label_column="y")
    assert records(source.test()) == [("c.png", "3", None)]


def test_validation_rows_are_the_test_where_there_is_none(tmp_path):
    text = "path,label,split\na,x,train\nb,x,val\n"
    source = ManifestSource(path=manifest(tmp_path / "m.csv", text))
    assert records(source.test()) == [("b", "x", None)]
    source = ManifestSource(path=manifest(tmp_path / "m.csv", text + "c,x,test\n"))
    assert records(source.test()) == [("c", "x", None)]
    assert source.test().warnings == [
        f"{tmp_path / 'm.csv'}: 1 validation rows are not used, because there are test rows"
    ]


def test_repeated_rows(tmp_path):
    source = ManifestSource(path=manifest(tmp_path / "m.csv", "path,label\na,x\na,x\nb,y\n"))
    assert records(source.train()) == [("a", "x", None), ("b", "y", None)]
    assert source.train().warnings == [f"{tmp_path / 'm.csv'}: 1 rows repeat an earlier row and are left out"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "", "no header line"),
        ("m.csv", "path,label\n", "no rows"),
        ("m.csv", "file,class\na,x\n", "no column 'path'; found: file, class"),
        ("m.csv", "path,path,label\na,a,x\n", "the header has a column twice: path"),
        ("m.csv", "path,label\na,x\nb\n", "line 3: 1 cells; the header has 2"),
        ("m.csv", 'path,label\n"a,x\n', "line 2: unexpected end of data"),
        ("m.csv", "path,label\na,\nb,x\nc, \n", r"no label \(column 'label'\) in .*line 2, .*line 4"),
        ("m.csv", "path,label\n,x\n", r"no path \(column 'path'\) in .*line 2"),
        ("m.csv", "path,label\na,x\na,y\n", "line 3: a has label 'y', but 'x' before"),
        ("m.csv", "path,label,split\na,x,trian\n", "line 2: split 'trian' is not one of train, test, val"),
        ("m.csv", "path,label,split\na,x,test\n", "no row is in the train split"),
        ("m.csv", "path,label,task,domain\na,x,1,2\n", "set group_column to one of them"),
        ("m.jsonl", '{"path": "a", "label": "x"}\n{"path": \n', "line 2: not JSON: Expecting value"),
        ("m.jsonl", "[" * 100000 + "\n", "line 1: not JSON"),
        ("m.jsonl", '["a", "x"]\n', "line 1: expected an object"),
        ("m.jsonl", '{"path": "a", "label": 1.5}\n', "line 1: column 'label' holds 1.5; expected text"),
        ("m.jsonl", '{"path": ["a"], "label": "x"}\n', "line 1: column 'path' holds"),
        ("m.jsonl", '{"label": "x"}\n', "no column 'path'; found: label"),
        ("m.jsonl", '{"path": "a", "label": "x"}\n{"path": "b"}\n', r"no label .*line 2"),
    ],
)
def test_faulty_manifests(tmp_path, name, text, message):
    with pytest.raises((DataError, UsageError), match=message) as caught:
        ManifestSource(path=manifest(tmp_path / name, text)).train()
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_more_faulty_manifests(tmp_path):
    with pytest.raises(DataError, match=r"manifest .*none.csv: no such file"):
        ManifestSource(path=str(tmp_path / "none.csv")).train()
    (tmp_path / "m.csv").write_bytes(b"path,label\n\xff\xfe,x\n")
    with pytest.raises(DataError, match=r"m.csv: not UTF-8 text"):
        ManifestSource(path=str(tmp_path / "m.csv")).train()
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(DataError, match=r"d.csv: is a directory"):
        ManifestSource(path=str(tmp_path / "d.csv")).train()
    path = manifest(tmp_path / "m.csv", "path,label\na,cat\nb,dgo\n")
    with pytest.raises(DataError, match=r"label not declared under data.labels: 'dgo' \(.*line 3\); .*dog"):
        ManifestSource(path=path, labels=["cat", "dog"]).train()
    table = ManifestSource(path=path, labels=["cat", "dgo", "emu"]).train()
    assert table.warnings == [f"{path}: no picture has the declared label emu"]
    with pytest.raises(DataError, match="no column 'when'; found: path, label"):
        ManifestSource(path=path, group_column="when").train()


# -- parquet and data sets ----------------------------------------------------------------------------


def parquet(path: Path, columns: dict, names: list[str] | None = None) -> str:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(columns)
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return str(path)


def cell(color, path=None):
    return {"bytes": png(color), "path": path}


def test_parquet(tmp_path):
    images = [cell((i, 0, 0), f"{i}.png") for i in range(3)]
    parquet(tmp_path / "train-0.parquet", {"image": images, "label": [0, 1, 0]}, ["cat", "dog"])
    parquet(tmp_path / "train-1.parquet", {"image": [cell((0, 0, 0))], "label": [1]})
    parquet(tmp_path / "test.parquet", {"image": [png((9, 0, 0))], "label": [1], "more": [b"x"]})
    source = ParquetSource(path=str(tmp_path))
    train, test = source.train(), source.test()
    assert train.labels == ["cat", "dog", "cat", "dog"]
    assert test.labels == ["dog"]  # named by the training files
    assert train.groups is None
    assert train.open(2).getpixel((0, 0)) == (2, 0, 0)
    assert test.open(0).getpixel((0, 0)) == (9, 0, 0)
    assert train.name(2) == f"{tmp_path / 'train-0.parquet'} row 2 (2.png)"
    assert train.name(3) == f"{tmp_path / 'train-1.parquet'} row 0"
    assert ParquetSource(path=str(tmp_path / "train-1.parquet")).train().labels == ["1"]
    assert ParquetSource(path=str(tmp_path / "train-1.parquet")).test() is None


def test_parquet_columns(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"pic": [png(), None], "y": ["a", "b"], "domain": ["p", None]})
    table = ParquetSource(path=[path], image_column="pic", label_column="y").train()
    assert (table.labels, table.groups) == (["a", "b"], ["p", ""])
    with pytest.raises(DataError, match="row 1: the picture is empty"):
        table.open(1)


def test_faulty_parquet(tmp_path):
    def fails(message, **options):
        source = ParquetSource(**options)
        with pytest.raises(DataError, match=message) as caught:
            [source.train(), source.test()]
        assert "\n" not in str(caught.value)

    fails("parquet file .*none: no such file", path=str(tmp_path / "none"))
    fails("no train\\*.parquet; found: no parquet file", path=str(tmp_path))
    (tmp_path / "bad.parquet").write_bytes(b"hello")
    fails("bad.parquet: not a readable parquet file", path=str(tmp_path / "bad.parquet"))
    good = parquet(tmp_path / "good.parquet", {"image": [png()], "label": [5]}, ["cat"])
    fails("good.parquet row 0: column 'label' is 5; there are 1 class names", path=good)
    fails("no column 'y'; found: image, label", path=good, label_column="y")
    path = parquet(tmp_path / "b.parquet", {"image": [[1, 2]], "label": [1]})
    fails("column 'image' is list.*expected encoded pictures", path=path)
    path = parquet(tmp_path / "c.parquet", {"image": [png()], "label": [0.5]})
    fails("column 'label' holds float; expected text or a whole number", path=path)
    path = parquet(tmp_path / "l.parquet", {"image": [png()], "label": [[0, 1]]})
    fails("row 0: column 'label' holds list; expected text or a whole number", path=path)
    path = parquet(tmp_path / "m.parquet", {"image": [png()], "label": [{"a": 1}]})
    fails("row 0: column 'label' holds dict; expected text or a whole number", path=path)
    path = parquet(tmp_path / "d.parquet", {"image": [png()], "label": ["x"]})
    fails("the same file is in train and in test: .*d.parquet", path=path, test=path)
    fails("no rows", path=parquet(tmp_path / "e.parquet", {"image": [], "label": []}))
    fails("list of files is empty", path=[])


def test_missing_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'perpetune\[data\]'"):
        ParquetSource(path=str(tmp_path / "a.parquet")).train()
    with pytest.raises(MissingExtra, match=r"pip install 'perpetune\[data\]'"):
        HubSource(path="some/id").train()


def test_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    tree(tmp_path, "file.png")
    train = datasets.Dataset.from_dict(
        {
            "image": [cell((7, 0, 0)), {"bytes": None, "path": str(tmp_path / "file.png")}, cell((8, 0, 0))],
            "label": [1, 0, 0],
        },
        features=features,
    )
    train = train.select([2, 0, 1])
    path = str(tmp_path / "saved")
    datasets.DatasetDict({"train": train, "validation": train.select([0])}).save_to_disk(path)
    source = HubSource(path=path)
    table = source.train()
    assert table.labels == ["cat", "dog", "cat"]
    assert [table.open(i).getpixel((0, 0))[0] for i in range(3)] == [8, 7, 0]
    assert table.name(0) == f"{path} train row 0"
    assert source.test().labels == ["cat"]
    with pytest.raises(DataError, match="no split 'tset'; found: train, validation"):
        HubSource(path=path, test="tset").test()
    with pytest.raises(DataError, match="the recipe names split 'train' for both train and test"):
        HubSource(path=path, test="train").test()
    train.save_to_disk(path + "1")
    assert HubSource(path=path + "1").train().labels == table.labels
    assert HubSource(path=path + "1").test() is None
    assert guess(path) == ("hf", {"path": path})
    with pytest.raises(DataError, match="data set no/such-data-set: ") as caught:
        HubSource(path="no/such-data-set").train()
    assert "\n" not in str(caught.value)


# -- digits, and finding the kind ---------------------------------------------------------------------


def test_digits():
    source = DigitsSource()
    train, test = source.train(), source.test()
    assert len(train) + len(test) == 1797
    assert not {train.key(i) for i in range(len(train))} & {test.key(i) for i in range(len(test))}
    for label, n in Counter(train.labels + test.labels).items():
        assert abs(test.labels.count(label) - n / 4) <= 0.5
    image = train.open(0)
    assert image.size == (8, 8)
    assert np.asarray(image).max() > 200
    from sklearn.datasets import load_digits

    row = int(train.key(0))
    gray = np.asarray(image)[..., 0]
    assert np.allclose(gray, load_digits().images[row] * 255 / 16, atol=0.5)
    assert train.labels[0] == str(load_digits().target[row])


def test_guess_source(tmp_path):
    pics = tmp_path / "pics"
    tree(pics, "a/1.png")
    table = parquet(tmp_path / "train.parquet", {"image": [png()], "label": [1]})
    assert guess(str(pics)) == ("folder", {"path": str(pics)})
    assert guess(table) == ("parquet", {"path": table})
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "train.parquet").write_bytes(Path(table).read_bytes())
    assert guess(str(tmp_path / "only"))[0] == "parquet"
    assert guess("x/m.csv")[0] == guess("m.JSONL")[0] == "manifest"
    assert guess("digits") == ("digits", {})
    assert guess("uoft-cs/cifar100") == ("hf", {"path": "uoft-cs/cifar100"})
    for path in ("./nowhere", "/no/such/folder", "2026-12", "a b/c d", "https://example.org/x.zip"):
        with pytest.raises(DataError, match=f"^{path}: no such file or folder"):
            guess(path)
    with pytest.raises(UsageError, match=r"1.png: expected a folder of class folders"):
        guess(str(pics / "a" / "1.png"))


@pytest.mark.parametrize("name", ["folder", "manifest", "parquet", "hf", "digits"])
def test_every_source_is_registered_with_typed_options(name):
    assert issubclass(registry.find("data", name), Source)
    registry.options("data", name, {} if name == "digits" else {"path": "x"})
    with pytest.raises(UsageError, match="pth is not an option"):
        registry.options("data", name, {"path": "x", "pth": "x"} if name != "digits" else {"pth": "x"})
