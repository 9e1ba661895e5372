"""Texts become the same streams as pictures: every layout of files, every kind of bad row, limits, counts."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from perpetune import registry
from perpetune.data import check
from perpetune.data.guess import guess_source
from perpetune.data.pictures.digits import DigitsSource
from perpetune.data.pictures.tables import MemoryTable
from perpetune.data.pictures.view import PictureView
from perpetune.data.reference import reference_examples
from perpetune.data.sources import Source
from perpetune.data.split import limit
from perpetune.data.stream import StreamOptions, build_stream, single_task
from perpetune.data.texts.cl_benchmark import INSTRUCTIONS, ClBenchmarkSource
from perpetune.data.texts.examples import TextSet
from perpetune.data.texts.files import FileSource
from perpetune.data.texts.prompts import read_prompts
from perpetune.data.texts.tables import Row, Text, TextTable
from perpetune.data.texts.trace import ORDER, SCORES, TraceSource
from perpetune.data.texts.view import TextView
from perpetune.errors import DataError, UsageError
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime
from perpetune.tasks import load_batches

VIEW = TextView(tiny_tokenizer(), max_length=64)
PLAIN = TextView(tiny_tokenizer(chat=False), max_length=64)
GOOD = {"prompt": "two and two", "answer": "four"}


def guess(path: str) -> tuple[str, dict[str, Any]]:
    return guess_source(path, registry.every("data"))


def write(path: Path, rows, **options) -> Path:
    """Rows as JSONL, JSON or parquet; those of type bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = dict.fromkeys(key for row in rows for key in row)  # arrow takes those of the first row alone
        pq.write_table(pa.Table.from_pylist([{c: row.get(c) for c in columns} for row in rows]), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows), **options), encoding="utf-8")
    else:
        lines = [row if isinstance(row, bytes) else json.dumps(row, **options).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def pairs(count, word="", start=0, **more):
    """Different questions with different answers."""
    return [{"prompt": f"{word} question {i}", "answer": f"answer {i}", **more} for i in range(start, start + count)]


def choices(count, labels="ab", start=0, **more):
    return [{"prompt": f"choose {i}", "answer": labels[i % len(labels)], **more} for i in range(start, start + count)]


def stream_of(source, view=VIEW, seed=0, **options):
    return build_stream(source, StreamOptions(**options), view, seed=seed)


def checked(source, **options):
    (task,) = stream_of(source, **options).tasks
    task.check()
    return task


def texts(examples):
    return [] if examples is None else [examples.text(i) for i in range(len(examples))]


def prompts(examples):
    return [text.prompt for text in texts(examples)]


# -- one file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "parquet"])
def test_each_format_gives_the_same_texts(tmp_path, suffix):
    path = write(tmp_path / f"sums.{suffix}", pairs(3))
    (task,) = stream_of(FileSource(path=str(path))).tasks
    assert (task.name, task.classes, task.score) == ("sums", (), "exact_match")
    assert texts(task.train) == [Text(f" question {i}", f"answer {i}") for i in range(3)]
    assert task.train.targets == [0, 0, 0]
    place = {"json": "item 2", "parquet": "row 1"}.get(suffix, "line 2")
    assert task.train.name(1) == f"{path} {place}"
    assert task.validation is None
    assert task.test is None


def test_objects_one_a_line_may_be_called_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "prompt": "b"}))
    assert FileSource(path=str(path)).train().name(1) == f"{path} line 2"


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\n\n", b"\r\n \t\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_blank_lines_and_byte_order_marks(tmp_path, ending, mark):
    path = tmp_path / "x.jsonl"
    path.write_bytes(mark + ending.join(json.dumps(row).encode() for row in pairs(2)))
    table = FileSource(path=str(path)).train()
    assert [table.text(i).answer for i in range(2)] == ["answer 0", "answer 1"]
    assert table.name(1) == f"{path} line {1 + ending.count(bytes([10]))}"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text(min_size=1).filter(str.strip),
    answer=st.text(min_size=1).filter(str.strip),
    suffix=st.sampled_from(["jsonl", "json"]),
    plain=st.booleans(),
)
def test_any_text_comes_back_as_it_was(tmp_path, prompt, answer, suffix, plain):
    path = write(tmp_path / f"any.{suffix}", [{"prompt": prompt, "answer": answer}], ensure_ascii=plain)
    table = FileSource(path=str(path)).train()
    assert table.text(0) == Text(prompt, answer)
    assert table.size(0) == len(table.content(0))


def test_other_columns_instruction_options_and_score(tmp_path):
    rows = [
        {"q": "is it", "a": 1, "of": ["0", 1], "kind": "x"},
        {"q": "or not", "a": " 0 ", "of": ["0", "1"], "kind": "x"},
    ]
    source = FileSource(
        path=str(write(tmp_path / "x.jsonl", rows)),
        prompt_column="q",
        answer_column="a",
        task_column="kind",
        options="of",
        instruction="Say 0 or 1.",
        score="accuracy",
    )
    (task,) = stream_of(source).tasks
    assert (task.name, task.classes, task.score) == ("x", ("0", "1"), "accuracy")
    assert texts(task.train) == [
        Text("Say 0 or 1.\nis it", "1", ("0", "1")),
        Text("Say 0 or 1.\nor not", "0", ("0", "1")),
    ]
    assert task.train.targets == [1, 0]


def test_options_in_the_recipe_are_those_of_every_row(tmp_path):
    source = FileSource(path=str(write(tmp_path / "x.jsonl", choices(3))), options=["b", "a", "c"])
    (task,) = stream_of(source).tasks
    assert task.classes == ("a", "b", "c")
    assert task.train.text(0).options == ("b", "a", "c")


def test_options_that_differ_from_row_to_row_are_no_classes(tmp_path):
    rows = [{**GOOD, "options": ["four", "five"]}, {"prompt": "b", "answer": "six", "options": ["six", "ten"]}]
    (task,) = stream_of(FileSource(path=str(write(tmp_path / "x.jsonl", rows)), options="options")).tasks
    task.check()
    assert (task.classes, task.train.targets, len(task.train)) == ((), [0, 0], 2)


