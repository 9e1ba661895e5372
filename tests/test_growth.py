"""What a month costs does not grow with the months before it: earlier tasks have turns, documents are read once."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import picture_folder, recipe, split_folder, vit_folder

from perpetune import sequence
from perpetune.data.pictures.tables import FileTable
from perpetune.documents import Document
from perpetune.errors import StateError
from perpetune.learner import Learner
from perpetune.report.sections import matrix
from perpetune.results import read_results
from perpetune.runtime import Silent
from perpetune.snapshot import read_tensors
from perpetune.state import State, committed

MONTHS, MOST = 7, 2
RIDGE: dict[str, Any] = {"method": "frozen", "pet": "none", "head": "ridge"}


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def months(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven folders of the same two classes with other pictures."""
    root, found = tmp_path_factory.mktemp("months"), []
    for number in range(MONTHS):
        for part, count in (("train", 2), ("test", 2)):
            first = 100 * number + (50 if part == "test" else 0)
            picture_folder(root / f"m{number}" / part, "ab", count, first=first)
        found.append(root / f"m{number}")
    return found


def of_months(vit: Path, **evaluated: Any) -> dict[str, Any]:
    return recipe(vit, None, setting="domain", evaluate={"batch_size": 4, **evaluated}, **RIDGE)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "ASKED", MOST)


def test_each_earlier_task_has_its_turn(few: None, vit: Path, months: list[Path], tmp_path: Path) -> None:
    """Rows hold at most so many earlier tasks, each is asked again in time, what is asked has the counts of a run that
    asks all, and nothing is computed again. One learner and a new process for each month do the same."""
    whole, turn, notes = Learner(of_months(vit, earlier="all"), tmp_path / "all"), tmp_path / "turn", Notes()
    one = Learner(of_months(vit), turn, progress=notes)
    Learner(of_months(vit), tmp_path / "anew")
    for month in months:
        everything, results = whole.learn(month), one.learn(month)
        anew = Learner.load(tmp_path / "anew")
        assert anew.learn(month)["cells"] == results["cells"]
        assert anew._kept.computed == 4, "the features of earlier pictures that had to wait are still kept"
    rows = [[j for j, cell in enumerate(row) if cell] for row in results["cells"]]
    assert [len(row) for row in rows] == [1, 2, 3, 3, 3, 3, 3]
    for task in range(MONTHS):
        asked = [i for i, row in enumerate(rows) if task in row]
        gaps = [after - before for before, after in zip(asked, [*asked[1:], MONTHS], strict=True)]
        assert max(gaps) <= math.ceil((MONTHS - 1) / MOST)
    for i, row in enumerate(rows):
        assert [results["cells"][i][j] for j in row] == [everything["cells"][i][j] for j in row]
    assert one._kept.computed == 4 * MONTHS
    assert [line for line in notes.lines if "evaluate.earlier: auto" in line] == [
        "2 of 3 earlier tasks are asked after each update from now on, those that were asked the longest time ago "
        "(evaluate.earlier: auto; `all` asks all)"
    ]
    assert results["in_turn"] == [
        {"task": 3, "count": 1},
        {"task": 4, "count": 2},
        {"task": 5, "count": 3},
        {"task": 6, "count": 4},
    ]
    assert matrix.asked(results) == (
        "After 4 tasks not all earlier ones were asked, but those that were asked the longest time ago (up to 4 tasks "
        "had to wait). Means are over the tasks that were asked."
    )
    means = [
        sum(c["correct"] / c["total"] for c in row if c) / sum(c is not None for c in row) for row in results["cells"]
    ]
    assert results["metrics"]["final_accuracy"] == pytest.approx(means[-1])
    assert results["metrics"]["average_accuracy"] == pytest.approx(sum(means) / MONTHS)
    assert results["metrics"]["pooled_accuracy"] is None


def test_after_each_task_of_a_stream_all_are_asked(few: None, vit: Path, tmp_path: Path) -> None:
    data = split_folder(tmp_path / "data", "abcdefgh", 2, 1)
    results = Learner(recipe(vit, data, **RIDGE), tmp_path / "state").run()
    assert [sum(cell is not None for cell in row) for row in results["cells"]] == [1, 2, 3, 4]
    assert "in_turn" not in results


