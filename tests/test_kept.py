"""Features that are found again: nothing is served that the net would not compute, and what rests is not computed."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_evaluate import Reads, Written, task_of
from tiny import SIZE, every, picture, picture_folder, recipe, split_folder, vit_folder
from torch import Tensor, nn

from perpetune.data.pictures.view import PictureView
from perpetune.evaluate import How, Limit, ask, evaluate, sample
from perpetune.kept import FOLDER
from perpetune.learner import Learner
from perpetune.models import keeping
from perpetune.models.keeping import Keeper, NotKept, Unseen, digest_of
from perpetune.pets import pets, using
from perpetune.report import compare
from perpetune.report.sections import matrix
from perpetune.runtime import Silent
from perpetune.tasks import Inputs

SMALL = {"epochs": 1, "batch_size": 8, "lr": 0.05}
CHOICES: dict[str, dict[str, Any]] = {
    "frozen": {"method": "frozen", "pet": "none", "head": "ridge"},
    "first_session": {"method": {"name": "first_session", "concat": True}, "head": "ncm"},
    "finetune": {"head": "linear"},
    "safe": {"method": {"name": "safe", "later": {"epochs": 1}}, "head": "ncm"},
    "treelora": {"method": {"name": "treelora", "probe": 1}},
    "pool": {"method": {"name": "pool", "select": "centres", "answer": "own"}, "pet": {"name": "prompt", "length": 2}},
    "average": {"head": "linear", "average": {"keep": 0.5, "answer": "both"}},
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of two classes, with six test pictures each."""
    return split_folder(tmp_path_factory.mktemp("data"), "abcdef", 4, 3)


def made(vit: Path, data: Path | None, name: str, **evaluated: Any) -> dict[str, Any]:
    return recipe(vit, data, train=SMALL, evaluate={"batch_size": 4, **evaluated}, **CHOICES[name])


def metrics(state: Path) -> list[str]:
    return [(task / "metrics.json").read_text() for task in sorted((state / "tasks").iterdir())]


def files(state: Path) -> list[Path]:
    return sorted((state / FOLDER).iterdir()) if (state / FOLDER).is_dir() else []


def keeper(learner: Learner) -> Any:
    return learner._kept


# -- answers are the same ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", every(CHOICES, 3))
def test_counts_and_drift_are_those_without_kept_features(name: str, vit: Path, data: Path, tmp_path: Path) -> None:
    found = {}
    for keep in (1, 0):
        learner = Learner(made(vit, data, name, keep=keep), tmp_path / str(keep))
        learner.run()
        found[keep] = keeper(learner).computed
    assert metrics(tmp_path / "1") == metrics(tmp_path / "0")
    assert not files(tmp_path / "0")
    assert found[1] < found[0] if name not in ("finetune", "average") else found[1] == found[0]


def test_scores_have_the_same_bits(vit: Path, data: Path, tmp_path: Path) -> None:
    learner = Learner(made(vit, data, "frozen"), tmp_path / "state")
    learner.run()
    tasks, answered = [learner._tasks.past(c) for c in learner.state.committed], learner.method.answers
    seen: dict[bool, list[Tensor]] = {True: [], False: []}

    def watched(inputs: Inputs) -> Any:
        answers = answered(inputs)
        seen[isinstance(inputs, Unseen)].append(answers.scores)
        return answers

    learner.method.answers = watched  # type: ignore[method-assign]
    how = How("seen", 4)
    with keeper(learner).at_work(torch.device("cpu")):
        kept = ask(learner.method, tasks, how)
    plain = ask(learner.method, tasks, how)
    assert [one.cell for one in kept] == [one.cell for one in plain]
    assert len(seen[True]) == len(seen[False]) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen[True], seen[False], strict=True))