def test_tasks_in_a_column_by_name_or_in_the_order_asked_for(tmp_path):
    rows = [row for task in ("t10", "t9", "t1") for row in pairs(2, task, task=task)]
    source = FileSource(path=str(write(tmp_path / "x.jsonl", rows)), score={"t9": "f1"})
    assert [t.name for t in stream_of(source).tasks] == ["t1", "t9", "t10"]
    assert [t.score for t in stream_of(source).tasks] == ["exact_match", "f1", "exact_match"]
    stream = stream_of(source, order=["t10", "t1"])
    assert [t.name for t in stream.tasks] == ["t10", "t1"]
    assert "stream.order: tasks left out: t9" in stream.warnings
    assert [t.name for t in stream_of(FileSource(path=source.path), by="domain").tasks] == ["t1", "t9", "t10"]


def test_splits_in_a_column(tmp_path):
    rows = pairs(2, split="train") + pairs(1, start=5, split="eval") + pairs(1, start=7, split="test")
    path = write(tmp_path / "x.jsonl", [*rows, {**GOOD, "split": "tset"}])
    (task,) = stream_of(FileSource(path=str(path))).tasks
    task.check()
    assert [len(p) for p in (task.train, task.validation, task.test)] == [2, 1, 1]
    assert task.bad == [f"{path} line 5: column 'split': split 'tset' is not one of train, test, val"]
    moved = write(tmp_path / "y.jsonl", [{**row, "part": row["split"]} for row in rows])
    assert len(FileSource(path=str(moved), split_column="part").test()) == 1
    assert len(FileSource(path=str(path), test=str(moved)).train()) == 5


def test_a_test_file_of_its_own_belongs_to_the_same_task(tmp_path):
    train, test = write(tmp_path / "a.jsonl", pairs(3)), write(tmp_path / "b.json", pairs(2, start=9))
    (task,) = stream_of(FileSource(path=str(train), test=str(test))).tasks
    assert (task.name, len(task.train), len(task.test)) == ("a", 3, 2)


def test_messages(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    longer = [{"role": "system", "content": "Be brief."}, *chat, *chat]
    rows = [{"messages": chat}, {"messages": longer}, {"messages": None, **GOOD}]
    for suffix in ("jsonl", "parquet"):
        source = FileSource(path=str(write(tmp_path / f"x.{suffix}", rows)), instruction="In English.")
        task = checked(source)
        assert texts(task.train) == [
            Text((("user", "In English.\nhi"),), "ho"),
            Text((("system", "Be brief."), ("user", "In English.\nhi"), ("assistant", "ho"), ("user", "hi")), "ho"),
            Text("In English.\ntwo and two", "four"),
        ]
        assert len(task.train.lengths) == len(task.train.weights) == 3


def test_messages_without_a_chat_template_are_bad_rows(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write(tmp_path / "x.jsonl", [GOOD, {"messages": chat}])
    (task,) = stream_of(FileSource(path=str(path)), view=PLAIN).tasks
    task.check()
    assert task.bad[0].startswith(f"{path} line 2: this model's tokenizer has no chat template")


# -- bad rows -----------------------------------------------------------------------------------------

USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "ho"}
BAD = [
    (b'{"prompt": "a", "answer": ', "not JSON: Expecting value: line 1 column 27 (char 26)"),
    (b'{"prompt": "\xff"}', "not UTF-8 text (byte 12)"),
    (b'{"prompt": "a", "prompt": "b", "answer": "c"}', "not JSON: key 'prompt' stands twice"),
    (b'["prompt", "answer"]', "holds list; expected an object of columns"),
    (b"3", "holds int; expected an object of columns"),
    (b"[" * 100_000, "not JSON: "),
    ({"answer": "b"}, "no prompt (column 'prompt')"),
    ({"prompt": "a"}, "no answer (column 'answer')"),
    ({"prompt": " \n", "answer": "b"}, "the prompt is empty"),
    ({"prompt": "a", "answer": ""}, "the answer is empty"),
    ({"prompt": "a", "answer": " \t"}, "the answer is empty"),
    ({"prompt": ["a"], "answer": "b"}, "the prompt (column 'prompt') holds list; expected text"),
    (b'{"prompt": "a", "answer": NaN}', "the answer (column 'answer') is no number (nan)"),
    (b'{"prompt": "a", "answer": 1e999}', "the answer (column 'answer') is no number (inf)"),
    ({"prompt": "a", "answer": True}, "the answer (column 'answer') holds bool; expected text"),
    (b'{"prompt": "a \\ud83d", "answer": "b"}', "the prompt holds half a character (a lone surrogate) at 2"),
    ({"messages": "hi"}, "the messages hold str; expected a list of {role, content}"),
    ({"messages": []}, "there are no messages"),
    ({"messages": ["hi", "ho"]}, "message 1 is str; expected {role, content}"),
    ({"messages": [SAID]}, "there is no message before the answer"),
    ({"messages": [USER, USER]}, "the last message is by 'user'; expected the assistant's, which is the answer"),
    (
        {"messages": [{**USER, "role": "owl"}, SAID]},
        "message 1 has the role 'owl'; expected one of system, developer, ",
    ),
    ({"messages": "[1"}, "the messages hold str; expected a list of {role, content}"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, SAID]},
        "message 1: the content has a part 1 that is 'image'",
    ),
    (
        {"messages": [{**USER, "content": [{"type": "text", "text": "a"}, {"type": "text"}]}, SAID]},
        "message 1: the con",
    ),
    ({"messages": [{**USER, "content": []}, SAID]}, "message 1: the content holds list; expected text"),
    ({"messages": [USER, {**SAID, "weight": 0.5}]}, "message 2: its weight is '0.5'; expected 0 or 1, true or false"),
    ({"messages": [USER, {**SAID, "train": "no"}]}, "message 2: its train is 'no'; expected 0 or 1, true or false"),
    ({"messages": [USER, {**SAID, "weight": 0}]}, "no answer is to be learned: each has weight 0, or train or loss f"),
    ({"messages": [USER, {**SAID, "weight": 0, "train": True}]}, "message 2: weight and train contradict each other"),
    ({"messages": [{**USER, "train": True}, SAID]}, "message 1 of the role 'user' is to be learned; only answers can"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
        "the answer is empty, for the model's",
    ),
    ({"messages": [{"from": "human", "value": "a"}, {"from": "owl", "value": "b"}]}, "the last message is by 'owl'; "),
    ({"messages": [USER, SAID], "system": 3.5, "tools": "{"}, "the tools (column 'tools') are no list of objects"),
    ({"messages": [{"role": "system", "content": "a"}, USER, SAID], "system": "b"}, "the column 'system' and a messag"),
    ({"messages": [{"role": "user"}, SAID]}, "message 1: the content holds nothing; expected text"),
    ({"messages": [USER, {**SAID, "content": ""}]}, "the answer is empty"),
    ({"prompt": "a", "answer": "b" * 80}, "the answer alone has "),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason[:30] for _, reason in BAD])
