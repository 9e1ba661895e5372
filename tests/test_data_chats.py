"""Layouts of texts that people have, and that nothing of a row falls away unsaid."""

from __future__ import annotations

import csv
import gzip
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from test_data_text import ORDER, stream_of, write
from tiny import CHAT, tiny_tokenizer

from perpetune import registry
from perpetune.data.guess import guess_source
from perpetune.data.texts.cl_benchmark import ClBenchmarkSource
from perpetune.data.texts.files import FileSource, holds_texts
from perpetune.data.texts.prompts import read_prompts
from perpetune.data.texts.tables import Text
from perpetune.data.texts.trace import TraceSource
from perpetune.data.texts.view import TextView
from perpetune.errors import DataError, UsageError

USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "ho"}
HI, HO = (("user", "hi"),), ("assistant", "ho")
# Knows reasoning, calls of tools and tools, as the templates of Qwen3 and Llama 3.1 do.
KNOWING = (
    "{% if tools %}[{{ tools | map(attribute='name') | join(',') }}]\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.name }}</call>{% endfor %}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Leaves out whom it does not know.
CHOOSY = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def view(template: str = KNOWING) -> TextView:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return TextView(tokenizer, max_length=512)


def learned(row: dict[str, Any], tmp_path: Path, suffix: str = "jsonl", template: str = KNOWING) -> tuple[str, str]:
    """What is learned of a row, its tokens of the end as `|`, and the whole that the model reads."""
    text = FileSource(path=str(write(tmp_path / f"one.{suffix}", [row]))).train().text(0)
    seen = view(template)
    encoded = seen.sequence(text)
    said = seen.tokenizer.decode(encoded.ids[encoded.answer])
    return said.replace("<eos>", "|"), seen.tokenizer.decode(encoded.ids)


# -- layouts ------------------------------------------------------------------------------------------

SHARED = [{"from": "system", "value": "S"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
SYSTEM = ("system", "S")
LAYOUTS: list[tuple[dict[str, Any], Text]] = [
    ({"conversations": SHARED}, Text((SYSTEM, *HI), "ho")),
    ({"conversations": SHARED[1:], "system": "S"}, Text((SYSTEM, *HI), "ho")),
    ({"conversations": [USER, SAID]}, Text(HI, "ho")),
    ({"messages": [{"role": "user", "content": PARTS}, {**SAID, "content": PARTS[:1]}]}, Text(HI, "h")),
    ({"messages": [{"role": "developer", "content": "S"}, USER, SAID]}, Text((("developer", "S"), *HI), "ho")),
    ({"messages": [USER, SAID, {"role": "tool", "content": "5"}, SAID]}, Text((*HI, HO, ("tool", "5")), "ho")),
    ({"instruction": "hi", "output": "ho"}, Text("hi", "ho")),
    ({"instruction": "hi", "input": "", "output": "ho"}, Text("hi", "ho")),
    ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, Text("Add.\n1 and 2", "3")),
    ({"instruction": "hi", "output": "ho", "system": "S"}, Text((SYSTEM, *HI), "ho")),
    (
        {"instruction": "hi", "input": "you", "output": "ho", "history": [["a", "b"], ["c", "d"]]},
        Text((("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "hi\nyou")), "ho"),
    ),
    ({"prompt": "hi", "completion": "ho"}, Text("hi", "ho")),
    ({"prompt": "hi", "response": "ho"}, Text("hi", "ho")),
    ({"prompt": [USER], "completion": [SAID]}, Text(HI, "ho")),
    ({"prompt": [USER], "answer": "ho"}, Text(HI, "ho")),
    ({"prompt": "hi", "answer": 0.5}, Text("hi", "0.5")),
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "jsonl.gz"])
@pytest.mark.parametrize(("row", "text"), LAYOUTS, ids=[str(n) for n in range(len(LAYOUTS))])
def test_each_layout_is_read_and_asked(tmp_path: Path, suffix: str, row: dict[str, Any], text: Text) -> None:
    path = write(tmp_path / f"x.{suffix.removesuffix('.gz')}", [row, row | {"note": None}])
    if suffix.endswith(".gz"):
        path.with_name("x.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = path.with_name("x.jsonl.gz")
    source = FileSource(path=str(path))
    table = source.train()
    assert [table.text(i) for i in range(2)] == [text, text]
    assert table.warnings == []
    assert read_prompts([str(path)]) == [text.prompt, text.prompt]
    assert holds_texts(str(path))


def test_names_that_were_given_come_first_and_say_what_is_left(tmp_path: Path) -> None:
    row = {
        "question": "q",
        "prompt": "p",
        "reply": "r",
        "answer": "a",
        "input": "i",
        "system": "s",
        "history": [["a", "b"]],
    }
    path = str(write(tmp_path / "x.jsonl", [row, row, {**row, "late": 0}]))
    table = FileSource(path=path, prompt_column="question", answer_column="reply", input_column="input").train()
    assert table.text(0) == Text("q\ni", "r")
    assert table.warnings == ["columns that are not used: 'prompt', 'answer', 'system', 'history', 'late'"]
    table = FileSource(path=path, system_column="system", history_column="history").train()
    assert table.text(0) == Text((("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "p")), "a")
    assert table.warnings == ["columns that are not used: 'question', 'reply', 'input', 'late'"]
    for option in ("input_column", "system_column", "history_column", "tools_column"):
        with pytest.raises(DataError, match="no column 'none'; found: question, "):
            FileSource(path=path, **{option: "none"}).train()


def test_rows_with_another_input_are_other_examples(tmp_path: Path) -> None:
    """And keys of rows without one are as they were, so that draws stay."""
    rows: list[dict[str, Any]] = [
        {"instruction": "Add.", "input": text, "output": "3"} for text in ("1 and 2", "0 and 3")
    ]
    first, second = (FileSource(path=str(write(tmp_path / f"{n}.jsonl", rows[n : n + 1]))).train() for n in (0, 1))
    assert first.key(0) != second.key(0)
    plain = [{"prompt": "Add.", "answer": "3"}, {"instruction": "Add.", "input": "", "output": "3"}]
    first, second = (FileSource(path=str(write(tmp_path / f"p{n}.jsonl", plain[n : n + 1]))).train() for n in (0, 1))
    assert first.key(0) == second.key(0)


def test_unused_columns_are_said_once_over_all_files_and_by_every_reader(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{n}", "answer": "a", "id": n, "empty": None, "none": []} for n in range(3)
    ]
    for task in ("a", "b"):
        write(tmp_path / "files" / f"{task}.jsonl", [{**row, "task": "x"} for row in rows])
        write(tmp_path / "trace" / ORDER[0 if task == "a" else 1] / "train.json", rows)
        labelled = [{"sentence": row["prompt"], "label": "a", "id": row["id"]} for row in rows]
        write(tmp_path / "bench" / "SC" / task / "train.json", labelled)
        (tmp_path / "bench" / "SC" / task / "labels.json").write_text('["a", "b"]')
    assert FileSource(path=str(tmp_path / "files")).train().warnings == ["columns that are not used: 'id', 'task'"]
    assert TraceSource(path=str(tmp_path / "trace")).train().warnings == ["columns that are not used: 'id'"]
    assert ClBenchmarkSource(path=str(tmp_path / "bench")).train().warnings == ["columns that are not used: 'id'"]
    both = write(tmp_path / "both.jsonl", [{"messages": [USER, SAID], "prompt": "hi", "prompt_id": "x"}])
    assert FileSource(path=str(both)).train().warnings == ["columns that are not used: 'prompt', 'prompt_id'"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\n "])
def test_an_array_in_a_file_of_lines(tmp_path: Path, indent: int | None, mark: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(mark + json.dumps([{"prompt": f"p{n}", "answer": n} for n in range(3)], indent=indent))
    table = FileSource(path=str(path)).train()
    assert [table.text(i) for i in range(3)] == [Text(f"p{n}", str(n)) for n in range(3)]
    assert table.name(2) == f"{path} item 3"
    assert holds_texts(str(path))


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b'{"prompt": "a"}')[:-9], b"\x1f\x8b\x08\x00" + b"\xff" * 40],
    ids=["no gzip", "cut", "no stream"],  # the bytes hold the time, and every process has to know the test by one name
)
def test_a_packed_file_that_is_broken_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: ") as caught:
        FileSource(path=str(tmp_path / "x.jsonl.gz")).train()
    assert "\n" not in str(caught.value)


def test_a_packed_file_names_its_task(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.json.gz", "train.jsonl.gz"):
        content = json.dumps([{"prompt": "p", "answer": name}]).encode()
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes(gzip.compress(content))
    (tmp_path / "d" / "train.jsonl.gz").rename(tmp_path / "d" / "c.jsonl.gz")
    assert FileSource(path=str(tmp_path / "d")).train().groups == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("number", "written"),
    [
        ("0.5", "0.5"),
        ("2.50", "2.50"),
        ("1.0", "1.0"),
        ("-0.0", "-0.0"),
        ("1e-5", "1e-5"),
        ("12345678901234567890.5",) * 2,
        ("7", "7"),
    ],
)
def test_numbers_are_answers_as_they_are_written(tmp_path: Path, number: str, written: str) -> None:
    for suffix, line in (("jsonl", '{"prompt": "a", "answer": %s}'), ("json", '[{"prompt": "a", "answer": %s}]')):
        (tmp_path / f"x.{suffix}").write_text(line % number)
        assert FileSource(path=str(tmp_path / f"x.{suffix}")).train().text(0).answer == written
    options = f'{{"prompt": "a", "answer": {number}, "options": [{number}, 3.25]}}'
    (tmp_path / "o.jsonl").write_text(options)
    assert FileSource(path=str(tmp_path / "o.jsonl")).train().text(0).options == (written, "3.25")


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_numbers_of_a_parquet_file_are_not_made_longer(tmp_path: Path, kind: str) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = pa.array(np.array([0.1, 0.5, 2.0], kind))
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "answer": numbers}), tmp_path / "x.parquet")
    table = FileSource(path=str(tmp_path / "x.parquet")).train()
    assert [table.text(i).answer for i in range(3)] == ["0.1", "0.5", "2.0"]


# -- parts of messages --------------------------------------------------------------------------------

TWO = [USER, {**SAID, "content": "wrong"}, {**USER, "content": "again"}, SAID]


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}, {"weight": False}])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_answers_that_are_not_to_be_learned_are_not(tmp_path: Path, flag: dict[str, Any], suffix: str) -> None:
    wrong = [TWO[0], TWO[1] | flag, *TWO[2:]]
    said, whole = learned({"messages": wrong}, tmp_path, suffix)
    assert said == "ho|"
    assert "wrong" in whole
    last = [*TWO[:3], SAID | flag]  # then the chat ends with the answer before it
    said, whole = learned({"messages": last}, tmp_path, suffix)
    assert said == "wrong|"
    assert "again" not in whole
    both = [TWO[0], TWO[1] | dict.fromkeys(flag, 1 if "weight" in flag else True), *TWO[2:]]
    assert learned({"messages": both}, tmp_path, suffix)[0] == "wrong|ho|"


def test_reasoning_calls_tools_and_names_reach_the_template(tmp_path: Path) -> None:
    said, _ = learned({"messages": [USER, {**SAID, "reasoning_content": "two and two"}]}, tmp_path)
    assert said == "<think>two and two</think>ho|"
    call = {"role": "assistant", "content": "I look.", "tool_calls": [{"name": "weather"}]}
    assert learned({"messages": [USER, call]}, tmp_path)[0] == "I look.<call>weather</call>|"
    assert learned({"messages": [USER, {**call, "content": None}]}, tmp_path)[0] == "<call>weather</call>|"
    result = {"role": "tool", "content": "sunny", "tool_call_id": "1"}
    said, whole = learned({"messages": [USER, {**call, "content": None}, result, SAID]}, tmp_path)
    assert said == "<call>weather</call>|ho|"
    assert "<|tool|>\nsunny" in whole
    for tools in ([{"name": "weather"}, {"name": "time"}], '[{"name": "weather"}, {"name": "time"}]'):
        assert learned({"messages": [USER, SAID], "tools": tools}, tmp_path)[1].startswith("[weather,time]\n<|user|>")


def notes_of(tmp_path: Path, rows: list[dict[str, Any]], template: str) -> list[str]:
    (task,) = stream_of(FileSource(path=str(write(tmp_path / "x.jsonl", rows))), view=view(template)).tasks
    task.check()
    assert task.bad == []
    return [w for w in task.warnings if "leaves out" in w]


def test_what_the_template_leaves_out_is_counted(tmp_path: Path) -> None:
    tool = {"role": "tool", "content": "5", "tool_call_id": "1"}
    rows: list[dict[str, Any]] = [
        {"messages": [USER, {**SAID, "reasoning_content": "why"}]},
        {"messages": [{"role": "system", "content": "S"}, USER, {**SAID, "reasoning_content": "why", "name": "n"}]},
        {"messages": [USER, SAID, tool, SAID], "tools": [{"name": "f"}]},
        {"messages": [USER, {**SAID, "weight": 1}]},
    ]
    start = "in {} of 4 training chats the model's chat template leaves out "
    found = notes_of(tmp_path, rows, CHOOSY)
    for count, what in (
        (2, "the messages' reasoning_content"),
        (1, "the messages' name"),
        (1, "the messages' tool_call_id"),
        (1, "the tools"),
        (1, "messages of the role system"),
        (1, "messages of the role tool"),
    ):
        assert any(note.endswith(start.format(count) + what) for note in found), (what, found)
    assert len(found) == 6
    known = notes_of(tmp_path, rows, KNOWING)
    assert [note.rpartition("leaves out ")[2] for note in known] == ["the messages' name", "the messages' tool_call_id"]
    trims = CHAT.replace("message['content']", "message['content'] | trim")
    rows = [{"messages": [USER, {**SAID, "content": "  ho"}]}, {"messages": [USER, SAID]}]
    (note,) = notes_of(tmp_path, rows, trims)
    assert note.endswith(
        "in 1 of 2 training chats the model's chat template leaves out white space at the ends of answers"
    )
    assert notes_of(tmp_path, rows, CHAT) == []


def test_a_developer_is_the_system_where_the_template_does_not_know_the_word(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "developer", "content": "Be short."}, USER, SAID]}
    assert "<|system|>\nBe short." in learned(chat, tmp_path)[1]
    knows = KNOWING.replace("<|{{ m.role }}|>", "<|{{ 'boss' if m.role == 'developer' else m.role }}|>")
    assert "<|boss|>\nBe short." in learned(chat, tmp_path, template=knows)[1]