def test_what_rests_has_no_drift_and_is_not_looked_at(
    vit: Path, months: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen features are the same by their digest. Control: where pets move, old features are read and compared."""
    read: list[str] = []
    monkeypatch.setattr("perpetune.drifting.read_tensors", lambda *given: read.append(given[2]) or read_tensors(*given))
    rests = Learner(of_months(vit), tmp_path / "rests")
    moves = Learner({**of_months(vit), "method": "finetune", "pet": "lora"}, tmp_path / "moves")
    for month in months[:3]:
        still, moved = rests.learn(month), moves.learn(month)
    assert still["drift"][2]["of"] == {"m0": 0.0, "m1": 0.0}
    assert read == ["m0", "m0", "m1"], "once by the second task and twice by the third, of the one that moves"
    assert all(value > 0 for value in moved["drift"][2]["of"].values())


def test_documents_are_read_once_and_a_change_is_seen(
    vit: Path, months: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(of_months(vit), tmp_path / "state")
    for month in months[:2]:
        learner.learn(month)
    state, parsed = State(tmp_path / "state"), list[str]()

    def counted(kind: type[Document], content: bytes, where: str, cure: str) -> Any:
        parsed.append(where)
        return read_document(kind, content, where, cure)

    read_document = committed.read_document
    monkeypatch.setattr(committed, "read_document", counted)
    first = read_results(state)
    assert len(parsed) == 6
    assert read_results(state) == first == read_results(State(tmp_path / "state"))
    assert len(parsed) == 12, "the other state reads its own"
    file = state.committed[0].folder / "task.json"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"train": 4', b'"train": 5'))
    with pytest.raises(StateError, match=r"task.json is torn or was changed"):
        read_results(state)
    file.write_bytes(content)
    assert read_results(state) == first


def test_a_search_for_test_pictures_reads_no_known_one_again(
    vit: Path, months: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A month that trains on an earlier test picture is told so; of other known pictures nothing is read for it."""
    learner = Learner(of_months(vit), tmp_path / "state")
    for month in months[:3]:
        learner.learn(month)
    copied = tmp_path / "copied"
    picture_folder(copied / "train", "ab", 2, first=900)
    picture_folder(copied / "test", "ab", 2, first=950)
    source = next((months[1] / "test" / "a").iterdir())
    (copied / "train" / "a" / "leak.png").write_bytes(source.read_bytes())
    looked: list[str] = []
    content = FileTable.content
    monkeypatch.setattr(FileTable, "content", lambda t, i, n=-1: looked.append(t.name(i)) or content(t, i, n))
    notes = Notes()
    learner.runtime.progress = notes
    learner.learn(copied)
    assert [line for line in notes.lines if "trains on" in line] == [
        f"task copied trains on 1 test pictures of earlier tasks: {copied / 'train/a/leak.png'} = {source} (task m1)"
    ]
    assert not [name for name in looked if str(months[0]) in name and "train" in name]


def test_what_a_learner_adds_up_is_what_a_new_process_reads(
    few: None, vit: Path, months: list[Path], tmp_path: Path
) -> None:
    """Through updates, prunes, a rollback and a name that is learned anew with other data."""
    learner, folder = Learner({**of_months(vit), "run": {"keep": 3}}, tmp_path / "state"), tmp_path / "state"
    other = tmp_path / "other"
    for part in ("train", "test"):
        picture_folder(other / part, "ab", 3, first=2000 if part == "train" else 2100)

    def same(found: dict[str, Any]) -> None:
        new = read_results(State(folder))
        assert found == new
        assert [len(row) for row in new["cells"]] == [len(new["tasks"])] * len(new["tasks"])

    first = learner.learn(months[0])
    told = copy.deepcopy(first)
    for month in months[1:5]:
        same(learner.learn(month))
    with learner.state.writing():
        same(read_results(learner.state))
    assert first == told, "an earlier document is as it was"
    State(folder).rollback("m3")  # by another process
    with learner.state.writing():
        same(read_results(learner.state))
    for name, month in (("m4", other), ("m5", months[5]), ("m6", months[6])):
        same(Learner.load(folder).learn(month, name=name))
    with learner.state.writing():
        same(read_results(learner.state))
    assert read_results(learner.state)["tasks"][4]["train"] == 6


def test_a_damaged_document_is_seen_under_the_lock_of_a_new_process(
    vit: Path, months: list[Path], tmp_path: Path
) -> None:
    learner = Learner(of_months(vit), tmp_path / "state")
    for month in months[:2]:
        learner.learn(month)
    file = learner.state.committed[0].folder / "metrics.json"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(StateError, match=r"metrics.json is torn or was changed"):
        Learner.load(tmp_path / "state").learn(months[2])


def test_of_many_months_that_are_gone_one_line_says_so(
    few: None, vit: Path, months: list[Path], tmp_path: Path
) -> None:
    """Nobody keeps old data, so most test data are gone. The others have their turns all the same."""
    mine = [Path(shutil.copytree(month, tmp_path / "data" / month.name)) for month in months]
    learner = Learner(of_months(vit), tmp_path / "state")
    for month in mine[:6]:
        learner.learn(month)
    for month in mine[:5]:
        shutil.rmtree(month)
    notes = Notes()
    results = Learner.load(tmp_path / "state", progress=notes).learn(mine[6])
    told = [line for line in notes.lines if "not evaluated" in line]
    assert len(told) == 1
    assert told[0].startswith("5 earlier tasks are not evaluated: m0, m1, m2, m3, m4; for example, task m0 is not ")
    assert told[0].endswith("say where: `perpetune relocate STATE --data OLD=NEW`")
    assert [j for j, cell in enumerate(results["cells"][6]) if cell] == [5, 6]