def test_bad_rows_are_named_counted_and_left_out(tmp_path, row, reason):
    path = write(tmp_path / "x.jsonl", [GOOD, row, {"messages": [USER, SAID]}])
    (task,) = stream_of(FileSource(path=str(path))).tasks
    assert len(task.train) == 3  # it keeps its place until it is looked at
    with pytest.raises(DataError, match="line 2"):
        task.train.load(1, None)
    task.check()
    assert len(task.train) == 2
    (said,) = task.bad
    assert said.startswith(f"{path} line 2: {reason}")
    assert "\n" not in said
    assert task.warnings[0].startswith(f"task x: 1 examples cannot be used and are left out: {path} line 2: ")
    (strict,) = stream_of(FileSource(path=str(path)), max_bad=0).tasks
    with pytest.raises(DataError, match=r"task x: more than 0 examples are bad \(stream.max_bad\): .* line 2: "):
        strict.check()


def test_an_answer_that_is_no_option_is_bad_in_its_task_and_split(tmp_path):
    rows = [*choices(4), {"prompt": "choose", "answer": "c"}]
    source = FileSource(path=str(write(tmp_path / "t" / "train.jsonl", rows).parent), options=["a", "b"], test=None)
    task = checked(source)
    assert task.bad == [f"{tmp_path / 't' / 'train.jsonl'} line 5: the answer 'c' is not among the options 'a', 'b'"]
    assert (task.classes, task.train.targets) == (("a", "b"), [0, 1, 0, 1])


def test_a_bad_line_stays_in_the_task_around_it(tmp_path):
    rows = [
        b"{",
        *pairs(2, "x", task="x"),
        b"{",
        *pairs(2, "y", task="y"),
        b"{",
        {**GOOD, "task": None},
        {**GOOD, "task": 2.5},
    ]
    tasks = stream_of(FileSource(path=str(write(tmp_path / "x.jsonl", rows)))).tasks
    for task in tasks:
        task.check()
    found = {task.name: [bad.split(" line ")[1][:1] for bad in task.bad] for task in tasks}
    assert found == {"x": ["1", "4"], "y": ["7", "8", "9"]}
    assert tasks[1].bad[1].endswith("line 8: no task (column 'task')")


def test_bad_rows_of_the_test_count_too(tmp_path):
    write(tmp_path / "t" / "train.jsonl", pairs(3))
    write(tmp_path / "t" / "test.jsonl", [*pairs(2, start=9), {"prompt": "x", "answer": ""}, b"nothing"])
    task = checked(FileSource(path=str(tmp_path / "t")))
    assert (len(task.train), len(task.test), len(task.bad)) == (3, 2, 2)
    (again,) = stream_of(FileSource(path=str(tmp_path / "t"))).tasks
    tested = again.for_testing(())
    assert (len(tested.test), len(tested.bad)) == (2, 2)
    assert tested.warnings[0].startswith("task t: 2 examples cannot be used")


