"""Hostile files through the command line: the exit code is 0, 1 or 2, an error is one line, and nothing of the user's
changes.

It runs for a bounded time (`SECONDS` a kind of file, less than 60 in all) and always tries the same things. With
`PERPETUNE_FUZZ_SECONDS=600` in the environment each kind gets 600 seconds and other things every time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import picture_folder, recipe, seal, split_folder, vit_folder

from perpetune.cli import call
from perpetune.files import read_folder, write_folder
from perpetune.learner import Learner

LONGER = float(os.environ.get("PERPETUNE_FUZZ_SECONDS", 0))
SECONDS = LONGER or 1.5

# What stands in the place of something else: the kinds of value that readers have fallen over.
STRANGE = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        10**18,
        10**30,
        -(10**30),
        float("nan"),
        float("inf"),
        1e308,
        "",
        " ",
        "\0",
        "a\nb",
    ),
    *(
        "\u202e",
        "\ud800",
        "../..",
        "/dev/zero",
        "~",
        "x" * 5000,
        "é" * 300,
        "1e5",
        "nan",
        [],
        {},
        [[]],
        [None],
        {"": None},
    ),
    *(
        {"a": {"b": {"c": 1}}},
        ["a"] * 2000,
        {"name": None},
        {"name": "lora", "at": 3},
        [1, "a", None, {}],
        b"bytes",
        {1: 2},
    ),
]
BYTES = [b"", b"\0", b"\xff\xfe", b"{", b"[" * 5000, b'{"a":' * 3000, b"\xef\xbb\xbf", b"9" * 5000, b"null", b"\n" * 10]


def altered(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """`value` with one thing in it replaced, removed, doubled or renamed."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
        key, made = rng.choice(list(value)), dict(value)
        kind = rng.random()
        if kind < 0.1:
            del made[key]
        elif kind < 0.2:
            made[rng.choice(["strange", "", "name", "a.b", "extends"])] = rng.choice(STRANGE)
        else:
            made[key] = altered(rng, value[key], depth + 1)
        return made
    if isinstance(value, list) and value and rng.random() < 0.6:
        place = rng.randrange(len(value))
        return [*value[:place], altered(rng, value[place], depth + 1), *value[place + rng.randrange(2) :]]
    return rng.choice(STRANGE)


def damaged(rng: random.Random, content: bytes) -> bytes:
    """`content` cut, with flipped bits, with something put in, or something else altogether."""
    kind = rng.randrange(5)
    if kind == 0 or not content:
        return rng.choice(BYTES)
    place = rng.randrange(len(content))
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if kind == 3:
        return content[:place] + rng.choice(BYTES)[:100] + content[place:]
    return content + rng.choice(BYTES)


def as_json(value: Any) -> bytes:
    return json.dumps(value, default=str, ensure_ascii=True).encode()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pictures, and a state that has learned them; nobody may change any of it."""
    world = tmp_path_factory.mktemp("world")
    model = vit_folder(world / "vit")
    pictures = split_folder(world / "pictures", "abcd", 4, 2)
    picture_folder(world / "more", ["a", "e"], 4)
    (world / "mine").mkdir()
    (world / "mine" / "notes.txt").write_text("mine")
    content = recipe(model, pictures, head="ncm", method="frozen", pet={"name": "lora", "rank": 2})
    (world / "recipe.yaml").write_text(yaml.safe_dump(content))
    content |= {"train": {"epochs": 1, "batch_size": 8}, "method": "finetune"}
    Learner(content, world / "state").run()
    return world


def print_of(folder: Path) -> dict[str, str]:
    """What lies in a folder; the lock is not the user's."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(path.is_symlink())
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


class Judge:
    """Runs commands and looks at what came out."""

    def __init__(self, world: Path, place: Path, capfd: pytest.CaptureFixture[str]):
        self.world, self.place, self.capfd = world, place, capfd
        self.before = print_of(world)
        self.number = 0

    def folder(self) -> Path:
        self.number += 1
        path = self.place / str(self.number)
        path.mkdir()
        return path

    def run(self, *arguments: object) -> int:
        self.capfd.readouterr()
        began = time.monotonic()
        code = call([str(argument) for argument in arguments])
        said = self.capfd.readouterr()
        assert time.monotonic() - began < 60, arguments
        assert code in (0, 1, 2), (arguments, code)
        assert "Traceback" not in said.err + said.out
        lines = [line for line in said.err.splitlines() if line.startswith("perpetune: ") and "warning: " not in line]
        if code:
            assert len(lines) == 1, (arguments, said.err)
            assert len(lines[0]) < 4000
        assert print_of(self.world) == self.before
        return code


