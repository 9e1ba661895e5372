"""Texts with pictures: the layouts that people have, faults by row, CoIN's folders, and what people type."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import SIZE, picture, tiny_tokenizer

from perpetune.data.guess import guess_source
from perpetune.data.pictured.coin import CoinSource
from perpetune.data.pictured.files import PicturedSource
from perpetune.data.pictured.marks import MARK, Mark
from perpetune.data.pictured.table import PicturedTable
from perpetune.data.pictured.view import PicturedView
from perpetune.data.pictures.view import PictureView
from perpetune.data.stream import StreamOptions, build_stream
from perpetune.data.texts.files import FileSource
from perpetune.errors import DataError, UsageError
from perpetune.registry import every
from perpetune.tasks import part


def view() -> PicturedView:
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(MARK, special=True, normalized=False)], special_tokens=True)
    token = tokenizer.convert_tokens_to_ids(MARK)
    return PicturedView(tokenizer, picture=PictureView(SIZE), mark=Mark(token, 4, MARK, MARK), max_length=128)


def pictures(folder: Path) -> Path:
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for name in "ab":
        picture(name, 0).save(folder / "img" / f"{name}.png")
    return folder


def rows(folder: Path, *content: dict[str, Any], name: str = "month.jsonl") -> Path:
    pictures(folder)
    path = folder / name
    lines = json.dumps(content) if name.endswith(".json") else "\n".join(json.dumps(row) for row in content)
    path.write_text(lines)
    return path


def table(path: Path, **options: Any) -> PicturedTable:
    found = PicturedSource(path=str(path), **options).train()
    assert isinstance(found, PicturedTable)
    return found


A = "img/a.png"
LAYOUTS: dict[str, tuple[dict[str, Any], Any]] = {
    "prompt": ({"image": A, "prompt": "What?", "answer": "a cat"}, f"{MARK}\nWhat?"),
    "marked": ({"images": [A], "prompt": f"Is {MARK} one?", "answer": "a cat"}, f"Is {MARK} one?"),
    "llava": (
        {
            "id": "1",
            "image": A,
            "conversations": [{"from": "human", "value": f"{MARK}\nWhat?"}, {"from": "gpt", "value": "a cat"}],
        },
        (("user", f"{MARK}\nWhat?"),),
    ),
    "messages": (
        {
            "images": [A],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
            ],
        },
        (("user", f"{MARK}What?"),),
    ),
    "parts that name it": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "path": A}]},
                {"role": "assistant", "content": "a cat"},
            ],
        },
        (("user", f"What?{MARK}"),),
    ),
    "no mark in a chat": (
        {
            "image": A,
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": "a cat"},
            ],
        },
        (("system", "s"), ("user", f"{MARK}\nWhat?")),
    ),
}


@pytest.mark.parametrize("name", ["month.jsonl", "month.json"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, name: str, tmp_path: Path) -> None:
    row, prompt = LAYOUTS[layout]
    found = table(rows(tmp_path, row, name=name))
    text = found.text(0)
    assert (text.prompt, text.answer, text.pictures) == (prompt, "a cat", 1)
    assert found.rows[0].pictures == (str(tmp_path / A),)
    found.check(0, "decode")
    assert found.open(0, 0).size == (16, 16)
    assert not [line for line in found.warnings if "not used" in line and "'id'" not in line]


def test_bytes_out_of_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stored = io.BytesIO()
    picture("a", 0).save(stored, "PNG")
    images = [[{"bytes": stored.getvalue(), "path": "a.png"}] * 2, []]
    asked = pa.table({"images": images, "prompt": [f"{MARK}{MARK} same?", "hi"], "answer": ["yes", "no"]})
    pq.write_table(asked, tmp_path / "x.parquet")
    found = table(tmp_path / "x.parquet")
    assert [found.text(i).pictures for i in (0, 1)] == [2, 0]
    assert found.open(0, 1).tobytes() == picture("a", 0).tobytes()
    assert found.key(0) != found.key(1)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": f"{MARK} What?", "answer": "x"}, "it has 0 pictures and 1 marks <image>"),
        ({"image": A, "prompt": f"{MARK}{MARK} What?", "answer": "x"}, "it has 1 pictures and 2 marks <image>"),
        ({"images": [A, A], "prompt": f"{MARK} What?", "answer": "x"}, "it has 2 pictures and 1 marks <image>"),
        ({"image": A, "prompt": "What?", "answer": f"x{MARK}"}, "its answer holds the mark <image>"),
        ({"image": "img/no.png", "prompt": "What?", "answer": "x"}, "img/no.png: no such file or directory"),
        ({"image": "month.jsonl", "prompt": "What?", "answer": "x"}, "not a picture that Pillow can read"),
        ({"image": 3, "prompt": "What?", "answer": "x"}, "a picture is int; expected a path"),
        ({"image": "https://x.org/a.png", "prompt": "What?", "answer": "x"}, "lies elsewhere: perpetune loads none"),
        ({"image": A, "images": [A], "prompt": "What?", "answer": "x"}, "'image' and 'images' both hold pictures"),
        ({"image": A, "prompt": "What?"}, "no answer"),
        ({"image": A, "prompt": " ", "answer": "x"}, "the prompt is empty"),
        (
            {
                "image": A,
                "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "x"}],
                "answer": "y",
            },
            "it has two answers, in 'conversations' and in 'answer'",
        ),
        (
            {
                "image": A,
                "messages": [
                    {"role": "user", "content": [{"type": "image", "path": A}]},
                    {"role": "assistant", "content": "x"},
                ],
            },
            "parts of messages name pictures, and a column does too",
        ),
        ({"image": A, "prompt": "What?", "answer": "x", "answers": "y"}, "the answers .* hold str; expected a list"),
    ],
)
def test_faults_are_named_by_row(row: dict[str, Any], fault: str, tmp_path: Path) -> None:
    found = table(rows(tmp_path, {"prompt": "hi", "answer": "yes"}, row))
    found.check(0, "decode")
    with pytest.raises(DataError, match=rf"month\.jsonl line 2: .*{fault}"):
        found.check(1, "decode")


def test_a_row_is_known_by_its_pictures_wherever_they_lie(tmp_path: Path) -> None:
    row = {"prompt": "What?", "answer": "x"}
    path = rows(tmp_path / "one", {**row, "image": A}, {**row, "image": "img/b.png"}, row, {**row, "image": "a.png"})
    found, moved = table(path), table(rows(tmp_path / "two", {**row, "image": A}))
    assert len({found.key(i) for i in range(4)}) == 4
    assert found.key(0) == moved.key(0)
    sizes = [found.size(i) for i in range(3)]
    assert sizes[0] == len(found.content(0)) > len(found.content(2)) == sizes[2]
    assert found.content(0, 5) == found.content(0)[:5]


def test_several_answers_are_references(tmp_path: Path) -> None:
    people = [{"answer": "two"}] * 2 + [{"answer": "3"}] * 8
    path = rows(tmp_path, {"image": A, "prompt": "How many?", "answer": "3", "answers": people})
    stream = build_stream(
        PicturedSource(path=str(path), test=str(path), score="vqa"), StreamOptions(overlap="warn"), view(), seed=0
    )
    test = stream.tasks[0].test
    assert test is not None
    judge = view().judge(part(test, [0]), "vqa")
    assert [judge(0, answer) for answer in ("3", "2", "", "4")] == [1.0, 2 / 3, 0.0, 0.0]


def coin(folder: Path) -> Path:
    for task, answer in (("OCRVQA", "a book"), ("GQA", "yes"), ("Grounding", "[0.1,0.2,0.5,0.6]")):
        train = {
            "id": "1",
            "image": "img/a.png",
            "conversations": [{"from": "human", "value": f"{MARK}\nWhat?"}, {"from": "gpt", "value": answer}],
        }
        asked = {"question_id": 3, "image": "img/b.png", "text": "Which?", "answer": answer}
        (folder / "Original" / task).mkdir(parents=True)
        (folder / "Original" / task / "train.json").write_text(json.dumps([train]))
        (folder / "Original" / task / "test.json").write_text(json.dumps([asked]))
    pictures(folder / "cl_dataset")
    return folder / "Original"


def test_coin(tmp_path: Path) -> None:
    folder = coin(tmp_path)
    assert guess_source(str(folder), every("data"), "pictured") == ("coin", {"path": str(folder)})
    stream = build_stream(CoinSource(path=str(folder)), StreamOptions(), view(), seed=0)
    assert [(task.name, task.score) for task in stream.tasks] == [
        ("GQA", "exact_match"),
        ("Grounding", "box"),
        ("OCR-VQA", "exact_match"),
    ]
    assert not [line for line in stream.warnings if "used" in line]
    task = stream.tasks[0]
    task.check()
    assert task.test is not None
    assert task.train.text(0).prompt == (("user", f"{MARK}\nWhat?"),)
    assert (task.test.text(0).prompt, task.test.text(0).pictures) == (f"{MARK}\nWhich?", 1)
    with pytest.raises(UsageError, match=r"data\.tasks: there is no task 'GQQ'; .*GQA"):
        CoinSource(path=str(folder), tasks=["GQQ"]).train()


def test_files_belong_to_this_source_only_where_it_is_wanted(tmp_path: Path) -> None:
    path = rows(tmp_path, {"image": A, "prompt": "What?", "answer": "x"})
    assert guess_source(str(path), every("data"), "pictured")[0] == "pictured"
    assert guess_source(str(path), every("data"), "texts")[0] == "text"
    with pytest.raises(UsageError, match="data: these are texts, but the backbone takes pictured"):
        build_stream(FileSource(path=str(path)), StreamOptions(), view(), seed=0)


def test_a_batch_holds_the_pixels_of_all_its_pictures(tmp_path: Path) -> None:
    two = {"images": [A, "img/b.png"], "prompt": "same?", "answer": "no"}
    path = rows(tmp_path, {"image": A, "prompt": "What?", "answer": "x"}, {"prompt": "hi", "answer": "y"}, two)
    stream = build_stream(PicturedSource(path=str(path)), StreamOptions(), view(), seed=0)
    train = stream.tasks[0].train
    batch = train.collate([(train.load(i, 5), 0, i) for i in range(3)])
    assert batch.inputs.pixels.shape == (3, 2, 3, SIZE, SIZE)
    shown = batch.inputs["shown"]
    assert ((shown != 0).sum(1).tolist(), bool(shown[0, 0] == shown[2, 0])) == ([1, 0, 2], True)
    assert batch.inputs.rows([2]).pixels.shape == (1, 2, 3, SIZE, SIZE)
    alone = train.collate([(train.load(1, None), 0, 1)])
    assert "pixels" not in alone.inputs
    with pytest.raises(UsageError, match=r"stream\.augment: flip works with pictures only"):
        build_stream(PicturedSource(path=str(path)), StreamOptions(augment="flip"), view(), seed=0)


def test_what_people_type_and_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pictures(tmp_path))
    asker = view()
    assert asker.typed([A, "What?", "Which?", "img/b.png", A, "Same?"]) == [
        {"prompt": "What?", "images": [A]},
        {"prompt": "Which?", "images": [A]},
        {"prompt": "Same?", "images": ["img/b.png", A]},
    ]
    rows(tmp_path, {"prompt": "Two?", "images": [A, A]}, {"prompt": "None of its own"}, name="asked.jsonl")
    assert asker.typed(["img/b.png", "asked.jsonl"]) == [
        {"prompt": "Two?", "images": [A, A]},
        {"prompt": "None of its own", "images": ["img/b.png"]},
    ]
    assert asker.typed(["hi"]) == [{"prompt": "hi", "images": []}]
    with pytest.raises(UsageError, match=r"there is no question about img/a\.png: give the picture, then the question"):
        asker.typed(["hi", A])
    with pytest.raises(DataError, match=r"no\.png: no such file"):
        asker.typed(["no.png", "What?"])
    chat = [{"role": "user", "content": [{"type": "image", "path": A}, {"type": "text", "text": "What?"}]}]
    given = [
        *asker.typed([A, "What?"]),
        "hi",
        {"messages": chat},
        {"prompt": "What?", "images": [picture("a", 0)]},
    ]
    asked = asker.ask(given, options=["yes", "no"])
    assert [len(question.item.pictures) for question in asked] == [1, 0, 1, 1]
    assert bool((asked[0].item.pictures[0] == asked[3].item.pictures[0]).all())
    assert asked[2].given == (("user", f"{MARK}What?"),)
    for wrong, error in (
        ({"prompt": "What?", "image": 3}, "a picture is int"),
        ({"prompt": "What?", "pic": A}, "a question has 'pic'"),
        ({"prompt": f"{MARK} What?"}, "it has 0 pictures and 1 marks"),
    ):
        with pytest.raises(DataError, match=f"prompt 1: {error}"):
            asker.ask([wrong])