def test_questions_are_asked_with_all_that_their_messages_hold(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [USER, {**SAID, "reasoning_content": "why"}, USER, SAID], "tools": [{"name": "f"}]}
    ]
    (prompt,) = read_prompts([str(write(tmp_path / "x.jsonl", rows))])
    asked = view()
    (question,) = asked.ask([prompt])
    assert asked.tokenizer.decode(question.item.ids) == (
        "[f]\n<|user|>\nhi<eos>\n<|assistant|>\n<think>why</think>ho<eos>\n<|user|>\nhi<eos>\n<|assistant|>\n"
    )
    (again,) = asked.ask([question.given])
    assert again.item.ids.tolist() == question.item.ids.tolist()


# -- sheets, and what is said of chats ----------------------------------------------------------------

CHAT_ROW = json.dumps([USER, SAID])
SHEETS: list[tuple[list[str], list[str], Text]] = [
    (["prompt", "answer"], ["  hi, you\n", " 0.50"], Text("  hi, you\n", " 0.50")),
    (["instruction", "input", "output"], ["Add.", "1 and 2", "3"], Text("Add.\n1 and 2", "3")),
    (["instruction", "input", "output"], ["hi", "", "ho"], Text("hi", "ho")),
    (
        ["instruction", "output", "history"],
        ["hi", "ho", '[["a", "b"]]'],
        Text((("user", "a"), ("assistant", "b"), *HI), "ho"),
    ),
    (["prompt", "completion", "options"], ["hi", "ho", '["ho", "ha"]'], Text("hi", "ho", ("ho", "ha"))),
    (["messages"], [CHAT_ROW], Text(HI, "ho")),
    (["prompt", "answer", "messages"], ["hi", "ho", ""], Text("hi", "ho")),
    (["prompt", "answer"], ['["a"]', "[1, 2]"], Text('["a"]', "[1, 2]")),
]  # fmt: skip


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "semicolons.csv", "excel.csv", "x.csv.gz"])
@pytest.mark.parametrize("case", range(len(SHEETS)))
def test_sheets_of_texts(case: int, name: str, tmp_path: Path) -> None:
    header, cells, text = SHEETS[case]
    target, delimiter = io.StringIO(newline=""), {"x.tsv": "\t", "semicolons.csv": ";"}.get(name, ",")
    csv.writer(target, delimiter=delimiter).writerows([header, cells, cells])
    content = target.getvalue().encode("utf-16" if name == "excel.csv" else "utf-8-sig")
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for folder in (path, tmp_path):  # in a folder its name is that of the task
        table = FileSource(path=str(folder)).train()
        assert [table.text(i) for i in range(2)] == [text, text]
        assert table.warnings == []
    assert holds_texts(str(path))
    assert guess_source(str(path), registry.every("data"), "texts")[0] == "text"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options are no part of a prompt
        assert read_prompts([str(path)]) == [text.prompt, text.prompt]


