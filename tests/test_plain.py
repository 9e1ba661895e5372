"""YAML and JSON of strangers: bounded before they are built, and every fault is one line that says where it is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import paired, vit_folder

from perpetune import plain as plain_module
from perpetune.cli import call
from perpetune.data.pictures.rows import read_rows
from perpetune.data.texts.records import read_records
from perpetune.errors import DataError, UsageError
from perpetune.export.peft import _read_config
from perpetune.models.loaders.folder import load_folder
from perpetune.plain import MOST_DEPTH, MOST_DIGITS, Malformed, parse_json, parse_yaml, read_json, read_regular
from perpetune.recipe import load_recipe, make_recipe, parse_recipe
from perpetune.report.page import is_comparison

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
YAMLS: dict[str, tuple[str, str]] = {
    "aliases that expand": (LAUGHS, "line 5: it stands for more than 50000 values"),
    "merges that expand": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
        "it stands for more than 50000 values",
    ),
    "an alias inside itself": ("a: &a [*a]", "line 1: the alias *a stands inside what it repeats"),
    "an alias of nothing": ("a: 1\nb: *c", "line 2: found undefined alias 'c'"),
    "40,000 keys": ("\n".join(f"k{i}: {i}" for i in range(40_000)), "line 25000: it stands for more than 50000 values"),
    "2,000 keys": ("a:\n" + "\n".join(f"  k{i}: {i}" for i in range(2000)), "line 2: a mapping of 2000 keys"),
    "deep lists": ("[" * 200_000, "line 1: lists and mappings stand in each other more than 64 deep"),
    "deep mappings": ("{a: " * 200_000, "more than 64 deep"),
    "deep blocks": ("- " * 200_000, "more than 64 deep"),
    "deep keys": ("? " * 200_000, "more than 64 deep"),
    "many digits": (f"a: 1\nb: {'9' * 5000}", "line 2: a number has 5000 digits"),
    "many digits of 60": (f"a: {'1:' * 5000}1", "line 1: a number has 10001 digits"),
    "many digits of a fraction": (f"a: {'1' * 5000}.5", "line 1: a number has 5002 digits"),
    "no int": ("a: 1\nb: !!int z", "line 2: 'z' is no int"),
    "no float": ("!!float z", "line 1: 'z' is no float"),
    "no bool": ("!!bool z", "line 1: 'z' is no bool"),
    "no map": ("a: !!map z", "line 1: no mapping, though its tag says so"),
    "no list": ("a: !!seq z", "line 1: expected a sequence node, but found scalar"),
    "a date that is none": ("a: !!timestamp 2024-13-45", "the tag 'tag:yaml.org,2002:timestamp' makes no plain value"),
    "an object": ("a: !!python/object/apply:os.system [ls]", "makes no plain value: leave it out"),
    "bytes": ("a: !!binary eA==", "makes no plain value"),
    "NUL": ("a: 1\nb: \0", "line 2: the character #x0000 is not allowed"),
    "half a character": ("a: 1\n\nb: \ud800", "line 3: the character #xd800 is not allowed"),
    "two documents": ("a: 1\n---\nb: 2", "line 2: a second document begins"),
    "a key twice": ("a: 1\nb: 2\na: 3", "line 3: key 'a' stands twice"),
    "a list as a key": ("[a]: 1", "line 1: found unhashable key"),
    "a tab": ("a:\n\tb: 1", "line 2: found character"),
    "too large": ("a" * (2**20 + 1), "it has more than 1048576"),
    "another version": ("%YAML 9.9\n---\na", "found incompatible YAML document"),
}
JSONS: dict[str, tuple[str, str]] = {
    "deep lists": ("[" * 200_000, f"line 1: lists and objects stand in each other more than {MOST_DEPTH} deep"),
    "deep objects": ('\n{"a":' * 200_000, "line 66: lists and objects stand in each other"),
    "closed deep lists": (f"{'[' * 500}{']' * 500}", "line 1: lists and objects stand in each other"),
    "many digits": ("9" * 5000, "a number has 5000 digits"),
    "a key twice": ('{"a": {"b": 1, "c": 2, "b": 3}}', "key 'b' stands twice"),
    "NUL": ('{"a": "\0"}', "Invalid control character at: line 1 column"),
    "nothing": ("", "Expecting value: line 1 column 1"),
    "cut": ('{"a": ', "Expecting value: line 1 column 7"),
}


@pytest.mark.parametrize("kind", YAMLS)
def test_yaml_that_is_none_is_one_line_soon(kind: str) -> None:
    text, says = YAMLS[kind]
    began = time.monotonic()
    with pytest.raises(Malformed) as error:
        parse_yaml(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("kind", JSONS)
def test_json_that_is_none_is_one_line_soon(kind: str) -> None:
    text, says = JSONS[kind]
    began = time.monotonic()
    for given_ in (text, text.encode(), b"\xef\xbb\xbf" + text.encode()):
        with pytest.raises(Malformed) as error:
            parse_json(given_)
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    assert time.monotonic() - began < 20


def test_plain_yaml_is_read_as_before() -> None:
    text = "a: &a {x: 1, y: [1.5, true, null, ~, 'q', \"\\u00e4\"]}\nb: *a\nc: {<<: *a, z: 2}\nd: !!str 5\n"
    inner = {"x": 1, "y": [1.5, True, None, None, "q", "ä"]}
    assert parse_yaml(text) == {"a": inner, "b": inner, "c": {**inner, "z": 2}, "d": "5"}
    assert parse_yaml("") is None
    assert parse_yaml(f"{'[' * MOST_DEPTH}{']' * MOST_DEPTH}") is not None
    assert parse_yaml("9" * MOST_DIGITS) == int("9" * MOST_DIGITS)


def test_a_date_is_the_text_that_it_is_written_as() -> None:
    assert parse_yaml("a: 2024-02-30\nb: 2024-02-01\nc: 2024-02-01 10:00:00") == {
        "a": "2024-02-30",
        "b": "2024-02-01",
        "c": "2024-02-01 10:00:00",
    }
    assert load_recipe("update", ["name=2024-02-30"]).name == "2024-02-30"


def plain(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none() | st.booleans() | st.integers(-(10**60), 10**60) | st.floats(allow_nan=False) | texts,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=20,
    )


# PyYAML writes these line breaks unquoted, and reads them back as spaces.
WRITABLE = st.text(st.characters(exclude_characters="\x85\u2028\u2029", exclude_categories=["Cs"]))


@given(plain(st.text()))
def test_what_json_writes_is_read_back(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, indent=1, ensure_ascii=True).encode()) == value


@given(plain(WRITABLE))
def test_what_yaml_writes_is_read_back(value: Any) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert parse_yaml(text) == value


@given(st.text() | st.text(alphabet="[]{}:,-?&*!|>%@`#'\" \n\tab01.~<", max_size=60))
def test_any_text_is_read_or_one_line(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        said = "fine"
        try:
            parse(text)
        except Malformed as error:
            said = str(error)
        assert said
        assert "\n" not in said


SIGNS = [
    *"[]{},:-?|>#'\"\\~%!&*\n ",
    ": ",
    "- ",
    "\n  ",
    "\n- ",
    "a",
    "1.5",
    "é…",
    "---",
    "&a",
    "*a",
    "0x1",
    "<<: ",
    "\t",
    "b: ",
]


@pytest.mark.skipif(plain_module._Fast is None, reason="PyYAML is built without libyaml")
@hypothesis.settings(max_examples=300)
@given(st.lists(st.sampled_from(SIGNS), max_size=12).map("".join))
def test_libyaml_changes_no_value_and_no_word(text: str) -> None:
    found = []
    for fast in (plain_module._Fast, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plain_module, "_Fast", fast)
            try:
                found.append(repr(parse_yaml(text)))
            except Malformed as error:
                found.append(f"fault: {error}")
    assert found[0] == found[1]


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_read_only_where_they_may_be(text: str) -> None:
    parse_json(text)
    with pytest.raises(Malformed, match="is not a finite number"):
        parse_json(text, finite=True)


# -- files --------------------------------------------------------------------------------------------------


def test_nothing_but_regular_files_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to(tmp_path / "pipe")
    assert read_regular(tmp_path / "file", 5) == read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(tmp_path / "file", 4)
    for name in ("pipe", "to pipe"):
        with pytest.raises(OSError, match="not a regular file"):
            read_regular(tmp_path / name, 5)
    with pytest.raises(OSError, match="not a regular file"):
        read_regular("/dev/zero", 5)
    with pytest.raises(OSError, match="Is a directory"):
        read_regular(tmp_path, 5)
    with pytest.raises(OSError, match="No such file"):
        read_json(tmp_path / "nothing")


# -- every reader -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", YAMLS)
def test_every_recipe_names_its_file_and_line(kind: str, tmp_path: Path) -> None:
    text, says = YAMLS[kind]
    path = tmp_path / "strange.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    above = tmp_path / "above.yaml"
    above.write_text("extends: strange.yaml\n")
    for file in (path, above):
        with pytest.raises(UsageError) as error:
            load_recipe(file)
        line = str(error.value)
        assert "strange.yaml" in line
        if kind != "half a character":  # that is no UTF-8
            assert says.partition(": ")[2] in line
            assert says.partition(":")[0] in line
        assert "\n" not in line


@pytest.mark.parametrize(
    ("kind", "verb"),
    paired(
        ["aliases that expand", "deep lists", "many digits", "no int", "NUL", "a key twice"],
        ["run", "init", "show", "check"],
    ),
)
def test_every_set_is_read_as_a_recipe_is(
    kind: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = {"run": ["update"], "init": ["state"], "show": ["update"], "check": ["finetune"]}[verb]
    assert call([verb, *first, "--set", f"name={YAMLS[kind][0]}"]) == 2
    said = capfd.readouterr()
    assert said.err.startswith("perpetune: --set ")
    assert "the value is not YAML" in said.err
    assert said.err.count("\n") == 1
    assert len(said.err) < 1000
    assert list(tmp_path.iterdir()) == []


def test_a_set_of_many_keys_below_each_other(capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["show", "update", "--set", ".".join(["a"] * 100_000) + "=1"]) == 2
    said = capfd.readouterr().err
    assert "more than 8 keys below each other" in said
    assert len(said) < 200


def test_recipes_that_extend_each_other_without_end(tmp_path: Path) -> None:
    for i in range(3000):
        (tmp_path / f"r{i}.yaml").write_text(f"extends: r{i + 1}.yaml\n")
    with pytest.raises(UsageError, match="more than 16 recipes extend each other"):
        load_recipe(tmp_path / "r0.yaml")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "a/" * 3000 + "b"])
def test_the_name_of_a_recipe_that_no_file_can_have(name: str) -> None:
    with pytest.raises(UsageError, match="cannot read the recipe"):
        load_recipe(f"{name}.yaml")
    with pytest.raises(UsageError, match="cannot read the recipe"):
        make_recipe({"extends": f"{name}.yaml"})


def test_a_recipe_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match="not a regular file"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match="not a regular file"):
        load_recipe("/dev/zero")


def test_a_recipe_from_windows(tmp_path: Path) -> None:
    """A byte order mark, and lines that end in two characters."""
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbfname: x\r\ndescription: 'a\r\n\r\n  b'\r\n")
    found = load_recipe(tmp_path / "recipe.yaml")
    assert (found.name, found.description) == ("x", "a\nb")
    assert parse_recipe(found.to_yaml(), "again") == found


STRANGE = {kind: case for kind, case in JSONS.items() if kind not in ("nothing", "deep objects")}


@pytest.mark.parametrize("kind", STRANGE)
def test_every_json_reader_says_its_file(kind: str, tmp_path: Path) -> None:
    text, says = STRANGE[kind]
    content = text.encode()
    model = vit_folder(tmp_path / "vit")
    whole = {name: (model / name).read_bytes() for name in ("config.json", "preprocessor_config.json")}
    says = says.partition(": ")[2] or says  # a reader of lines names the line itself

    def refused(kind_: type[Exception], read: Callable[[], object], name: str) -> None:
        with pytest.raises(kind_) as error:
            read()
        assert says[:24] in str(error.value), name
        assert name in str(error.value)
        assert "\n" not in str(error.value)

    (tmp_path / "rows.jsonl").write_bytes(b'{"path": "a.png", "label": "a"}\n' + content)
    refused(DataError, lambda: read_rows(str(tmp_path / "rows.jsonl")), "rows.jsonl line 2")
    found = read_records(str(tmp_path / "rows.jsonl"))
    assert found[1].at.endswith("rows.jsonl line 2")
    assert says[:24] in found[1].fault
    if kind != "cut":
        (tmp_path / "rows.json").write_bytes(b'[{"a": 1},\n' + content + b"]")
        with pytest.raises(DataError, match=r"rows\.json item 2: not JSON"):
            read_records(str(tmp_path / "rows.json"))
    (tmp_path / "adapter_config.json").write_bytes(content)
    refused(UsageError, lambda: _read_config(tmp_path / "adapter_config.json"), "adapter_config.json")
    for name, before in whole.items():
        (model / name).write_bytes(content)
        refused(UsageError, lambda: load_folder(str(model)), name)
        (model / name).write_bytes(before)
    (tmp_path / "compare.json").write_bytes(content)
    assert not is_comparison(tmp_path / "compare.json")


@pytest.mark.parametrize("kind", STRANGE)
def test_a_report_of_strangers(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(STRANGE[kind][0])
    assert call(["compare", str(tmp_path / "report.json"), str(tmp_path / "report.json")]) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "report.json" in said


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.csv"])
def test_a_manifest_with_a_very_strange_cell(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    text = {"a.jsonl": '{"path": "a.png", "label": %s}' % ("9" * 5000), "b.json": "[" * 5000, "c.csv": "path,label\n\0"}
    (tmp_path / name).write_text(text[name])
    changes = ["--set", "run.device=cpu"]
    assert call(["init", str(tmp_path / "state"), *changes, "--data", str(tmp_path / name), "-q"]) in (1, 2)
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