def test_nothing_good_is_an_error(tmp_path):
    (task,) = stream_of(FileSource(path=str(write(tmp_path / "x.jsonl", [b"{", b"}"])))).tasks
    with pytest.raises(DataError, match=r"^task x: no training example can be used: .* line 1: not JSON.* line 2: "):
        task.check()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "x.jsonl: no rows"),
        ("x.jsonl", b"\xef\xbb\xbf\r\n", "x.jsonl: no rows"),
        ("x.json", b"", "x.json: no rows"),
        ("x.json", b" [ ] ", "x.json: no rows"),
        ("x.json", b'"a"', "x.json: expected an array of objects, or one object on each line"),
        ("x.json", b'[{"prompt": "a"}, {"prompt": ]', "x.json item 2: not JSON: "),
        ("x.json", b'[{"prompt": "a"} {"prompt": "b"}]', "x.json item 1: expected a comma or the end of the array "),
        ("x.json", b'[{"prompt": "a"}', "x.json item 1: expected a comma or the end of the array after it, but the f"),
        ("x.json", b'[{"prompt": "a"},]', "x.json item 2: not JSON: "),
        ("x.json", b'[{"prompt": "a", "prompt": "b"}]', "x.json item 1: not JSON: key 'prompt' stands twice"),
        ("x.json", b"[] []", "x.json: there is text after the end of the array"),
        ("x.json", b'["\xff"]', r"x.json: not UTF-8 text \(byte 2\)"),
        ("x.parquet", b"PAR1", "x.parquet: not a readable parquet file"),
        ("x.txt", b"prompt,answer", "x.txt: expected a file that ends in .jsonl, "),
        ("x.csv", b"", "x.csv: no header line"),
        ("x.csv", b"prompt,answer\n", "x.csv: no rows"),
        ("x.csv", b"prompt,answer\na,b,c\n", "x.csv line 2: 3 cells; the header has 2"),
        ("x.csv", b'prompt,answer\na,"b\n', "x.csv line 2: unexpected end of data"),
        ("x.tsv", b"prompt\tprompt\na\tb\n", "x.tsv: the header has a column twice: prompt"),
        ("x.csv", b"prompt,answer\n\xff,b\n", r"x.csv: not UTF-8 text \(byte 14\)"),
        ("x.csv", b"question,reply\na,b\n", "no column 'prompt' and no column 'messages'; found: question, reply"),
        ("x.jsonl", b'{"question": "a", "answer": "b"}', "no column 'prompt' and no column 'messages'; found: q"),
        ("x.jsonl", b'{"prompt": "a", "reply": "b"}', "no column 'answer' and no column 'messages'; found: p"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        FileSource(path=str(path)).train()
    assert "\n" not in str(caught.value)


def test_columns_that_were_asked_for_must_be_there(tmp_path):
    path = str(write(tmp_path / "x.jsonl", [GOOD]))
    for option in ("task_column", "split_column", "options"):
        with pytest.raises(DataError, match="no column 'none'; found: prompt, answer"):
            FileSource(path=path, **{option: "none"}).train()
    with pytest.raises(UsageError, match="there is no score 'bleu'"):
        FileSource(path=path, score="bleu")
    with pytest.raises(UsageError, match=r"data.score: there is no task 'y'; one of x"):
        FileSource(path=path, score={"y": "f1"}).train()
    with pytest.raises(DataError, match="no such file or folder"):
        FileSource(path=str(tmp_path / "none.jsonl")).train()
    both = write(tmp_path / "both.jsonl", [{**GOOD, "task": "a", "domain": "b"}])
    with pytest.raises(UsageError, match="set task_column to one of them"):
        FileSource(path=str(both)).train()


def test_rows_of_several_schemas_in_one_file(tmp_path):
    rows = [GOOD, {"messages": [USER, SAID]}, {**GOOD, "note": 3}, {"note": 4}]
    path = write(tmp_path / "x.jsonl", rows)
    task = checked(FileSource(path=str(path)))
    assert task.bad == [f"{path} line 4: no prompt (column 'prompt')"]
    assert len(task.train) == 3


# -- folders ------------------------------------------------------------------------------------------


def test_a_folder_of_task_files(tmp_path):
    for number in (10, 9):
        write(tmp_path / "data" / f"t{number}.jsonl", pairs(3, f"t{number}"))
    write(tmp_path / "data" / ".hidden.jsonl", [b"{"])
    write(tmp_path / "tests" / "t9.json", pairs(2, start=50))
    source = FileSource(path=str(tmp_path / "data"), test=str(tmp_path / "tests"))
    stream = stream_of(source)
    assert [(t.name, len(t.train), len(t.test or ())) for t in stream.tasks] == [("t9", 3, 2), ("t10", 3, 0)]


def test_a_folder_of_task_folders(tmp_path):
    write(tmp_path / "a" / "train.jsonl", pairs(3, "a"))
    write(tmp_path / "a" / "validation.json", pairs(2, "a", 10))
    write(tmp_path / "a" / "test.parquet", pairs(1, "a", 20))
    for part in range(2):
        write(tmp_path / "b" / f"train-0000{part}-of-00002.parquet", pairs(2, "b", 2 * part))
    write(tmp_path / "b" / "dev.json", pairs(2, "b", 30))
    write(tmp_path / "c" / "other.jsonl", pairs(1))
    (tmp_path / "pictures").mkdir()
    stream = stream_of(FileSource(path=str(tmp_path)))
    assert [[t.name, *(len(p or ()) for p in (t.train, t.validation, t.test))] for t in stream.tasks] == [
        ["a", 3, 2, 1],
        ["b", 4, 0, 2],  # where there is no test, validation is it
    ]
    assert stream.warnings == [f"{tmp_path}: no train file in c/"]
    write(tmp_path / "a" / "more.jsonl", pairs(3, "a", 40))
    write(tmp_path / "test.jsonl", pairs(3, "a", 50))
    assert FileSource(path=str(tmp_path)).train().warnings[1:] == [
        f"{tmp_path}: these files belong to no task and are not used: a/more.jsonl, test.jsonl"
    ]
    alone = FileSource(path=str(tmp_path / "a" / "train.jsonl"), test=str(tmp_path / "a"))
    assert len(alone.test()) == 1


def test_a_folder_of_one_task(tmp_path):
    root = tmp_path / "sums"
    write(root / "train.jsonl", pairs(3))
    write(root / "test.jsonl", pairs(2, start=9))
    write(root / "notes.jsonl", [GOOD])
    stream = stream_of(FileSource(path=str(root)))
    assert [(t.name, len(t.train), len(t.test)) for t in stream.tasks] == [("sums", 3, 2)]
    assert stream.warnings == [f"{root}: not used beside train: notes.jsonl"]
    beside = FileSource(path=str(root), test=str(write(tmp_path / "t.jsonl", pairs(1, start=30))))
    assert len(beside.test()) == 1
    assert f"not used, because data.test is set: {root / 'test.jsonl'}" in beside.train().warnings


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: expected train.jsonl, TASK.jsonl or TASK/train.jsonl .*no file of"):
        FileSource(path=str(tmp_path / "empty")).train()
    for name in ("train.json", "train.jsonl"):
        write(tmp_path / "twice" / name, pairs(1))
    with pytest.raises(DataError, match=r"twice: several files of the train split: train.json, train.jsonl"):
        FileSource(path=str(tmp_path / "twice")).train()
    for name in ("a.jsonl", "a/train.jsonl"):
        write(tmp_path / "both" / name, pairs(1))
    with pytest.raises(DataError, match=r"both: a task is in several places: a/?, a"):
        FileSource(path=str(tmp_path / "both")).train()


# -- benchmarks ---------------------------------------------------------------------------------------


def trace(root: Path, *names: str, each=3) -> Path:
    for name in names:
        for part, start in (("train", 0), ("eval", 100), ("test", 200)):
            write(root / name / f"{part}.json", pairs(each, name, start))
    return root


def test_trace(tmp_path):
    root = trace(tmp_path / "T", *reversed(ORDER), "Lima", "Own")
    stream = stream_of(TraceSource(path=str(root)))
    assert [t.name for t in stream.tasks] == [*ORDER, "Own"]
    assert [t.score for t in stream.tasks] == [*SCORES.values(), "exact_match"]
    assert all((len(t.train), len(t.validation), len(t.test)) == (3, 3, 3) for t in stream.tasks)
    assert stream.tasks[1].validation.text(0).prompt == "FOMC question 100"
    assert stream.warnings == [f"{root}: Lima is left out, because it is not a task of the benchmark"]
    some = TraceSource(path=str(root), tasks=["Py150", "FOMC"], score={"FOMC": "prefix"})
    assert [(t.name, t.score) for t in stream_of(some).tasks] == [("Py150", "code_similarity"), ("FOMC", "prefix")]
    one = TraceSource(path=str(root / "20Minuten"))
    assert [(t.name, t.score) for t in stream_of(one).tasks] == [("20Minuten", "sari")]
    with pytest.raises(UsageError, match=r"data.tasks: there is no task 'FOMCC'; closest: FOMC"):
        TraceSource(path=str(root), tasks=["FOMCC"]).train()
    write(tmp_path / "files" / "a.json", pairs(1))
    with pytest.raises(DataError, match=r"expected PATH/TASK/train.json; found: .*a.json"):
        TraceSource(path=str(tmp_path / "files")).train()


def benchmark(root: Path) -> Path:
    """Two groups of one and two tasks, one of them without a test."""
    for group, task, labels, splits in (
        ("SC", "SST-2", ["Good", "Bad"], ("train", "test", "dev")),
        ("SC", "yelp", ["negative", "neutral", "positive"], ("train", "dev")),
        ("TC", "agnews", ["World", "Sports"], ("train", "test")),
    ):
        folder = root / group / task
        for k, split in enumerate(splits):
            rows = [{"sentence": f"Text: {task} {k} {i}\n", "label": labels[i % len(labels)]} for i in range(4)]
            write(folder / f"{split}.json", rows)
        (folder / "labels.json").write_text(json.dumps(labels))
    return root


def test_cl_benchmark(tmp_path):
    root = benchmark(tmp_path / "CL")
    stream = stream_of(ClBenchmarkSource(path=str(root)))
    assert [(t.name, t.classes, t.score, len(t.test), t.validation) for t in stream.tasks] == [
        ("agnews", ("Sports", "World"), "exact_match", 4, None),
        ("SST-2", ("Bad", "Good"), "exact_match", 4, None),
        ("yelp", ("negative", "neutral", "positive"), "exact_match", 4, None),
    ]
    assert stream.tasks[1].train.text(0) == Text(
        f"{INSTRUCTIONS['SC']}\nOption: Good, Bad\n\nText: SST-2 0 0\nAnswer:", "Good", ("Good", "Bad")
    )
    assert stream.tasks[1].train.targets == [1, 0, 1, 0]
    some = ClBenchmarkSource(path=str(root), tasks=["yelp", "agnews"], instructions={"SC": "Mood?", "agnews": "About?"})
    tasks = stream_of(some).tasks
    assert [t.name for t in tasks] == ["yelp", "agnews"]
    assert [t.train.text(0).prompt.partition("\n")[0] for t in tasks] == ["Mood?", "About?"]
    assert [t.name for t in stream_of(ClBenchmarkSource(path=str(root / "SC"))).tasks] == ["SST-2", "yelp"]
    alone = stream_of(ClBenchmarkSource(path=str(root / "SC" / "yelp"))).tasks
    assert alone[0].train.text(0) == stream.tasks[2].train.text(0)


def test_cl_benchmark_that_cannot_be_used(tmp_path):
    root = benchmark(tmp_path / "CL")
    with pytest.raises(UsageError, match=r"data.tasks: there is no task 'IMDB'; one of SST-2, agnews, yelp"):
        ClBenchmarkSource(path=str(root), tasks=["IMDB"]).train()
    with pytest.raises(UsageError, match=r"data.instructions: there is no group or task 'NLI'"):
        ClBenchmarkSource(path=str(root), instructions={"NLI": "?"}).train()
    labels = root / "TC" / "agnews" / "labels.json"
    for content in ("[", "{}", "[]", '["a", 1]', '["a", "a"]'):
        labels.write_text(content)
        with pytest.raises(DataError, match=r"labels.json: "):
            ClBenchmarkSource(path=str(root)).train()
    labels.write_text('["World", "Politics"]')
    (task,) = stream_of(ClBenchmarkSource(path=str(root), tasks=["agnews"])).tasks
    task.check()
    assert len(task.bad) == 4
    assert "test.json item 2: the answer 'Sports' is not among the options 'World', 'Politics'" in task.bad[2]
    (root / "TC").rename(root / "COPA")
    with pytest.raises(UsageError, match=r"the group 'COPA' of task agnews has no instruction; set data.instructions"):
        ClBenchmarkSource(path=str(root)).train()
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"expected GROUP/TASK/train.json with labels.json beside it"):
        ClBenchmarkSource(path=str(tmp_path / "none")).train()


