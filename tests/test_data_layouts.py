"""How data lie in folders and files: splits by any name, classes that are called like splits, cloned repositories."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from perpetune.data.columns import SPLITS, split_begun, splits_among
from perpetune.data.pictures.arrow import ParquetSource
from perpetune.data.pictures.folder import FolderSource
from perpetune.data.pictures.hub import HubSource
from perpetune.data.pictures.manifest import ManifestSource
from perpetune.data.texts.files import FileSource
from perpetune.errors import DataError

TRAIN = [name for name, split in SPLITS.items() if split == "train"]
TEST = [name for name, split in SPLITS.items() if split != "train"]


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (shade % 256, shade // 256, 7)).save(stream, "PNG")
    return stream.getvalue()


def tree(root: Path, *names: str) -> Path:
    for shade, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(shade))
    return root


def parquet(path: Path, labels: list[str]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    shades = [sum(map(ord, str(path))) + i for i in range(len(labels))]
    pq.write_table(pa.table({"image": [png(shade) for shade in shades], "label": labels}), path)
    return path


def parts(source):
    test = source.test()
    return Counter(source.train().labels), Counter(test.labels) if test is not None else None


# -- one list of split names ---------------------------------------------------------------------------


def cased(names):
    return [form(name) for name in names for form in (str.lower, str.title, str.upper)]


def test_split_names():
    assert splits_among(["x", "Valid", "TEST", "val", "Training"]) == {
        "train": ["Training"],
        "test": ["TEST"],
        "validation": ["val", "Valid"],
    }
    names = ["train-00000-of-2", "Training_1", "trainset", "0000", "dev", "device", "valuable", "testing2", "x_train"]
    assert [split_begun(name) for name in names] == [
        *("train", "train", "train"),
        *(None, "validation", None, "validation", "test", None),
    ]


@pytest.mark.parametrize("train", cased(TRAIN))
def test_training_folder_by_any_name(tmp_path, train):
    tree(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", "Test/a/2.png")
    assert parts(FolderSource(path=str(tmp_path))) == ({"a": 1, "b": 1}, {"a": 1})


@pytest.mark.parametrize("test", cased(TEST))
def test_test_folder_by_any_name(tmp_path, test):
    tree(tmp_path, "Train/a/1.png", "Train/b/1.png", f"{test}/a/2.png")
    assert parts(FolderSource(path=str(tmp_path))) == ({"a": 1, "b": 1}, {"a": 1})
    inside = tree(
        tmp_path / "in", *(f"{d}/{s}/{c}/{i}.png" for d in "pq" for s in ("Training", test) for c in "ab" for i in "1")
    )
    source = FolderSource(path=str(inside))
    assert Counter(source.train().groups) == Counter(source.test().groups) == {"p": 2, "q": 2}
    assert not set(source.train().paths) & set(source.test().paths)


@pytest.mark.parametrize(("train", "test"), [("Train", "Valid"), ("training", "testing"), ("TRAIN", "Dev")])
def test_the_other_readers_know_the_same_names(tmp_path, train, test):
    parquet(tmp_path / "p" / f"{train}.parquet", ["a", "b"])
    parquet(tmp_path / "p" / f"{test}.parquet", ["b"])
    assert parts(ParquetSource(path=str(tmp_path / "p"))) == ({"a": 1, "b": 1}, {"b": 1})
    rows = f"path,label,split\n1.png,a,{train}\n2.png,b,{test}\n"
    (tmp_path / "m.csv").write_text(rows)
    assert parts(ManifestSource(path=str(tmp_path / "m.csv"))) == ({"a": 1}, {"b": 1})
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, word in ((train, "one"), (test, "two")):
        (texts / f"{name}.jsonl").write_text(f'{{"prompt": "say", "answer": "{word}"}}\n')
    source = FileSource(path=str(texts))
    assert (len(source.train()), len(source.test())) == (1, 1)


@pytest.mark.parametrize(("train", "test"), [("Train", "Valid"), ("training", "testing"), ("train", "dev")])
def test_splits_of_saved_data_sets(tmp_path, train, test):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    made = {
        name: datasets.Dataset.from_dict(
            {"image": [{"bytes": png(i), "path": None}], "label": [name]}, features=features
        )
        for i, name in enumerate((train, test, "more"))
    }
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "d"))
    source = HubSource(path=str(tmp_path / "d"))
    assert parts(source) == ({train: 1}, {test: 1})
    assert source.train().warnings == [f"{tmp_path / 'd'}: splits that are not used: more"]
    named = HubSource(path=str(tmp_path / "d"), train="more", test=train)
    assert parts(named) == ({"more": 1}, {train: 1})


# -- classes and splits that mix -----------------------------------------------------------------------


def test_a_class_called_train(tmp_path):
    tree(tmp_path, "train/1.png", "plane/1.png", "boat/1.png")
    source = FolderSource(path=str(tmp_path))
    assert parts(source) == ({"train": 1, "plane": 1, "boat": 1}, None)
    assert source.train().warnings == [f"{tmp_path}: taken for a class, not for a split: 'train'"]


def test_a_class_called_train_in_every_domain(tmp_path):
    names = [f"{d}/{c}/{d}{c}.png" for d in ("clipart", "real") for c in ("Train", "car", "test")]
    source = FolderSource(path=str(tree(tmp_path, *names)))
    assert parts(source) == ({"Train": 2, "car": 2, "test": 2}, None)
    assert Counter(source.train().groups) == {"clipart": 3, "real": 3}


def test_a_class_called_test(tmp_path):
    tree(tmp_path, "test/1.png", "train_station/1.png", "x/1.png")
    source = FolderSource(path=str(tmp_path))
    assert parts(source) == ({"test": 1, "train_station": 1, "x": 1}, None)
    assert source.train().warnings == [f"{tmp_path}: taken for a class, not for a split: 'test'"]


def test_a_domain_called_test(tmp_path):
    tree(tmp_path, "test/a/1.png", "photo/a/1.png")
    source = FolderSource(path=str(tmp_path))
    assert parts(source) == ({"a": 2}, None)
    assert source.train().warnings == [f"{tmp_path}: taken for a domain, not for a split: 'test'"]


def test_splits_without_training_are_not_learned(tmp_path):
    tree(tmp_path, "Valid/a/1.png", "Test/a/2.png")
    with pytest.raises(
        DataError, match=r"holds Test/, Valid/, and no folder of the training split; add one named train"
    ):
        FolderSource(path=str(tmp_path)).train()
    assert parts(FolderSource(path=str(tmp_path), layout="domains"))[0] == {"a": 2}
    assert parts(FolderSource(path=str(tmp_path / "Test"))) == ({"a": 1}, None)


def test_two_training_splits(tmp_path):
    tree(tmp_path, "train/a/1.png", "Training/a/2.png")
    with pytest.raises(DataError, match=r"several folders of the training split: train/, Training/; name the one"):
        FolderSource(path=str(tmp_path)).train()


def test_splits_in_some_folders_only(tmp_path):
    tree(tmp_path, "cat/train/1.png", "cat/test/2.png", "dog/1.png")
    with pytest.raises(
        DataError, match=r"some folders have splits inside \(cat\), others not \(dog\); give all of them"
    ):
        FolderSource(path=str(tmp_path)).train()


def test_what_lies_beside_splits_is_said(tmp_path):
    tree(tmp_path / "a", "Train/a/1.png", "Valid/a/2.png", "Test/a/3.png", "extra/a/4.png", "loose.png")
    source = FolderSource(path=str(tmp_path / "a"))
    assert parts(source) == ({"a": 1}, {"a": 1})
    assert source.train().warnings == [f"{tmp_path / 'a'}: not used beside Train: extra, Valid, 1 picture"]
    tree(tmp_path / "b", "p/train/a/1.png", "p/val/a/2.png", "p/test/a/3.png", "p/4.png")
    source = FolderSource(path=str(tmp_path / "b"))
    assert parts(source) == ({"a": 1}, {"a": 1})
    assert source.train().warnings == [f"{tmp_path / 'b'}: not used beside the splits there: p/val, 1 picture in p"]


# -- parquet files in folders --------------------------------------------------------------------------


def test_a_cloned_repository(tmp_path):
    for shard in range(2):
        parquet(tmp_path / f"data/train-0000{shard}-of-00002.parquet", ["a", "b"])
    parquet(tmp_path / "data/test-00000-of-00001.parquet", ["a"])
    (tmp_path / "README.md").write_text("license: mit")
    (tmp_path / ".git").mkdir()
    assert parts(ParquetSource(path=str(tmp_path))) == ({"a": 2, "b": 2}, {"a": 1})
    assert ParquetSource.fits(str(tmp_path)) > FolderSource.fits(str(tmp_path))


def test_a_converted_branch(tmp_path):
    parquet(tmp_path / "default/train/0000.parquet", ["a", "b"])
    parquet(tmp_path / "default/train/0001.parquet", ["b"])
    parquet(tmp_path / "default/validation/0000.parquet", ["a"])
    assert parts(ParquetSource(path=str(tmp_path))) == ({"a": 1, "b": 2}, {"a": 1})
    assert parts(ParquetSource(path=str(tmp_path / "default/train"))) == ({"a": 1, "b": 2}, None)
    parquet(tmp_path / "other/train/0000.parquet", ["a"])
    with pytest.raises(DataError, match="several folders of parquet files: default, other; name the one to use"):
        ParquetSource(path=str(tmp_path)).train()


def test_files_beside_splits_are_said(tmp_path):
    for name in ("train.parquet", "val.parquet", "test.parquet", "more.parquet"):
        parquet(tmp_path / name, ["a"])
    assert ParquetSource(path=str(tmp_path)).train().warnings == [
        f"{tmp_path}: not used beside train: more.parquet, val.parquet"
    ]
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"no train\*.parquet; found: more.parquet, test.parquet, val.parquet"):
        ParquetSource(path=str(tmp_path)).train()
