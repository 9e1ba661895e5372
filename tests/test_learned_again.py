"""Data that are learned a second time are known by their contents, however they were cut, named or written."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from test_data_labels import RECIPE, Notes
from test_data_text import write
from tiny import picture, picture_folder, seal, tiny_language_model

from perpetune import Learner
from perpetune.data.sketch import KEPT, Samples, content_hash, sketch, whole
from perpetune.state import State


def hashes(numbers: Iterable[int]) -> list[str]:
    return [content_hash(1, str(number).encode()) for number in numbers]


def learned_before(new: dict[str, Any], earlier: dict[str, dict[str, Any]]) -> tuple[float, list[str]] | None:
    samples = Samples()
    for name, one in earlier.items():
        samples.add(name, one)
    return samples.learned_before(new)


# -- samples of hashes --------------------------------------------------------------------------------------


def test_a_small_sample_is_exact() -> None:
    new, old = sketch(hashes(range(20))), sketch(hashes(range(5, 60)))
    assert learned_before(new, {"a": old}) == (0.75, ["a"])
    assert whole([new, old])
    assert learned_before(new, {"a": sketch(hashes(range(10)))}) == (0.5, ["a"])
    assert learned_before(new, {"a": sketch(hashes(range(9)))}) is None
    assert learned_before(new, {"a": sketch(hashes(range(100, 200)))}) is None
    assert learned_before(new, {}) is None
    parts = {name: sketch(hashes(range(k, k + 7))) for k, name in ((0, "a"), (7, "b"), (14, "c"), (50, "d"))}
    assert learned_before(new, parts) == (1.0, ["a", "b", "c"]), "a quarter of three months"
    assert learned_before(sketch([]), {"a": old}) is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("count", "of"), [(3000, 3000), (300, 3000), (3000, 300), (20_000, 5000)])
def test_shares_of_large_data_are_near_the_truth(share: float, count: int, of: int) -> None:
    common = min(int(share * count), of)
    new = sketch(hashes(range(count)))
    old = sketch(hashes([*range(common), *range(10**6, 10**6 + of - common)]))
    assert len(new["hashes"]) == 16 * min(KEPT, count)
    found, truth = learned_before(new, {"other": sketch(hashes(range(10**7, 10**7 + 900))), "old": old}), common / count
    if truth < 0.4:
        assert found is None
    elif truth > 0.6:
        assert found is not None
        assert found[1] == ["old"]
        assert found[0] == pytest.approx(truth, abs=0.1)


def test_too_few_in_reach_say_nothing() -> None:
    """Of a million examples 256 hashes are kept: 20 others are hardly ever among those."""
    random.seed(0)
    drawn = [hashlib.blake2b(bytes(random.randbytes(8)), digest_size=8).hexdigest() for _ in range(100_000)]
    assert learned_before(sketch(drawn[:20]), {"big": sketch(drawn)}) is None


def test_an_examples_hash_is_of_its_size_and_bytes() -> None:
    assert content_hash(5, b"abc") == content_hash(5, b"abc") != content_hash(6, b"abc") != content_hash(6, b"abd")
    assert len(content_hash(None, b"")) == 16


# -- pictures -----------------------------------------------------------------------------------------------


def told(learner: Learner, notes: Notes, data: Path, **how: Any) -> list[str]:
    notes.notes.clear()
    learner.learn(data, **how)
    return [note for note in notes.notes if "learned before" in note]


def as_manifest(folder: Path, path: Path) -> Path:
    rows = [{"path": str(file), "label": file.parent.name} for file in sorted(folder.rglob("*.png"))]
    return write(path, rows)


def test_pictures_of_another_share_name_or_form(tmp_path: Path) -> None:
    notes = Notes()
    learner = Learner(dict(RECIPE), tmp_path / "s", progress=notes)
    first = picture_folder(tmp_path / "one", ["ant", "bee"], 10)
    assert told(learner, notes, first, holdout=0.2) == []
    line = "task {} learns again: 20 of 20 pictures were learned before, as task {}"
    assert told(learner, notes, first, name="two", holdout=0.4) == [line.format("two", "one")]
    moved = tmp_path / "three"
    shutil.copytree(first / "ant", moved / "wasp")
    shutil.copytree(first / "bee", moved / "fly")
    for number, file in enumerate(sorted(moved.rglob("*.png"))):
        file.rename(file.with_name(f"photo{number}.png"))
    assert told(learner, notes, moved, holdout=0.0) == [line.format("three", "one, two")]
    again = as_manifest(moved, tmp_path / "m.jsonl")
    assert told(learner, notes, again, name="four", holdout=0.3) == [line.format("four", "one, two, three")]
    some = picture_folder(tmp_path / "five", ["ant", "bee"], 10, first=5)
    assert told(learner, notes, some) == [
        "task five learns again: 10 of 20 pictures were learned before, as task one, two, three, four"
    ]
    assert told(learner, notes, picture_folder(tmp_path / "six", ["ant"], 9, first=400)) == []


def test_one_test_of_all_months_is_not_data_learned_again(tmp_path: Path) -> None:
    notes = Notes()
    learner = Learner(dict(RECIPE), tmp_path / "s", progress=notes)
    for month in ("a", "b"):
        picture_folder(tmp_path / month / "train", ["ant", "bee"], 2, first=10 * ord(month))
        picture_folder(tmp_path / month / "test", ["ant", "bee"], 9, first=1000)
        assert told(learner, notes, tmp_path / month) == []


def test_a_large_file_is_hashed_by_its_start_and_size(tmp_path: Path) -> None:
    notes = Notes()
    learner = Learner(dict(RECIPE), tmp_path / "s", progress=notes)
    for name in ("a", "b"):
        for label in ("ant", "bee"):
            (tmp_path / name / label).mkdir(parents=True)
            picture(label, 0).resize((700, 700)).save(tmp_path / name / label / "0.bmp")
    assert told(learner, notes, tmp_path / "a", holdout=0.0) == []
    assert told(learner, notes, tmp_path / "b", holdout=0.0) == [
        "task b learns again: 2 of 2 pictures were learned before, as task a"
    ]


def test_without_a_check_no_content_is_read(tmp_path: Path) -> None:
    notes = Notes()
    learner = Learner({**RECIPE, "stream": {"check": "none"}}, tmp_path / "s", progress=notes)
    first = picture_folder(tmp_path / "one", ["ant", "bee"], 5)
    assert told(learner, notes, first) == []
    assert "contents" not in json.loads(next((tmp_path / "s" / "tasks").glob("*/task.json")).read_text())
    line = "data of the same names, labels and sizes were learned before, as task one"
    assert told(learner, notes, first, name="two") == [line]


def test_a_state_of_before_loads_and_knows_the_same_data_by_their_names(tmp_path: Path) -> None:
    notes = Notes()
    learner = Learner(dict(RECIPE), tmp_path / "s", progress=notes)
    first = picture_folder(tmp_path / "one", ["ant", "bee"], 5)
    learner.learn(first)
    folder = next((tmp_path / "s" / "tasks").iterdir())
    document = json.loads((folder / "task.json").read_text())
    del document["contents"]
    content = json.dumps(document).encode()
    (folder / "task.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    named = manifest.get("files", manifest)
    named["task.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seal(tmp_path / "s")
    assert [c.name for c in State(tmp_path / "s").committed] == ["one"]
    learner = Learner.load(tmp_path / "s", device="cpu", progress=notes)
    line = "data of the same names, labels and sizes were learned before, as task one"
    assert told(learner, notes, first, name="two") == [line]


# -- texts --------------------------------------------------------------------------------------------------


def test_texts_of_another_share_file_or_form(tmp_path: Path) -> None:
    notes = Notes()
    content = {
        "name": "t",
        "backbone": f"hf:{tiny_language_model(tmp_path / 'lm')}",
        "pet": "none",
        "method": "frozen",
        "head": "lm",
        "run": {"device": "cpu"},
    }
    learner = Learner(content, tmp_path / "s", progress=notes)
    rows = [{"prompt": f"say {n}", "answer": f"it is {n}"} for n in range(12)]
    assert told(learner, notes, write(tmp_path / "one.jsonl", rows), holdout=0.25) == []
    line = "task {} learns again: 12 of 12 examples were learned before, as task {}"
    mixed = write(tmp_path / "two.json", [{"instruction": r["prompt"], "output": r["answer"]} for r in rows[::-1]])
    assert told(learner, notes, mixed, holdout=0.5) == [line.format("two", "one")]
    (tmp_path / "three.csv").write_text("prompt,answer\n" + "".join(f"{r['prompt']},{r['answer']}\n" for r in rows))
    assert told(learner, notes, tmp_path / "three.csv", holdout=0.0) == [line.format("three", "one, two")]
    others = [{**row, "answer": "no"} for row in rows]
    assert told(learner, notes, write(tmp_path / "four.jsonl", others), holdout=0.0) == []