def test_guess_source(tmp_path):
    root = benchmark(tmp_path / "CL")
    trace(tmp_path / "T", "FOMC", "Py150")
    trace(tmp_path / "own", "first", "second")
    expected = {
        root: "cl_benchmark",
        root / "SC": "cl_benchmark",
        root / "SC" / "yelp": "cl_benchmark",
        tmp_path / "T": "trace",
        tmp_path / "T" / "FOMC": "trace",
        tmp_path / "own": "text",
        tmp_path / "own" / "first": "text",
        tmp_path / "T" / "FOMC" / "train.json": "text",
        write(tmp_path / "new.jsonl", [GOOD]): "text",
        write(tmp_path / "chat.JSONL", [{"messages": [USER, SAID]}]): "text",
        write(tmp_path / "marked.jsonl", [b"\xef\xbb\xbf\r", GOOD]): "text",
        write(tmp_path / "x.parquet", [GOOD]): "text",
        write(tmp_path / "list.jsonl", [{"path": 'a "prompt": b', "label": "x"}]): "manifest",
        write(tmp_path / "shots" / "cat" / "meta.jsonl", [{"path": "a.png"}]).parent.parent: "folder",
    }
    for path, name in expected.items():
        assert guess(str(path)) == (name, {"path": str(path)}), path
        if name in ("text", "trace", "cl_benchmark"):
            source = registry.find("data", name)(**registry.options("data", name, {"path": str(path)}))
            assert len(source.train()) > 0