Fuzz = Callable[[random.Random, Judge], None]


def a_recipe(rng: random.Random, judge: Judge) -> None:
    folder = judge.folder()
    whole = (judge.world / "recipe.yaml").read_bytes()
    if rng.random() < 0.5:
        changed = altered(rng, yaml.safe_load(whole))
        text = yaml.dump(changed, allow_unicode=True).encode("utf-8", "backslashreplace")
    else:
        text = damaged(rng, whole)
    (folder / "recipe.yaml").write_bytes(text)
    judge.run("show", folder / "recipe.yaml")
    section = rng.choice(
        ["pet", "head", "train.lr", "train.epochs", "stream.by", "method", "backbone", "name", "pet.at"]
    )
    value = rng.choice(
        ["[" * 200, "!!int z", "&a [*a]", "2024-99-99", "9" * 400, "{a: 1}", "null", "", "\t", "nan", "x"]
    )
    judge.run("show", judge.world / "recipe.yaml", "--set", f"{section}={value}")


def evaluated(judge: Judge, data: Path) -> None:
    judge.run("evaluate", judge.world / "state", "--data", data)


def a_manifest(rng: random.Random, judge: Judge) -> None:
    folder = judge.folder()
    shutil.copytree(judge.world / "more", folder / "more")
    rows = [
        {"path": f"more/{c}/{i}.png", "label": c, "split": s} for c in "ae" for i, s in enumerate(["train", "test"])
    ]
    if rng.random() < 0.5:
        path = folder / "rows.jsonl"
        content = b"\n".join(as_json(altered(rng, row) if rng.random() < 0.4 else row) for row in rows)
    else:
        path = folder / "rows.csv"
        content = b"path,label,split\n" + b"".join(",".join(row.values()).encode() + b"\n" for row in rows)
    path.write_bytes(damaged(rng, content) if rng.random() < 0.6 else content)
    before = print_of(folder)
    evaluated(judge, path)
    assert print_of(folder) == before


def texts(rng: random.Random, judge: Judge) -> None:
    from perpetune.data.texts.records import read_records
    from perpetune.errors import PerpetuneError

    folder = judge.folder()
    rows: list[Any] = [
        {"prompt": "Is it good?", "answer": "yes", "options": ["yes", "no"]},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    ]
    changed = [altered(rng, row) if rng.random() < 0.5 else row for row in rows]
    array = rng.random() < 0.5
    content = as_json(changed) if array else b"\n".join(as_json(row) for row in changed)
    path = folder / ("rows.json" if array else "rows.jsonl")
    path.write_bytes(damaged(rng, content) if rng.random() < 0.5 else content)
    evaluated(judge, path)  # by a model of pictures: refused, in one line
    said = ""
    try:
        read_records(str(path))
    except PerpetuneError as error:
        said = str(error)
    assert "\n" not in said


def a_table(rng: random.Random, judge: Judge) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = judge.folder()
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    images: list[Any] = [
        {"bytes": picture.getvalue(), "path": None},
        {"bytes": damaged(rng, picture.getvalue()), "path": ""},
    ]
    columns: dict[str, Any] = {"image": images, "label": ["a", "e"]}
    kind = rng.randrange(4)
    if kind == 0:
        columns["label"] = rng.choice([[1, 2], [None, "a"], [1.5, 2.5], [[1], [2]], [b"a", b"\xff"], ["", "\0"]])
    elif kind == 1:
        columns["image"] = rng.choice([["more/a/0.png", "/dev/zero"], [None, None], [b"x", b"y"], [1, 2]])
    elif kind == 2:
        columns[rng.choice(["split", "task", "domain", "prompt"])] = rng.choice(
            [["train", "test"], [1, None], ["x", "y"]]
        )
    path = folder / "table.parquet"
    table = pyarrow.table(columns)
    if rng.random() < 0.3:
        about = rng.choice([*BYTES, as_json({"info": {"features": {"label": {"names": rng.choice(STRANGE)}}}})])
        table = table.replace_schema_metadata({b"huggingface": about})
    pyarrow.parquet.write_table(table, path)
    if rng.random() < 0.5:
        path.write_bytes(damaged(rng, path.read_bytes()))
    evaluated(judge, path)