def test_sheets_name_columns_that_are_not_used_and_take_other_names(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("question,reply,id\nhi,ho,1\n")
    assert guess_source(str(path), registry.every("data"), "texts")[0] == "text"
    table = FileSource(path=str(path), prompt_column="question", answer_column="reply").train()
    assert (table.text(0), table.name(0)) == (Text("hi", "ho"), f"{path} line 2")
    assert table.warnings == ["columns that are not used: 'id'"]
    path.write_text(f"prompt,answer\n{'long ' * 60_000},ho\n")
    assert len(FileSource(path=str(path)).train().text(0).prompt) == 300_000


def test_a_sheet_of_something_else_in_a_folder_of_texts_is_left(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "a"}])
    (tmp_path / "costs.csv").write_text("month,euro\n1,2\n")
    assert FileSource(path=str(tmp_path)).train().groups == ["a"]


def test_a_manifest_of_pictures_is_no_sheet_of_texts(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,label,note\na.png,b,c\n")
    assert guess_source(str(tmp_path / "m.csv"), registry.every("data"))[0] == "manifest"
    with pytest.raises(UsageError, match="for the reader `manifest`: these are pictures, and the backbone takes texts"):
        guess_source(str(tmp_path / "m.csv"), registry.every("data"), "texts")


BARE: list[Any] = [
    [{"role": "User", "content": "hi"}, {"role": "ASSISTANT ", "content": "ho"}],
    [{"role": "human", "content": "hi"}, {"role": "gpt", "content": "ho"}],
    [{"from": "Human", "value": "hi"}, {"from": "GPT", "value": "ho"}],
    [USER, SAID],
]


@pytest.mark.parametrize("case", range(len(BARE)))
@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz"])
@pytest.mark.parametrize("form", ["bare", "messages", "json", "one"])
def test_roles_with_capitals_lists_alone_and_messages_as_json(
    case: int, suffix: str, form: str, tmp_path: Path
) -> None:
    chat: Any = BARE[case]
    row = {"bare": chat, "messages": {"messages": chat}, "json": {"conversations": json.dumps(chat)}, "one": chat}[form]
    rows = [row] if form == "one" else [row, row]
    path = tmp_path / f"x.{suffix}"
    if suffix == "json":
        content = json.dumps(row if form == "one" else rows, indent=1)
    else:
        content = "".join(f"{json.dumps(one)}\n" for one in rows)
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith(".gz") else content.encode())
    table = FileSource(path=str(path)).train()
    assert [table.text(i) for i in range(len(table))] == [Text(HI, "ho")] * len(rows)
    assert table.warnings == []
    assert read_prompts([str(path)]) == [HI] * len(rows)