# -- streams ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=40),
    small=st.integers(1, 20),
    more=st.integers(0, 20),
    per_class=st.none() | st.integers(1, 10),
    seed=st.integers(0, 9),
)
def test_a_limit_is_balanced_and_a_larger_one_takes_more(labels, small, more, per_class, seed):
    def taken(count):
        return limit(range(len(labels)), labels, str, per_class=per_class, in_all=count, seed=seed, purpose="x")

    there = Counter(labels)
    got = taken(small)
    counts = Counter(labels[row] for row in got)
    room = {label: min(count, per_class or count) for label, count in there.items()}
    assert len(got) == min(small, sum(room.values()))
    assert all(counts[a] >= min(room[a], counts[b] - 1) for a in there for b in there)
    assert set(got) <= set(taken(small + more))
    assert got == sorted(got)
    assert taken(None) == limit(range(len(labels)), labels, str, per_class=per_class, seed=seed, purpose="x")


def test_limits_of_a_task(tmp_path):
    root = tmp_path / "t"
    write(root / "train.jsonl", choices(30))
    write(root / "eval.jsonl", choices(20, start=100))
    write(root / "test.jsonl", choices(20, start=200))
    source = FileSource(path=str(root), options=["a", "b"])
    (task,) = stream_of(source, train_per_task=7, test_per_task=4).tasks
    assert [len(p) for p in (task.train, task.validation, task.test)] == [7, 4, 4]
    assert sorted(Counter(task.train.targets).values()) == [3, 4]
    assert Counter(task.test.targets) == {0: 2, 1: 2}
    other = stream_of(source, seed=1, train_per_task=7).tasks[0]
    assert prompts(other.train) != prompts(task.train)
    free = stream_of(FileSource(path=str(root)), train_per_task=5).tasks[0]
    assert (len(free.train), free.classes) == (5, ())
    pictures = build_stream(
        DigitsSource(), StreamOptions(classes_per_task=5, train_per_task=13, test_per_task=5), PictureView(8), seed=0
    )
    assert [(len(t.train), len(t.test)) for t in pictures.tasks] == [(13, 5)] * 2
    assert sorted(Counter(pictures.tasks[0].train.targets).values()) == [2, 2, 3, 3, 3]


def test_validation_and_holdout_are_cut_where_the_source_has_none(tmp_path):
    source = FileSource(path=str(write(tmp_path / "x.jsonl", pairs(20))))
    (task,) = stream_of(source, holdout=0.25, validation=0.2).tasks
    assert [len(p) for p in (task.train, task.validation, task.test)] == [12, 3, 5]
    assert not set(prompts(task.train)) & set(prompts(task.test))
    root = trace(tmp_path / "T", "FOMC", each=5)
    stream = stream_of(TraceSource(path=str(root)), validation=0.4)
    assert (len(stream.tasks[0].train), len(stream.tasks[0].validation)) == (5, 5)
    assert "stream.validation is not used, because the data have validation examples already" in stream.warnings


def test_overlap_is_the_same_prompt_and_answer(tmp_path):
    write(tmp_path / "t" / "train.jsonl", [*pairs(3), GOOD, b"{"])
    write(tmp_path / "t" / "test.json", [{**GOOD, "answer": "5"}, *pairs(2, start=2)])
    stream = stream_of(FileSource(path=str(tmp_path / "t")))
    train, test = tmp_path / "t" / "train.jsonl", tmp_path / "t" / "test.json"
    assert stream.warnings == [f"1 test examples are also training examples: {test} item 2 = {train} line 3"]
    assert stream_of(FileSource(path=str(tmp_path / "t")), check="none").warnings == []


def test_twins_stay_on_one_side(tmp_path):
    source = FileSource(path=str(write(tmp_path / "x.jsonl", [*pairs(4), *pairs(4), *pairs(4)])))
    for seed in range(5):
        (task,) = stream_of(source, seed=seed, holdout=0.5).tasks
        assert not set(prompts(task.train)) & set(prompts(task.test))
    assert sorted(map(len, check.find_twins(source.train()))) == [3, 3, 3, 3]


def test_fingerprints(tmp_path):
    def fingerprint(rows, name="x", **options):
        path = write(tmp_path / f"{name}.jsonl", rows)
        return stream_of(FileSource(path=str(path), **options)).tasks[0].fingerprint

    first = fingerprint(choices(3))
    assert fingerprint(choices(3), "elsewhere") == first
    assert fingerprint([*choices(2), {"prompt": "choose 2", "answer": "c"}]) != first
    assert fingerprint([*choices(3), b"{"]) != first
    assert fingerprint([*choices(3), b"{"]) != fingerprint([*choices(3), b"}"])
    assert fingerprint(choices(3), options=["a", "b"]) != first
    assert fingerprint(choices(3), options=["a", "b", "c"]) != fingerprint(choices(3), options=["a", "b"])
    assert fingerprint(choices(3), instruction="Do.") != first
    rows = [{**row, "o": ["a", "b", str(i)]} for i, row in enumerate(choices(3))]
    assert fingerprint(rows, options="o") != fingerprint([{**r, "o": ["b", "a", *r["o"]]} for r in rows], options="o")
    (task,) = stream_of(FileSource(path=str(write(tmp_path / "x.jsonl", [*choices(3), b"{"])))).tasks
    before = task.fingerprint
    task.check()
    assert (task.fingerprint, len(task.train)) == (before, 3)


