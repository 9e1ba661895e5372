"""A source becomes tasks: by class, domain or task; checked, split and named."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from perpetune.data.pictures.arrow import ParquetSource
from perpetune.data.pictures.digits import DigitsSource
from perpetune.data.pictures.folder import FolderSource
from perpetune.data.pictures.manifest import ManifestSource
from perpetune.data.pictures.tables import MemoryTable
from perpetune.data.pictures.view import PictureView
from perpetune.data.sources import Source
from perpetune.data.stream import StreamOptions, build_stream, single_task
from perpetune.errors import DataError, UsageError

VIEW = PictureView(8)


class Made(Source):
    """A source of tables made by hand."""

    def __init__(self, train, test=None):
        self.tables = train, test

    def train(self):
        return self.tables[0]

    def test(self):
        return self.tables[1]


def rows(labels, groups=None, start=0):
    """A table whose pictures all differ."""
    contents = [b"P5 1 1 255\n" + bytes([i % 256]) + str(start + i).encode() for i in range(len(labels))]
    table = MemoryTable(contents, list(labels), [str(start + i) for i in range(len(labels))], "rows")
    table.groups = groups
    return table


def stream_of(train, test=None, seed=0, **options):
    return build_stream(Made(train, test), StreamOptions(**options), VIEW, seed=seed)


def keys(examples):
    return [] if examples is None else [examples.table.key(r) for r in examples.rows]


def labels_of(task, examples):
    return [task.classes[t] for t in examples.targets]


def pictures(root: Path, *names: str) -> Path:
    rng = random.Random(str(names))
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), tuple(rng.randrange(256) for _ in range(3))).save(path, "PNG")
    return root


# -- tasks --------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60), st.integers(1, 7), st.integers(0, 99), st.data())
def test_class_tasks_are_a_partition(labels, per_task, seed, data):
    options = {
        "classes_per_task": min(per_task, len(set(labels))),
        "validation": data.draw(st.sampled_from([0.0, 0.2, 0.5])),
        "holdout": data.draw(st.sampled_from([0.0, 0.3])),
    }
    stream = stream_of(rows(labels), seed=seed, **options)
    assert sorted(stream.classes) == sorted(set(labels))
    seen = []
    for index, task in enumerate(stream.tasks):
        assert task.index == index
        for part in (task.train, task.validation, task.test):
            if part is not None:
                assert len(part) > 0
                assert all(labels_of(task, part)[i] == labels[int(k)] for i, k in enumerate(keys(part)))
                seen += keys(part)
        assert {*labels_of(task, task.train)} == {*task.classes}
    assert sorted(map(int, seen)) == list(range(len(labels)))
    again = stream_of(rows(labels), seed=seed, **options)
    assert [(t.name, keys(t.train), t.fingerprint) for t in stream.tasks] == [
        (t.name, keys(t.train), t.fingerprint) for t in again.tasks
    ]


def test_class_order_and_names():
    table = rows("aabbccdd")
    sorted_ = stream_of(table, classes_per_task=2, class_order="sorted")
    assert [t.name for t in sorted_.tasks] == ["a-b", "c-d"]
    assert sorted_.classes == ("a", "b", "c", "d")
    assert len({stream_of(table, classes_per_task=1, seed=s).classes for s in range(20)}) > 5
    named = stream_of(table, classes_per_task=[2, 1], class_order=["d", "b", "a"])
    assert [t.classes for t in named.tasks] == [("d", "b"), ("a",)]
    assert "stream.class_order: classes left out: c" in named.warnings
    assert [t.name for t in stream_of(rows("abcdefgh"), classes_per_task=4).tasks] == ["task-1", "task-2"]
    uneven = stream_of(rows("abcdefgh"), classes_per_task=3)
    assert [len(t.classes) for t in uneven.tasks] == [3, 3, 2]
    assert "stream.classes_per_task: 8 classes in tasks of 3 leave 2 for the last task" in uneven.warnings


def test_numbers_in_a_recipe_name_classes():
    stream = stream_of(rows("0123"), classes_per_task=2, class_order=[3, 1, 2, 0])
    assert stream.classes == ("3", "1", "2", "0")


def test_domain_tasks():
    train = rows("ababbc", ["p10"] * 4 + ["p9"] * 2)
    test = rows("abcxb", ["p10", "p10", "p10", "p9", "new"], start=100)
    stream = stream_of(train, test, by="domain")
    assert [(t.name, t.classes) for t in stream.tasks] == [("p9", ("b", "c")), ("p10", ("a", "b"))]
    assert [keys(t.test) for t in stream.tasks] == [[], ["100", "101"]]
    assert stream.tasks[0].test is None
    assert stream.warnings == [
        "domains in test but not in train are left out: new",
        "classes in test but not in train; their test pictures are left out: p9/x, p10/c",
        "classes in train but not in test: b (task p9), c (task p9)",
    ]
    ordered = stream_of(train, by="task", order=["p10", "p9"])
    assert [t.name for t in ordered.tasks] == ["p10", "p9"]
    drawn = {tuple(t.name for t in stream_of(train, by="task", order="seeded", seed=s).tasks) for s in range(20)}
    assert drawn == {("p9", "p10"), ("p10", "p9")}
    with pytest.raises(UsageError, match=r"stream.order: 'p1' is not among the tasks"):
        stream_of(train, by="task", order=["p1"])


def test_missing_domains():
    with pytest.raises(
        DataError, match="needs a domain for each picture, but rows picture 0 has none; expected folders"
    ):
        stream_of(rows("ab"), by="domain")
    with pytest.raises(DataError, match="these have no domain: rows picture 1"):
        stream_of(rows("ab", ["p", ""]), by="domain")
    assert len(stream_of(rows("ab", ["p", ""]), classes_per_task=1).tasks) == 2  # not needed there


def test_test_classes():
    stream = stream_of(rows("aabb"), rows("aac", start=50), classes_per_task=1, class_order="sorted")
    assert stream.warnings == [
        "classes in test but not in train; their test pictures are left out: c",
        "classes in train but not in test: b (task b)",
    ]
    assert [keys(t.test) for t in stream.tasks] == [["50", "51"], []]
    assert "nothing is evaluated" in stream_of(rows("ab"), classes_per_task=1).warnings[0]


def test_limits_and_validation():
    train, test = rows("ab" * 50), rows("ab" * 20, start=500)
    stream = stream_of(
        train, test, classes_per_task=2, train_per_class=20, test_per_class=5, validation=0.25, class_order="sorted"
    )
    task = stream.tasks[0]
    assert Counter(labels_of(task, task.train)) == {"a": 15, "b": 15}
    assert Counter(labels_of(task, task.validation)) == {"a": 5, "b": 5}
    assert Counter(labels_of(task, task.test)) == {"a": 5, "b": 5}
    assert not {*keys(task.train)} & {*keys(task.validation)}
    fewer = stream_of(train, test, classes_per_task=2, train_per_class=10, class_order="sorted").tasks[0]
    assert {*keys(fewer.train)} <= {*keys(task.train), *keys(task.validation)}


@pytest.mark.parametrize(
    "options",
    [
        {"by": "clas"},
        {"classes_per_task": 0},
        {"classes_per_task": []},
        {"validation": 1.0},
        {"max_bad": -1},
        {"train_per_class": 0},
        {"shuffle": True},
        {"class_order": "random"},
    ],
)
def test_faulty_options(options):
    with pytest.raises(ValidationError):
        StreamOptions(**options)


def test_options_that_do_not_fit_the_data():
    with pytest.raises(UsageError, match="5 is too large: there are only 2 classes"):
        stream_of(rows("ab"), classes_per_task=5)
    with pytest.raises(
        UsageError, match=r"classes_per_task is missing, but stream.by: class needs it; there are 2 classes"
    ):
        stream_of(rows("ab"))
    with pytest.raises(UsageError, match=r"stream.class_order: 'z' is not among the classes of the training data"):
        stream_of(rows("ab"), classes_per_task=1, class_order=["z"])
    with pytest.raises(DataError, match="there are no training pictures"):
        stream_of(rows(""))
    with pytest.raises(DataError, match="no label: rows picture 1"):
        stream_of(rows(["a", ""]), classes_per_task=1)


# -- pictures -----------------------------------------------------------------------------------------


def test_load(tmp_path):
    pictures(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(3)))
    options = StreamOptions(classes_per_task=2, class_order="sorted", augment="crop_flip")
    train = build_stream(FolderSource(path=str(tmp_path)), options, VIEW, seed=0).tasks[0].train
    assert train.targets == [0, 0, 0, 1, 1, 1]
    assert train.name(4) == str(tmp_path / "b/1.png")
    pixels = train.load(0, None)
    assert (pixels.shape, pixels.dtype) == ((3, 8, 8), torch.uint8)
    assert torch.equal(train.load(0, 5), train.load(0, 5))


def test_bad_pictures_are_left_out_and_named(tmp_path):
    pictures(tmp_path, *(f"{s}/{c}/{s}{c}{i}.png" for s in ("train", "test") for c in "ab" for i in range(5)))
    torn = tmp_path / "train/a/traina1.png"
    torn.write_bytes(torn.read_bytes()[:46])
    (tmp_path / "train/b/trainb0.png").write_text("hello")
    (tmp_path / "test/a/testa4.png").write_bytes(b"")
    source = FolderSource(path=str(tmp_path))

    def task(**options):
        options = StreamOptions(classes_per_task=2, class_order="sorted", **options)
        return build_stream(source, options, VIEW, seed=0).tasks[0]

    found, seen = task(), []
    before = found.fingerprint
    found.check(lambda done, total: seen.append((done, total)))
    found.check()
    assert seen[-1] == (20, 20)
    assert [b.split(": ")[0].removeprefix(str(tmp_path)) for b in found.bad] == [
        "/train/a/traina1.png",
        "/train/b/trainb0.png",
        "/test/a/testa4.png",
    ]
    assert found.warnings[0].startswith("task a-b: 3 pictures cannot be read and are left out: ")
    assert (len(found.train), len(found.test), found.classes) == (8, 9, ("a", "b"))
    assert found.fingerprint == before
    for i in range(8):
        found.train.load(i, None)
    with pytest.raises(DataError, match=r"task a-b: more than 2 pictures are bad \(stream.max_bad\): .*traina1"):
        task(max_bad=2).check()
    task(max_bad=3).check()
    header = task(check="header")
    header.check()
    assert len(header.bad) == 2  # the torn file has its header
    unchecked = task(check="none")
    unchecked.check()
    assert unchecked.bad == []
    with pytest.raises(DataError, match=r"traina1.png: "):
        unchecked.train.load(1, None)


def test_a_file_that_goes_bad_after_the_check_is_named(tmp_path):
    source = FolderSource(path=str(pictures(tmp_path, "a/1.png", "a/2.png")))
    task = build_stream(source, StreamOptions(classes_per_task=1), VIEW, seed=0).tasks[0]
    task.check()
    (tmp_path / "a/2.png").unlink()
    with pytest.raises(DataError, match=r"a/2.png: no such file"):
        task.train.load(1, None)


def test_a_class_without_a_readable_picture(tmp_path):
    pictures(tmp_path, *(f"{s}/{c}/{s}{c}{i}.png" for s in ("train", "test") for c in "abc" for i in range(2)))
    for i in range(2):
        (tmp_path / f"train/b/trainb{i}.png").write_text(str(i))
    source = FolderSource(path=str(tmp_path))
    options = StreamOptions(classes_per_task=3, class_order="sorted")
    task = build_stream(source, options, VIEW, seed=0).tasks[0]
    task.check()
    assert task.classes == ("a", "c")
    assert task.train.targets == task.test.targets == [0, 0, 1, 1]
    assert task.warnings[1] == "task a-b-c: classes left out, because no training picture can be read: b"
    options = StreamOptions(classes_per_task=1, class_order=["b"])
    with pytest.raises(DataError, match=r"task b: no training picture can be read: .*trainb0"):
        build_stream(source, options, VIEW, seed=0).tasks[0].check()


def test_a_manifest_path_that_is_not_there_is_bad(tmp_path):
    pictures(tmp_path, "1.png")
    (tmp_path / "m.csv").write_text("path,label\n1.png,a\nnone.png,a\n.,a\n")
    source = ManifestSource(path=str(tmp_path / "m.csv"))
    task = build_stream(source, StreamOptions(classes_per_task=1), VIEW, seed=0).tasks[0]
    task.check()
    assert [b.split(": ")[1] for b in task.bad] == ["no such file or directory", "is a directory"]
    assert len(task.train) == 1


def test_fingerprint_sees_files_change(tmp_path):
    pictures(tmp_path, "a/1.png", "a/2.png", "b/1.png")

    def prints(root=tmp_path):
        stream = build_stream(FolderSource(path=str(root)), StreamOptions(classes_per_task=1), VIEW, seed=0)
        return {t.name: t.fingerprint for t in stream.tasks}

    before = prints()
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert prints(moved) == before
    (moved / "a/1.png").write_bytes(b"another size")
    after = prints(moved)
    assert (after["a"] != before["a"], after["b"] == before["b"]) == (True, True)
    one, other = rows("ab"), rows("ab")
    other.contents[0] = b"P5 1 1 255\n\xff0"
    made = [stream_of(t, classes_per_task=2).tasks[0].fingerprint for t in (one, other)]
    assert made[0] != made[1]


# -- overlap ------------------------------------------------------------------------------------------


def test_overlapping_files(tmp_path):
    pictures(tmp_path, *(f"{s}/a/{s}{i}.png" for s in ("train", "test") for i in range(4)))
    source = FolderSource(path=str(tmp_path))
    options = StreamOptions(classes_per_task=1)
    build_stream(source, options, VIEW, seed=0)
    (tmp_path / "test/a/copy.png").write_bytes((tmp_path / "train/a/train2.png").read_bytes())
    (tmp_path / "test/a/link.png").symlink_to(tmp_path / "train/a/train1.png")
    with pytest.raises(DataError, match=r"2 test pictures are also training pictures: .*link.png = .*train1.png, "):
        build_stream(source, options, VIEW, seed=0)
    warned = build_stream(source, StreamOptions(classes_per_task=1, overlap="warn"), VIEW, seed=0)
    assert "copy.png = " in warned.warnings[0]
    with pytest.raises(DataError, match=r"1 test pictures are .*link.png"):
        build_stream(source, StreamOptions(classes_per_task=1, check="none"), VIEW, seed=0)
    same = FolderSource(path=str(tmp_path / "test"), test=str(tmp_path / "test"))
    with pytest.raises(DataError, match=r"6 test pictures .* and 1 more; remove them"):
        build_stream(same, options, VIEW, seed=0)


def test_twins_in_one_table_are_a_warning():
    train, test = rows("aabb"), rows("ab", start=50)
    test.contents[1] = train.contents[3]
    stream = stream_of(train, test, classes_per_task=2)
    assert stream.warnings == ["1 test pictures are also training pictures: rows picture 51 = rows picture 3"]


def test_twins_in_one_source_are_on_one_side():
    train = rows("a" * 12 + "b" * 12)
    for first in range(0, 12, 2):
        train.contents[first + 1] = train.contents[first]
    train.contents[12] = train.contents[13] = train.contents[11]  # a picture of two classes
    sides = Counter()
    for seed in range(8):
        task = single_task(Made(train), StreamOptions(validation=0.3), VIEW, index=0, name="t", seed=seed, holdout=0.3)
        parts = [{train.contents[int(k)] for k in keys(part)} for part in (task.train, task.validation, task.test)]
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert {"10", "11", "12", "13"} <= set(keys(task.train))
        assert len(keys(task.train) + keys(task.validation) + keys(task.test)) == 24
        sides.update(labels_of(task, task.test))
    assert sides["a"] > 8
    assert sides["b"] > 8
    unchecked = [keys(single(train, holdout=0.3, check=how).test) for how in ("none", "header")]
    assert unchecked[0] != unchecked[1]


def test_a_class_of_one_picture_many_times_is_not_held_out():
    train = rows("aaaab")
    train.contents[:4] = train.contents[:1] * 4
    task = single(train, holdout=0.5)
    assert task.test is None
    assert keys(task.train) == list("01234")


def test_a_task_to_be_tested_only(tmp_path):
    pictures(tmp_path, *(f"{s}/{c}/{s}{c}{i}.png" for s in ("train", "test") for c in "ab" for i in range(3)))
    for path in [*tmp_path.glob("train/*/*"), tmp_path / "test/b/testb1.png"]:
        path.write_text(path.name)
    options = StreamOptions(classes_per_task=2, class_order="sorted", max_bad=1)
    task = build_stream(FolderSource(path=str(tmp_path)), options, VIEW, seed=0).tasks[0]
    tested = task.for_testing(["b"])
    assert (tested.classes, len(tested.test), len(tested.bad)) == (("b",), 2, 1)
    assert tested.test.targets == [0, 0]
    assert not task.checked
    with pytest.raises(DataError, match="more than 1 pictures are bad"):
        task.check()
    (tmp_path / "test/b/testb2.png").write_text("x")
    with pytest.raises(DataError, match="more than 1 pictures are bad"):
        task.for_testing(["b"])
    assert single(rows("ab"), holdout=0.0).for_testing(["a"]).test is None


# -- one more batch -----------------------------------------------------------------------------------


def single(train, test=None, holdout=0.25, **options):
    options = StreamOptions(**options)
    return single_task(Made(train, test), options, VIEW, index=4, name="my data", seed=0, holdout=holdout)


def test_single_task():
    task = single(rows("b" * 8 + "a" * 8 + "c"), validation=0.25)
    assert (task.index, task.name, task.classes) == (4, "my_data", ("a", "b", "c"))
    assert Counter(labels_of(task, task.test)) == {"a": 2, "b": 2}
    assert Counter(labels_of(task, task.validation)) == {"a": 2, "b": 2}  # a quarter of 6, rounded up
    assert len(task.train) == 9
    assert task.warnings == ["classes in train but not in test: c"]
    task.check()
    again = single(rows("b" * 8 + "a" * 8 + "c"), validation=0.25)
    assert again.fingerprint == task.fingerprint
    assert single(rows("ab"), holdout=0.0).test is None


def test_single_task_is_not_cut_as_the_stream_is():
    task = single(rows("ab"), by="domain", class_order=["x", "y"], classes_per_task=[5], order=["p"])
    assert task.classes == ("a", "b")


def test_a_stream_task_is_not_called_start():
    train = rows("abab", ["start"] * 2 + ["十月"] * 2)
    assert [t.name for t in stream_of(train, by="domain").tasks] == ["start-1", "十月"]


def test_single_task_with_its_own_test():
    task = single(rows("ab", ["p", "q"]), rows("abx", start=9))
    assert keys(task.train) == ["0", "1"]
    assert keys(task.test) == ["9", "10"]
    assert task.warnings == ["classes in test but not in train; their test pictures are left out: x"]


# -- real data ----------------------------------------------------------------------------------------


def test_digits_stream():
    options = StreamOptions(classes_per_task=2, class_order="sorted")
    stream = build_stream(DigitsSource(), options, VIEW, seed=0)
    assert [t.name for t in stream.tasks] == ["0-1", "2-3", "4-5", "6-7", "8-9"]
    assert stream.warnings == []
    task = stream.tasks[3]
    task.check()
    assert task.bad == []
    assert labels_of(task, task.test).count("7") == 45
    assert task.train.load(0, None).shape == (3, 8, 8)


@pytest.mark.shared
def test_cifar100(shared):
    source = ParquetSource(path=str(shared / "data" / "cifar100"))
    stream = build_stream(source, StreamOptions(classes_per_task=10, train_per_class=20), VIEW, seed=1)
    assert (len(stream.tasks), len(stream.classes)) == (10, 100)
    assert {"aquarium_fish", "worm"} <= set(stream.classes)
    assert len(stream.warnings) == 1  # the data set itself has a few twins
    for task in stream.tasks:
        assert (len(task.train), len(task.test)) == (200, 500)
    stream.tasks[0].check()
    assert stream.tasks[0].bad == []