def test_what_moved_is_not_found_again_and_a_digest_that_does_not_see_it_is_wrong(
    vit: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with a digest that does not look at the pets, features from before they moved are served."""
    Learner(made(vit, data, "finetune", keep=0), tmp_path / "plain").run()
    Learner(made(vit, data, "finetune"), tmp_path / "kept").run()
    assert metrics(tmp_path / "kept") == metrics(tmp_path / "plain")
    monkeypatch.setattr(Keeper, "_value", lambda self, pet, rests: "always the same")
    Learner(made(vit, data, "finetune"), tmp_path / "blind").run()
    assert metrics(tmp_path / "blind") != metrics(tmp_path / "plain")


def test_what_rests_is_looked_at_once_and_again_when_it_was_written_to(
    vit: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(made(vit, data, "pool"), tmp_path / "state")
    learner.run()
    digests: list[str] = []
    monkeypatch.setattr(keeping, "digest_of", lambda pet: digests.append("") or digest_of(pet))
    first, _ = learner.evaluate(), digests.clear()
    assert learner.evaluate() == first
    assert not digests, "members rest, so their digests are known from the evaluation before"
    computed, name = keeper(learner).computed, learner.method.bank.names()[0]
    written = [p for pet in pets(learner.method.model, name) for p in pet.parameters()]
    with torch.no_grad():
        written[0].add_(1)
    learner.evaluate()
    assert len(digests) == 1
    assert keeper(learner).computed > computed


# -- what is computed -----------------------------------------------------------------------------------


def test_frozen_features_are_computed_once_in_all_processes(vit: Path, data: Path, tmp_path: Path) -> None:
    """Six test pictures a task; their probe is made of the same features."""
    state = tmp_path / "state"
    for number, classes in enumerate(("ab", "cd", "ef")):
        folder = tmp_path / classes
        for label in classes:
            for split in ("train", "test"):
                shutil.copytree(data / split / label, folder / split / label)
        learner = Learner.load(state) if number else Learner(made(vit, None, "frozen"), state)
        learner.learn(folder)
        assert keeper(learner).computed == 6
        assert len(files(state)) == number + 1
    drift = [json.loads(text).get("drift") for text in metrics(state)]
    assert drift == [None, {"ab": 0.0}, {"ab": 0.0, "cd": 0.0}]
    asked = Learner.load(state)
    cells = asked.evaluate()
    assert (keeper(asked).computed, [cell and cell["total"] for cell in cells.values()]) == (0, [6, 6, 6])
    shutil.rmtree(state / FOLDER)  # it may go at any time
    again = Learner.load(state)
    assert again.evaluate() == cells
    assert keeper(again).computed == 18


def test_what_cannot_be_valid_any_more_is_deleted(vit: Path, data: Path, tmp_path: Path) -> None:
    """Where pets move with each task, the new task's features are kept, in case that they rest from now on."""
    Learner(made(vit, data, "finetune"), tmp_path / "state").run()
    assert len(files(tmp_path / "state")) == 1
    Learner(made(vit, data, "first_session"), tmp_path / "rests").run()
    assert len(files(tmp_path / "rests")) == 3 * 2  # frozen and tuned


def test_a_bound_holds_and_is_told_once(vit: Path, data: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Told(Silent):
        def note(self, message: str) -> None:
            told.append(message)

    room = 6 * 16 * 4 * 2  # two tasks of six pictures with sixteen numbers
    learner = Learner(made(vit, data, "frozen", keep=room / 2**30), tmp_path / "few", progress=Told())
    learner.run()
    assert keeper(learner).bytes <= room
    assert len(files(tmp_path / "few")) == 2
    assert sum("evaluate.keep" in message for message in told) == 1
    Learner(made(vit, data, "frozen", keep=0), tmp_path / "none").run()
    assert metrics(tmp_path / "few") == metrics(tmp_path / "none")


# -- files ------------------------------------------------------------------------------------------------


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(bytes(content))


def no_file(path: Path) -> None:
    path.write_bytes(b"\xff\x00 nothing of ours")


@pytest.mark.parametrize("spoil", [torn, flipped, no_file])
def test_a_spoiled_file_is_computed_again(
    spoil: Callable[[Path], None], vit: Path, data: Path, tmp_path: Path, learned: Path
) -> None:
    state = Path(shutil.copytree(learned, tmp_path / "state"))
    cells = Learner.load(learned).evaluate()
    spoil(files(state)[0])
    again = Learner.load(state)
    assert again.evaluate() == cells
    assert keeper(again).computed == 6


def test_a_file_under_another_key_is_not_used(tmp_path: Path, learned: Path) -> None:
    state = Path(shutil.copytree(learned, tmp_path / "state"))
    one, other = files(state)[:2]
    shutil.copy(one, other)
    again = Learner.load(state)
    assert again.evaluate() == Learner.load(learned).evaluate()
    assert keeper(again).computed == 6


def test_a_foreign_file_stays_and_a_link_is_not_followed(vit: Path, data: Path, tmp_path: Path, learned: Path) -> None:
    state, elsewhere = Path(shutil.copytree(learned, tmp_path / "state")), tmp_path / "elsewhere"
    (state / FOLDER / "notes.txt").write_text("mine")
    picture_folder(tmp_path / "new", "gh", 4)
    Learner.load(state).learn(tmp_path / "new")
    assert (state / FOLDER / "notes.txt").read_text() == "mine"
    shutil.move(state / FOLDER, elsewhere)
    (state / FOLDER).symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    picture_folder(tmp_path / "newer", "ij", 4)
    again = Learner.load(state)
    again.learn(tmp_path / "newer")
    assert sorted(elsewhere.iterdir()) == before
    assert keeper(again).computed > 18


@pytest.fixture(scope="module")
def learned(vit: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state of three tasks whose features rest."""
    folder = tmp_path_factory.mktemp("learned") / "state"
    Learner(made(vit, data, "frozen"), folder).run()
    return folder


# -- the identity of examples -------------------------------------------------------------------------------


def bitmaps(folder: Path, classes: str) -> Path:
    """Pictures whose files all have one size, so that a fingerprint does not see which one is which."""
    for split, count in (("train", 4), ("test", 3)):
        for label in classes:
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                picture(label, number + 100 * len(split)).save(folder / split / label / f"{number}.bmp")
    return folder


def exchanged(folder: Path) -> None:
    """Other pictures under the same names, with the same sizes and times of change."""
    for path in sorted(folder.glob("test/*/*.bmp")):
        times = os.stat(path)
        Image.open(path).convert("RGB").point(lambda v: 255 - v).save(path)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_changed_picture_of_the_same_name_is_not_served_and_an_identity_without_content_is_wrong(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, folder = tmp_path / "state", bitmaps(tmp_path / "ab", "ab")
    learner = Learner(made(vit, None, "frozen"), state)
    learner.learn(folder)
    before = learner.evaluate()
    exchanged(folder)
    plain = evaluate(learner.method, learner._tasks.past(learner.state.committed[0]), among="seen", batch_size=4)
    assert plain != before["ab"]
    assert learner.evaluate()["ab"] == plain  # in the process that has read the files before
    assert Learner.load(state).evaluate()["ab"] == plain
    monkeypatch.setattr("perpetune.data.pictures.tables.PictureTable.seal", lambda self, i: b"any")
    control = tmp_path / "control"
    again = bitmaps(tmp_path / "again", "ab")
    first = Learner(made(vit, None, "frozen"), control)
    first.learn(again)
    exchanged(again)
    assert first.evaluate()["again"] == before["ab"]  # a digest that does not look at the content serves what was


def test_examples_of_which_nobody_knows_whether_they_change_are_computed(learned: Path) -> None:
    learner = Learner.load(learned)
    task = learner._tasks.past(learner.state.committed[0])
    assert task is not None
    task.test.view = type("Other", (PictureView,), {})(SIZE)  # type: ignore[union-attr]
    assert task.test is not None
    assert task.test.identity() is None
    with keeper(learner).at_work(torch.device("cpu")):
        ask(learner.method, [task], How("seen", 4))
    assert keeper(learner).computed == 6


# -- the digest -----------------------------------------------------------------------------------------------


def unseen_changes(pet: nn.Module, digest: Callable[[nn.Module], str | None]) -> list[str]:
    """The tensors and numbers of a pet whose change the digest does not see."""
    before, unseen = digest(pet), []
    assert before is not None
    for name, tensor in pet.state_dict().items():
        other = copy.deepcopy(pet)
        changed = other.state_dict()[name].view(-1)
        changed[-1] = torch.nextafter(changed[-1], torch.tensor(9.0))  # the last bit of the last number
        unseen += [name] if digest(other) == before and tensor.numel() else []
    for name, value in vars(pet).items():
        if isinstance(value, float):
            other = copy.deepcopy(pet)
            setattr(other, name, value + 0.5)
            unseen += [name] if digest(other) == before else []
    return unseen


@pytest.mark.parametrize("pet", ["lora", "adapter", "ssf", "prefix", "prompt"])
def test_the_digest_sees_every_bit_of_a_pet_and_one_that_ignores_a_parameter_does_not(
    pet: str, vit: Path, tmp_path: Path
) -> None:
    learner = Learner(recipe(vit, pet=pet))
    one = pets(learner.method, "default")[0].eval()
    assert unseen_changes(one, digest_of) == []
    ignored = next(iter(one.state_dict()))

    def blind(pet: nn.Module) -> str | None:
        other = copy.deepcopy(pet)
        other.state_dict()[ignored].zero_()
        return digest_of(other)

    assert unseen_changes(one, blind) == [ignored]


def test_nothing_is_kept_of_a_pet_in_training_or_with_an_attribute_that_nobody_knows(vit: Path) -> None:
    one = pets(Learner(recipe(vit)).method, "default")[0].eval()
    assert digest_of(one) is not None
    assert digest_of(copy.deepcopy(one).train()) is None
    one.mood = object()  # type: ignore[assignment]
    assert digest_of(one) is None


def test_frozen_weights_that_were_written_to_are_seen(learned: Path) -> None:
    learner = Learner.load(learned)
    with torch.no_grad():
        next(learner.backbone.net.parameters()).add_(0.25)
    learner.evaluate()
    assert keeper(learner).computed == 18


def test_sets_in_force_and_their_places_count(vit: Path, data: Path, tmp_path: Path) -> None:
    sets = {"one": {"name": "lora", "rank": 2}, "two": {"name": "lora", "rank": 2}}
    learner = Learner(recipe(vit, data, pet="none", pets=sets, train=SMALL))
    learner.run()
    backbone, found = learner.backbone, []
    with keeper(learner).at_work(torch.device("cpu")):
        for names in (None, "one", "two", ("one", "two"), ("two", "one")):
            with using(learner.method.model, names):
                found.append(keeper(learner)._made("features", 1))
    assert len(set(found)) == len(found)
    assert backbone.keeper is None


# -- methods see inputs only ------------------------------------------------------------------------------------


def test_examples_that_nobody_has_loaded_tell_nothing() -> None:
    unseen = Unseen([0, 1, 2])
    assert vars(unseen) == {"places": [0, 1, 2], "said": 0}
    assert len(unseen.rows([2, 0])) == 2
    for read in (lambda: unseen.pixels, lambda: unseen.tensors, lambda: unseen.labels, lambda: "ids" in unseen):
        with pytest.raises(NotKept):
            read()


def test_a_method_that_reads_pictures_itself_gets_them(learned: Path) -> None:
    """A method of another package need not know of all this."""
    learner = Learner.load(learned)

    class Bright(type(learner.method)):  # type: ignore[misc]
        def predict(self, inputs: Inputs) -> Tensor:
            mean = inputs.pixels.float().mean((1, 2, 3))
            return torch.stack([(mean - 40 * i).abs().neg() for i in range(len(self.classes))], dim=1)

    plain = [cell.cell for cell in ask_all(learner, Bright)]
    with keeper(learner).at_work(torch.device("cpu")):
        assert [cell.cell for cell in ask_all(learner, Bright)] == plain
    assert len({json.dumps(cell) for cell in plain}) > 1


def ask_all(learner: Learner, kind: type) -> list[Any]:
    learner.method.__class__ = kind
    return ask(learner.method, [learner._tasks.past(c) for c in learner.state.committed], How("seen", 4))  # type: ignore[misc]


# -- one pass, and samples ------------------------------------------------------------------------------------


def test_all_tasks_are_asked_in_one_pass_and_none_depends_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    tests = [
        Written([[(3 * i + j + k) % 7 for k in range(4)] for j in range(n)], [0] * n) for i, n in enumerate((5, 3, 9))
    ]
    tasks = [task_of("ab", test) for test in tests]
    loaders: list[int] = []
    real = torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *a, **k: (loaders.append(1), real(*a, **k))[1])
    method = Reads("abcd")
    found = ask(method, tasks, How("seen", 4))
    together = [tuple(args[0].pixels.shape) for args, _ in method.heard]
    assert len(loaders) == 1
    alone = [evaluate(method, task, among="seen", batch_size=4) for task in tasks]
    assert [one.cell for one in found] == alone
    assert together == [tuple(args[0].pixels.shape) for args, _ in method.heard[len(together) :]]


def test_a_sample_is_balanced_fixed_and_grows_by_adding() -> None:
    tasks = []
    for name, sizes in (("one", (40, 10)), ("two", (3, 3)), ("three", (200, 200))):
        test = Written([[0]] * sum(sizes), [0] * sizes[0] + [1] * sizes[1])
        tasks.append(type(task_of("ab", test))(0, name, ("a", "b"), test, test=test))
    found = {count: sample(tasks, Limit((), count, 5)) for count in (0, 2, 12, 60, 1000)}
    for count, rows in found.items():
        assert sum(map(len, rows.values())) == min(count, 456)
        assert rows == sample(tasks, Limit((), count, 5))
    assert [len(found[60][name]) for name in ("one", "two", "three")] == [27, 6, 27]
    assert sum(number < 40 for number in found[12]["one"]) == 2  # of four
    for small, large in ((2, 12), (12, 60), (60, 1000)):
        assert all(set(found[small][name]) <= set(found[large][name]) for name in found[small])
    assert found[12] != sample(tasks, Limit((), 12, 6))


def test_cells_of_a_sample_say_so_and_what_rests_is_asked_in_full(vit: Path, data: Path, tmp_path: Path) -> None:
    results = Learner(made(vit, data, "finetune", earlier=4), tmp_path / "moves").run()
    cells = [[cell and (cell["total"], cell.get("of")) for cell in row] for row in results["cells"]]
    assert cells == [[(6, None), None, None], [(4, 6), (6, None), None], [(2, 6), (2, 6), (6, None)]]
    assert set(results["drift"][2]["of"]) == {"a-b", "c-d"}
    assert results["metrics"]["pooled_accuracy"] is None
    assert matrix.asked(results).startswith("3 cells with ~ are of a sample of the test data (8 of 18 answers)")
    texts = [[cell.text[0] if cell else "" for cell in row.cells] for row in matrix.heat(results).rows]
    assert [[text == "~" for text in row] for row in texts] == [[False] * 3, [True, False, False], [True, True, False]]
    assert "a part of earlier tasks" in compare([results])["notes"][0]
    results = Learner(made(vit, data, "frozen", earlier=4), tmp_path / "rests").run()
    assert [cell["total"] for cell in results["cells"][2]] == [6, 6, 6]
    assert not any("of" in cell for cell in results["cells"][2])


def test_tasks_are_asked_at_every_second_one_and_at_the_last(vit: Path, data: Path, tmp_path: Path) -> None:
    results = Learner(made(vit, data, "finetune", earlier={"every": 4}), tmp_path / "state").run()
    assert [[cell and cell["total"] for cell in row] for row in results["cells"]] == [
        [6, None, None],
        [None, 6, None],
        [6, 6, 6],
    ]
    assert results["not_asked"] == [{"task": 1, "of": ["a-b"]}]
    heat = matrix.heat(results)
    assert [cell.text for cell in heat.rows[1].cells[:1] if cell] == [matrix.SKIPPED]
    assert heat.rows[1].value is None
    full = Learner(made(vit, data, "finetune"), tmp_path / "full").run()
    assert results["cells"][2] == full["cells"][2]
    assert results["metrics"]["final_accuracy"] == full["metrics"]["final_accuracy"]
    means = [full["metrics"]["average_accuracy"], results["metrics"]["average_accuracy"]]
    assert means[0] != means[1]  # the row that was not asked has no mean


def test_times_are_told_by_part(learned: Path) -> None:
    from perpetune.results import read_results
    from perpetune.state import State

    for timing in read_results(State(learned))["timings"]:
        parts = [timing[key] for key in ("new_s", "earlier_s", "drift_s")]
        assert sum(parts) <= timing["evaluate_s"] + 0.005
        assert timing["statistics_s"] <= timing["learn_s"] + 0.005
        assert {"prepare_s", "commit_s", "report_s"} <= timing.keys()