def test_draws_do_not_depend_on_instruction_or_place(tmp_path):
    rows = pairs(20)
    first = FileSource(path=str(write(tmp_path / "a.jsonl", rows)))
    other = FileSource(path=str(write(tmp_path / "b.json", rows[::-1])), instruction="Do this.")
    taken = [stream_of(source, train_per_task=5).tasks[0].train for source in (first, other)]
    assert {text.answer for text in texts(taken[0])} == {text.answer for text in texts(taken[1])}


def test_an_update_takes_all_as_one_task(tmp_path):
    source = FileSource(path=str(write(tmp_path / "new.jsonl", [*pairs(6, task="a"), *pairs(4, "b", task="b")])))
    options = StreamOptions(by="domain", order=["gone"])
    task = single_task(source, options, VIEW, index=3, name="March", seed=0, holdout=0.2)
    assert (task.index, task.name, len(task.train), len(task.test), task.score) == (3, "March", 8, 2, "exact_match")
    mixed = TraceSource(path=str(trace(tmp_path / "T", "FOMC", "Py150")))
    with pytest.raises(
        UsageError, match=r"several scores: accuracy \(FOMC\), code_similarity \(Py150\); give one task"
    ):
        single_task(mixed, options, VIEW, index=0, name="x", seed=0, holdout=0.0)


def test_a_test_of_other_tasks(tmp_path):
    write(tmp_path / "a.jsonl", pairs(2, task="a"))
    write(tmp_path / "b.jsonl", pairs(2, task="b"))
    with pytest.raises(DataError, match="no test example fits a task: train has a, test has b"):
        stream_of(FileSource(path=str(tmp_path / "a.jsonl"), test=str(tmp_path / "b.jsonl")))


def test_options_that_are_for_pictures(tmp_path):
    source = FileSource(path=str(write(tmp_path / "x.jsonl", [GOOD])))
    for options, message in (
        ({"by": "class"}, "stream.by: class works with pictures only; cut texts by task or domain"),
        ({"classes_per_task": 2}, "stream.classes_per_task works with pictures only"),
        ({"class_order": ["a"]}, "stream.class_order works with pictures only"),
        ({"augment": "flip"}, "stream.augment: flip works with pictures only"),
    ):
        with pytest.raises(UsageError, match=message):
            stream_of(source, **options)
    with pytest.raises(UsageError, match=r"^data: these are texts, but the backbone takes pictures$"):
        stream_of(source, view=PictureView(8))
    with pytest.raises(UsageError, match=r"^data: these are pictures, but the backbone takes texts$"):
        stream_of(DigitsSource(), classes_per_task=5)
    with pytest.raises(
        UsageError, match=r"^protect.reference: a folder of pictures is needed, but the backbone takes texts$"
    ):
        reference_examples(str(tmp_path), VIEW, StreamOptions())


def test_a_resolved_recipe_says_how_it_is_cut(tmp_path):
    path = str(write(tmp_path / "x.jsonl", [GOOD]))
    assert make_recipe({"data": {"name": "text", "path": path}}).stream.by == "task"
    assert make_recipe({"data": {"name": "digits"}}).stream.by == "class"
    with pytest.raises(UsageError, match=r"stream.by: class works with pictures only"):
        make_recipe({"data": {"name": "text", "path": path}, "stream": {"by": "class"}})


def test_a_table_of_the_other_kind_than_its_source_says():
    class Made(Source):
        gives = "texts"

        def train(self):
            return MemoryTable([b""], ["a"], ["0"], "made")

        def test(self):
            return None

    with pytest.raises((UsageError, DataError)) as caught:
        stream_of(Made())
    assert "\n" not in str(caught.value)


def test_tables_made_by_hand():
    rows = [Row(f"row {i}", str(i), Text(f"p{i}", "ab"[i % 2], ("a", "b"))) for i in range(4)]
    table = TextTable(rows, ["t"] * 4, {"t": ("a", "b")}, {"t": "f1"})
    assert (table.labels, table.score([0]), table.classes([1])) == (["a", "b", "a", "b"], "f1", {"a", "b"})
    assert table.content(0, 3) == table.content(0)[:3]
    test = TextSet(table, [0, 1], ["a", "b"], VIEW, "test")
    assert (test.name(1), test.targets, test.weights) == ("row 1", [0, 1], None)


# -- as the loop takes them ---------------------------------------------------------------------------


def test_examples_as_tokens(tmp_path):
    root = tmp_path / "t"
    write(root / "train.jsonl", choices(5))
    write(root / "test.jsonl", choices(3, start=50))
    (task,) = stream_of(FileSource(path=str(root), options=["a", "b"])).tasks
    task.check()
    train, test = task.train, task.test
    assert train.deterministic
    assert train.lengths == [len(train.load(i, 7)) for i in range(5)]
    assert train.weights == [int(train.load(i, None).answer.sum()) for i in range(5)]
    assert all(len(test.load(i, None).options) == 2 for i in range(3))
    assert test.lengths == [len(VIEW.question(test.text(i))) for i in range(3)]
    batch, *_ = load_batches(train, [[(0, None), (3, None)]], Runtime())
    assert (len(batch), batch.targets.tolist(), batch.numbers.tolist()) == (2, [0, 1], [0, 3])
    assert int((batch.inputs.labels >= 0).sum()) == train.weights[0] + train.weights[3]


def test_tokens_are_found_once_and_stay_what_they_are(tmp_path, monkeypatch):
    root = tmp_path / "t"
    write(root / "train.jsonl", choices(5))
    write(root / "test.jsonl", choices(3, start=50))
    task = checked(FileSource(path=str(root), options=["a", "b"]))
    for examples, view in ((task.train, VIEW.sequence), (task.test, VIEW.question)):
        expected = [view(examples.text(i)) for i in range(len(examples))]
        monkeypatch.setattr(TextView, "_tokens", lambda *_: pytest.fail("texts were cut into tokens once more"))
        for i, e in enumerate(expected):
            found = examples.load(i, 0)
            assert found.ids.dtype == e.ids.dtype
            assert found.ids.tolist() == e.ids.tolist()
            assert found.cut == e.cut
            assert (found.answer is None) == (e.answer is None)
            if e.answer is not None:
                assert found.answer.tolist() == e.answer.tolist()
            assert [o.tolist() for o in found.options] == [o.tolist() for o in e.options]
        monkeypatch.undo()
    assert task.test.questions() is task.test, "else all tokens would be found anew at each evaluation"
    first, second = (task.test.load(i, None).options for i in range(2))
    assert [a is b for a, b in zip(first, second, strict=True)] == [True, True], "equal options are held once"