def test_chats_that_go_on_behind_their_last_answer(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"messages": [USER, SAID, {**USER, "content": "again"}]},
        {"messages": [USER, SAID]},
        [USER, {**SAID, "content": "one"}, USER, SAID, {"role": "Tool", "content": "5"}],
        {"messages": [USER, USER]},
    ]
    path = write(tmp_path / "x.jsonl", rows)
    table = FileSource(path=str(path)).train()
    assert [table.text(i) for i in (0, 1)] == [Text(HI, "ho")] * 2
    assert table.text(2) == Text((*HI, ("assistant", "one"), *HI), "ho")
    assert "the last message is by 'user'" in table.faults[3]
    assert table.warnings == ["2 of 3 chats go on behind their last answer: nothing is learned of that"]
    (again,) = read_prompts([str(write(tmp_path / "y.jsonl", rows[:1]))])  # asked, it is a question
    assert again == (*HI, HO, ("user", "again"))


def test_trimmed_answers_in_the_middle_of_a_chat_are_counted(tmp_path: Path) -> None:
    trims = CHAT.replace("message['content']", "message['content'] | trim")
    rows = [{"messages": [USER, {**SAID, "content": "ho\n"}, USER, SAID]}, {"messages": [USER, SAID]}]
    (note,) = notes_of(tmp_path, rows, trims)
    assert note.endswith(
        "in 1 of 2 training chats the model's chat template leaves out white space at the ends of answers"
    )


def test_unused_columns_of_prompts_are_said(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": "a", "id": 1, "none": None}, {"prompt": "q", "note": "x"}]
    path = write(tmp_path / "x.jsonl", rows)
    with pytest.warns(UserWarning, match="columns of the prompts' files that are not used: 'id', 'note'"):
        assert read_prompts([str(path)]) == ["p", "q"]


def test_a_sentence_of_the_benchmark_keeps_its_white_space(tmp_path: Path) -> None:
    """Of a sentence only the line feed that ends each in the published files is no part."""
    folder = tmp_path / "SC" / "a"
    write(folder / "train.json", [{"sentence": "  Text: a \n\n", "label": "b "}, {"sentence": "Text: c", "label": "b"}])
    (folder / "labels.json").write_text('["b", "d"]')
    table = ClBenchmarkSource(path=str(tmp_path)).train()
    assert table.text(0).prompt.endswith("Option: b, d\n\n  Text: a \n\nAnswer:")
    assert table.text(1).prompt.endswith("Option: b, d\n\nText: c\nAnswer:")
    assert [table.text(i).answer for i in range(2)] == ["b", "b"]