def pictures(rng: random.Random, judge: Judge) -> None:
    folder = judge.folder()
    for name in ("a", "e"):
        shutil.copytree(judge.world / "more" / name, folder / "data" / name)
    kind = rng.choice(["png", "jpeg", "gif", "webp", "bmp", "tiff"])
    made = io.BytesIO()
    Image.new(
        "RGB" if kind in ("jpeg", "webp") else rng.choice(["RGB", "L", "P"]), (rng.randint(1, 30), rng.randint(1, 30))
    ).save(made, kind)
    strange = folder / "data" / "a" / f"strange.{kind}"
    strange.write_bytes(damaged(rng, made.getvalue()) if rng.random() < 0.8 else made.getvalue())
    if rng.random() < 0.3:
        (folder / "data" / "a" / "gone.png").symlink_to(folder / "nowhere.png")
    before = print_of(folder)
    evaluated(judge, folder / "data")
    judge.run("predict", judge.world / "state", strange)
    assert print_of(folder) == before


def a_state(rng: random.Random, judge: Judge) -> None:
    folder = judge.folder()
    state = folder / "state"
    shutil.copytree(judge.world / "state", state)
    (folder / "mine.txt").write_text("mine")
    task = rng.choice(sorted((state / "tasks").iterdir()))
    names = [name for name in sorted(path.name for path in task.iterdir()) if name != "manifest.json"]
    kind = rng.randrange(5)
    if kind == 0:  # a whole file that says something else, with manifest and journal to fit
        name = rng.choice([name for name in names if name.endswith(".json")])
        files = read_folder(task)
        shutil.rmtree(task)
        write_folder(task, {**files, name: as_json(altered(rng, json.loads(files[name])))})
        seal(state)
    elif kind == 1:  # a damaged file, with manifest and journal to fit
        name = rng.choice(names)
        files = read_folder(task)
        shutil.rmtree(task)
        write_folder(task, {**files, name: damaged(rng, files[name])})
        seal(state)
    elif kind == 2:
        path = rng.choice([path for path in sorted(state.rglob("*")) if path.is_file() and path.name != ".lock"])
        path.write_bytes(damaged(rng, path.read_bytes()))
    elif kind == 3:
        path = state / "journal.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()]
        number = rng.randrange(len(events))
        events[number] = altered(rng, events[number])
        path.write_bytes(b"".join(as_json(event) + b"\n" for event in events))
    else:
        path = rng.choice([state / "tasks", state / "journal.jsonl", task, *task.iterdir()])
        moved = folder / "moved"
        shutil.move(path, moved)
        path.symlink_to(rng.choice([moved, folder / "mine.txt", Path("/dev/zero"), folder]))
    ask = judge.world / "more" / "a" / "0.png"
    verbs: list[list[object]] = [
        ["predict", state, ask],
        ["evaluate", state],
        ["report", state],
        ["log", state],
        ["compare", state, judge.world / "state"],
        ["export", state, folder / "exported"],
        ["rollback", state, "--to", rng.choice(["a-b", "start", "c-d", "0"])],
    ]
    for arguments in rng.sample(verbs, 3):
        judge.run(*arguments)
    assert (folder / "mine.txt").read_text() == "mine"


KINDS: dict[str, Fuzz] = {
    "recipes": a_recipe,
    "manifests": a_manifest,
    "texts": texts,
    "tables": a_table,
    "pictures": pictures,
    "states": a_state,
}


@pytest.mark.timeout(120 + 2 * LONGER)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files(
    kind: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    judge = Judge(world, tmp_path, capfd)
    until = [time.monotonic() + SECONDS]

    @settings(
        max_examples=int(20 * LONGER) or 60,  # more than there is time for
        derandomize=not LONGER,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32 - 1))
    def fuzz(seed: int) -> None:
        if time.monotonic() < until[0] or judge.number < 3:
            try:
                KINDS[kind](random.Random(seed), judge)
            except BaseException:
                until[0] = float("inf")  # now it is for hypothesis to say when it has shown the fault
                raise

    fuzz()
    assert judge.number >= 3