def test_prompts_that_were_cut_are_counted(tmp_path):
    root = tmp_path / "t"
    long = "x" * 100
    write(root / "train.jsonl", [*pairs(3), {"prompt": long, "answer": "b"}, {"prompt": long + "yy", "answer": "b"}])
    write(root / "test.jsonl", [*pairs(1, start=9), {"prompt": long, "answer": "c"}])
    task = checked(FileSource(path=str(root)))
    encoded = [VIEW.sequence(task.train.text(i)).cut for i in range(5)]
    assert task.warnings == [
        "task t: 2 of 5 training prompts are longer than the model's 64 tokens and were cut on the left "
        f"(the longest by {max(encoded)})",
        "task t: 1 of 2 test prompts, with room for an answer, are longer than the model's 64 tokens and were cut on "
        f"the left (the longest by {VIEW.question(task.test.text(1)).cut})",
    ]
    assert task.bad == []
    assert max(task.train.lengths) == 64
    again = stream_of(FileSource(path=str(root))).tasks[0].for_testing(())
    assert again.warnings == task.warnings[1:]


def test_answers_that_the_chat_template_drops_are_counted(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content if loop.last or m.role == 'user' else '-' }}]{% endfor %}"
        "{% if add_generation_prompt %}[{% endif %}"
    )
    turns = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user", "assistant", "user")]
    rows = [{"messages": [*turns, {"role": "assistant", "content": f"yes {i}"}]} for i in range(2)]
    rows += [{"messages": [turns[0], {"role": "assistant", "content": "yes"}]}]
    (task,) = stream_of(
        FileSource(path=str(write(tmp_path / "x.jsonl", rows))), TextView(tokenizer, max_length=64)
    ).tasks
    task.check()
    assert task.warnings == [
        "task x: 4 earlier answers in 2 of 3 training chats are not learned, because the model's chat template "
        "writes them in another form than at the end of a chat"
    ]


def test_what_nobody_looked_at_is_told(tmp_path):
    rows = [*pairs(3), {"prompt": "x" * 100, "answer": "b"}]
    (task,) = stream_of(FileSource(path=str(write(tmp_path / "x.jsonl", rows))), check="none").tasks
    task.check()
    assert task.warnings == [
        "task x: it is not known how many training prompts are cut, because stream.check has not encoded 4 of 4"
    ]
    assert len(task.train.lengths) == 4


def test_each_example_is_encoded_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        TextView, "sequence", lambda self, text, own=TextView.sequence: calls.append(1) or own(self, text)
    )
    (task,) = stream_of(FileSource(path=str(write(tmp_path / "x.jsonl", pairs(4))))).tasks
    seen = []
    task.check(lambda done, total: seen.append((done, total)))
    assert (len(calls), seen) == (4, [(4, 4)])
    assert sum(task.train.lengths) > sum(task.train.weights) > 0
    assert task.train.questions() is not task.train
    assert len(calls) == 4
    (lazy,) = stream_of(FileSource(path=str(tmp_path / "x.jsonl")), check="header").tasks
    lazy.check()
    assert len(calls) == 4
    assert lazy.train.lengths == task.train.lengths


# -- prompts without answers --------------------------------------------------------------------------


def test_prompts_for_prediction(tmp_path, monkeypatch):
    lines = tmp_path / "p.txt"
    lines.write_bytes("\ufeffone ä\n\n two\n".encode())
    rows = write(tmp_path / "p.jsonl", [{"prompt": "three"}, {"messages": [USER, SAID]}, {"messages": [USER]}])
    monkeypatch.setattr(sys, "stdin", io.StringIO("four\n\nfive"))
    hi = (("user", "hi"),)
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "nowhere.jsonl").symlink_to(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    for asked in ("What is it?", "x" * 5000, "a\0b", "half \ud83d", "folder/that is not there"):
        assert read_prompts([asked]) == [asked]
    (tmp_path / "What is it").write_text("x")
    with pytest.raises(DataError, match="What is it: is there"):
        read_prompts(["What is it"])
    assert read_prompts(["Say it.", str(lines), str(rows), "-"]) == [
        "Say it.", "one ä", " two", "three", hi, hi, "four", "five",
    ]  # fmt: skip
    for given_, message in (
        ([str(tmp_path / "none.txt")], "none.txt: no such file"),
        ([str(write(tmp_path / "x.jsonl", [{"prompt": "a"}, b"{"]))], "x.jsonl line 2: not JSON"),
        ([str(write(tmp_path / "y.jsonl", [{"answer": "a"}]))], "y.jsonl line 1: no prompt"),
        ([str(write(tmp_path / "z.jsonl", [{"messages": [SAID]}]))], "z.jsonl line 1: there is no message"),
        ([], "there is no prompt"),
        ([str(tmp_path)], "is a folder; name the files in it, and prompts are read from .txt, .jsonl"),
        (
            [str(write(tmp_path / "x.xlsx", [b"prompt"]))],
            r"x\.xlsx: is there, and prompts are read from .* with - as the in",
        ),
        ([str(write(tmp_path / "What is it", [b"x"]))], r"What is it: is there, and prompts are read from"),
        ([str(tmp_path / "pipe.txt")], r"pipe\.txt: is there, and prompts"),
        ([str(tmp_path / "nowhere.jsonl")], r"nowhere\.jsonl: is there, and prompts"),
    ):
        with pytest.raises(DataError, match=message):
            read_prompts(given_)
