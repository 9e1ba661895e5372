"""How tasks are scored: what a prediction depends on, what each setting allows, what is counted."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import picture_folder, recipe, vit_folder
from torch import Tensor, nn

from perpetune.check import Checker, Pictures, tiny_stream
from perpetune.data.texts.tables import Text
from perpetune.errors import Interrupted
from perpetune.evaluate import AMONG, PROBE, Setting, evaluate, probe
from perpetune.learner import Learner
from perpetune.methods.base import Answers, Method
from perpetune.models.base import Model
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime
from perpetune.seeding import generator
from perpetune.tasks import Batch, Examples, Inputs, Task, part

SETTINGS: tuple[Setting, ...] = ("class", "domain", "task")


class Known(Model):
    """A model that knows some classes and nothing else."""

    takes = "pictures"

    def __init__(self, classes: Sequence[str]):
        nn.Module.__init__(self)  # it has no backbone
        self.names = list(classes)

    @property
    def classes(self) -> list[str]:
        return self.names

    def grow(self, task: Task) -> None:
        raise NotImplementedError

    def loss(self, task: Task, batch: Batch) -> Tensor:
        raise NotImplementedError

    def predict(self, inputs: Inputs) -> Tensor:
        raise NotImplementedError

    def features(self, inputs: Inputs) -> Tensor:
        raise NotImplementedError

    def summarise(self, task: Task, batch_size: int) -> None:
        raise NotImplementedError


class Reads(Method):
    """Scores that are written in the picture: entry c of the input is the score of class c."""

    def __init__(self, classes: Sequence[str]):
        super().__init__(Known(classes))
        self.heard: list[Any] = []

    def learn(self, task: Task) -> None:
        raise NotImplementedError

    def predict(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.heard.append((args, kwargs))
        inputs: Inputs = args[0]
        return inputs.pixels[:, : len(self.classes)].float()


class Says(Reads):
    """Answers in two ways, what is written and its mirror image, and is as sure as the best score is high."""

    def answers(self, inputs: Inputs) -> Answers:
        scores = self.predict(inputs)
        return Answers(
            scores, {"mirrored": scores.flip(1)}, {"sure": scores.max(1).values / 9, "one": scores[:, 0] * 0 + 1}
        )

    def features(self, inputs: Inputs) -> Tensor:
        return inputs.pixels.float()


class Written(Examples):
    """Test examples that hold the scores they will be given."""

    def __init__(self, scores: Sequence[Sequence[int]], targets: Sequence[int]):
        self.scores, self.targets = torch.tensor(scores, dtype=torch.uint8), list(targets)
        self.seeds: list[Any] = []

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, seed: int | None) -> Tensor:
        self.seeds.append(seed)
        return self.scores[index]


def task_of(classes: Sequence[str], test: Any, **runtime: Any) -> Task:
    return Task(0, "t", tuple(classes), Written([[0]], [0]), test=test, runtime=Runtime(**runtime))


def count(
    method: Method, classes: Sequence[str], test: Any, setting: Setting = "class", batch_size: int = 4
) -> dict[str, Any]:
    found = evaluate(method, task_of(classes, test), among=AMONG[setting], batch_size=batch_size)
    assert found is not None
    return found


# -- what a prediction depends on ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=["linear", "cosine", "ncm"])
def learned(request: pytest.FixtureRequest) -> Method:
    """A method that has learned three tasks, a to f."""
    train = {"epochs": 1, "batch_size": 8, "lr": 0.01}
    return Checker(make_recipe({"head": request.param, "train": train})).learned(tiny_stream(Runtime()))


def test_each_image_gets_the_same_answer_in_any_order_and_batching(learned: Method) -> None:
    test = Pictures("abcdef", 5, seed=50)
    pixels = torch.stack(test.pixels)
    with torch.no_grad():
        alone = torch.cat([learned.predict(p.unsqueeze(0)) for p in pixels])
    assert len(set(alone.argmax(1).tolist())) > 1
    for size in (2, 7, 30):
        order = torch.randperm(len(test), generator=generator("order", size))
        with torch.no_grad():
            scores = torch.cat([learned.predict(part) for part in pixels[order].split(size)])
        assert torch.equal(scores.argmax(1), alone.argmax(1)[order])
        torch.testing.assert_close(scores, alone[order], rtol=1e-4, atol=1e-4)


def test_the_counts_are_the_same_in_any_order_and_batching(learned: Method) -> None:
    test = Pictures("abcdef", 5, seed=51)
    expected = count(learned, "abcdef", test, batch_size=30)
    assert expected["total"] == 30
    assert expected["correct"] > 0
    for size in (1, 4, 7, 64):
        order = torch.randperm(len(test), generator=generator("order", size)).tolist()
        assert count(learned, "abcdef", part(test, order), batch_size=size) == expected


def test_repeated_evaluation_leaves_nothing_behind(learned: Method) -> None:
    test = Pictures("abcdef", 2, seed=52)
    before = {name: t.clone() for name, t in learned.state_dict().items() if isinstance(t, Tensor)}
    assert count(learned, "abcdef", test) == count(learned, "abcdef", test)
    for name, t in before.items():
        assert torch.equal(t, learned.state_dict()[name]), name


# -- what each setting allows -------------------------------------------------------------------------

# Each image looks most like a class of another task (score 9), then like the right one (5).
TEMPTED = Written([[5, 1, 9, 0], [1, 5, 0, 9], [5, 1, 0, 9]], [0, 1, 0])


@pytest.mark.parametrize(("setting", "correct"), [("class", 0), ("domain", 0), ("task", 3)])
def test_only_the_task_setting_uses_the_tasks_class_list(setting: Setting, correct: int) -> None:
    assert count(Reads("abcd"), "ab", TEMPTED, setting)["correct"] == correct


@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_but_images_reaches_the_method(setting: Setting) -> None:
    method = Reads("abcd")
    test = Written([[5, 1, 9, 0]] * 5, [0, 1, 0, 0, 1])
    count(method, "ab", test, setting, batch_size=2)
    assert len(method.heard) == 3
    for (args, kwargs), size in zip(method.heard, (2, 2, 1), strict=True):
        assert kwargs == {}
        assert len(args) == 1
        assert list(args[0].tensors) == ["pixels"]
        assert args[0].pixels.shape == (size, 4)
        assert not args[0].pixels.requires_grad
    assert test.seeds == [None] * 5, "test images are augmented"


def test_the_code_path_of_a_prediction_has_no_room_for_a_task() -> None:
    """Labels and class lists meet the scores in `evaluate` alone, after the method has answered."""
    assert list(inspect.signature(Method.predict).parameters) == ["self", "inputs"]
    assert list(inspect.signature(Model.predict).parameters) == ["self", "inputs"]


# -- what is counted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_class_that_was_never_learned_counts_as_wrong(setting: Setting) -> None:
    # Row -1 would be the last class, d, whose score is the highest: it must not be taken for z.
    found = count(Reads("abcd"), ["z", "d"], Written([[0, 0, 0, 9], [0, 0, 0, 9]], [0, 1]), setting)
    assert found == {"correct": 1, "total": 2, "per_class": {"z": [0, 1], "d": [1, 1]}}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_task_of_which_nothing_was_learned_is_all_wrong(setting: Setting) -> None:
    found = count(Reads("abcd"), ["y", "z"], Written([[9, 0, 0, 0], [0, 0, 0, 9]], [0, 1]), setting)
    assert (found["correct"], found["total"]) == (0, 2)


def test_classes_are_met_by_name_not_by_position() -> None:
    found = count(Reads("abcd"), ["d", "b"], Written([[0, 0, 0, 9], [0, 9, 0, 0], [0, 9, 0, 0]], [0, 1, 0]))
    assert found == {"correct": 2, "total": 3, "per_class": {"d": [1, 2], "b": [1, 1]}}


def test_a_class_without_a_test_picture_is_not_in_the_counts() -> None:
    assert count(Reads("ab"), "ab", Written([[9, 0]], [0]))["per_class"] == {"a": [1, 1]}


@pytest.mark.parametrize("test", [None, Written([[0]], [0])], ids=["none", "empty"])
def test_without_test_pictures_there_is_no_figure(test: Any) -> None:
    if test is not None:
        test.targets = []
    assert evaluate(Reads("ab"), task_of("ab", test), among="seen", batch_size=4) is None


@given(data=st.data(), setting=st.sampled_from(SETTINGS), size=st.integers(1, 9))
def test_counts_equal_a_count_by_hand_and_add_up(data: st.DataObject, setting: Setting, size: int) -> None:
    known = data.draw(st.lists(st.sampled_from("abcdef"), min_size=1, unique=True))
    classes = data.draw(st.lists(st.sampled_from("abcdef"), min_size=1, unique=True))
    n = data.draw(st.integers(1, 12))
    targets = data.draw(st.lists(st.integers(0, len(classes) - 1), min_size=n, max_size=n))
    scores = [data.draw(st.permutations(range(6))) for _ in range(n)]  # no ties
    expected = {c: [0, targets.count(i)] for i, c in enumerate(classes) if i in targets}
    for row, target in zip(scores, targets, strict=True):
        allowed = [c for c in known if c in classes] if setting == "task" else known
        best = max(allowed, key=lambda c: row[known.index(c)], default=None)
        expected[classes[target]][0] += best == classes[target]
    found = count(Reads(known), classes, Written(scores, targets), setting, size)
    assert found["per_class"] == expected
    assert found["correct"] == sum(c for c, _ in expected.values())
    assert found["total"] == n


# Right by what is written and by its mirror image; and both again where classes a and b alone are allowed:
#             yes no; yes yes  no yes; yes yes  yes no; yes no  yes no; yes yes  no yes; no yes
SAID = Written([[9, 0, 1, 3], [8, 4, 0, 9], [0, 9, 1, 4], [1, 6, 3, 2], [6, 3, 7, 0]], [0, 0, 1, 1, 1])


@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize(("setting", "correct", "mirrored"), [("class", 3, 2), ("task", 4, 4)])
def test_other_ways_to_answer_are_counted_beside_the_answer(
    setting: Setting, correct: int, mirrored: int, size: int
) -> None:
    """Under the same mask of the setting as the answer."""
    found = count(Says("abcd"), "ab", SAID, setting, size)
    assert (found["correct"], found["total"]) == (correct, 5)
    assert found["others"] == {"mirrored": mirrored}
    assert found["gauges"] == {"sure": round((9 + 9 + 9 + 6 + 7) / 9 / 5, 6), "one": 1.0}
    assert {type(n) for n in (*found["others"].values(), found["total"])} == {int}


@pytest.mark.parametrize(("best", "correct"), [(0, 1), (1, 0)])
def test_an_option_is_right_or_wrong_whatever_the_score_makes_of_it(best: int, correct: int) -> None:
    """To `exact_match`, which leaves punctuation out, `A+` and `A-` are the same."""
    test: Any = Written([[1 - best, best]], [0])
    test.text = lambda index: Text("How good is it?", "A+", ("A+", "A-"))
    method = Reads(["A+", "A-"])
    method.model.takes = "texts"  # type: ignore[misc]
    assert count(method, ["A+", "A-"], test)["correct"] == correct


def test_a_cell_is_as_before_where_there_is_nothing_else_to_tell() -> None:
    assert count(Reads("abcd"), "ab", SAID).keys() == {"correct", "total", "per_class"}


# -- the probe of features ----------------------------------------------------------------------------


def test_the_probe_is_of_a_few_images_over_all_the_test_data() -> None:
    """The same ones each time, and where there are few, all."""
    test = Written([[1, number // 256, number % 256] for number in range(1000)], [0] * 1000)
    found = probe(Says("ab"), task_of("ab", test))
    assert found is not None
    assert found.shape == (PROBE, 3)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(PROBE))
    numbers = [round(float(row[1] / row[0])) * 256 + round(float(row[2] / row[0])) for row in found]
    assert (numbers[0], len(set(numbers))) == (0, PROBE)
    assert numbers[-1] > 900
    assert set(test.seeds) == {None}, "test images are augmented"
    assert torch.equal(found, probe(Says("ab"), task_of("ab", test)))
    few = probe(Says("ab"), task_of("ab", SAID))
    assert few is not None
    assert few.shape == (5, 4)


@pytest.mark.parametrize("test", [None, Written([[0]], [])], ids=["none", "empty"])
def test_without_test_pictures_there_is_no_probe(test: Any) -> None:
    assert probe(Says("ab"), task_of("ab", test)) is None


def test_a_stop_is_heard_between_two_batches() -> None:
    asked = iter([None, 2])
    task = task_of("ab", Written([[0, 9]] * 9, [0] * 9), stopping=lambda: next(asked))
    method = Reads("ab")
    with pytest.raises(Interrupted, match="stopped while task t was evaluated") as stop:
        evaluate(method, task, among="seen", batch_size=2)
    assert stop.value.exit_code == 130
    assert len(method.heard) == 2


# -- which cells a run measures -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit_folder(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains with the same two classes."""
    folder = tmp_path_factory.mktemp("domains")
    for i, domain in enumerate(("clay", "paint", "sketch")):
        picture_folder(folder / "train" / domain, "ab", 6, domain)
        picture_folder(folder / "test" / domain, "ab", 2 + i, domain, first=100)
    return folder


def run(vit: Path, data: Path, setting: Setting) -> dict[str, Any]:
    changes = {"setting": setting, "stream": {"by": "domain"}, "train": {"epochs": 1, "lr": 0.01}}
    return Learner(recipe(vit, data, **changes)).run()


def measured(results: dict[str, Any]) -> list[list[int | None]]:
    return [[cell and cell["total"] for cell in row] for row in results["cells"]]


def test_in_the_domain_setting_the_next_task_is_measured_too(vit: Path, domains: Path) -> None:
    results = run(vit, domains, "domain")
    assert [t["name"] for t in results["tasks"]] == ["clay", "paint", "sketch"]
    assert measured(results) == [[4, 6, None], [4, 6, 8], [4, 6, 8]]
    above = [row[i + 1] for i, row in enumerate(results["cells"][:-1])]
    expected = sum(c["correct"] / c["total"] - 1 / 2 for c in above) / 2
    assert results["metrics"]["forward_transfer"] == pytest.approx(expected)


@pytest.mark.parametrize("setting", ["class", "task"])
def test_in_the_other_settings_it_is_not(vit: Path, domains: Path, setting: Setting) -> None:
    results = run(vit, domains, setting)
    assert measured(results) == [[4, None, None], [4, 6, None], [4, 6, 8]]
    assert results["metrics"]["forward_transfer"] is None


def test_the_settings_of_one_stream_differ_in_what_is_allowed_alone(vit: Path, tmp_path: Path) -> None:
    """Same learning, bit for bit; the task setting can only gain."""
    data = tmp_path / "data"
    picture_folder(data / "train", "abcd", 6)
    picture_folder(data / "test", "abcd", 5, first=100)
    found, weights = {}, {}
    for setting in ("class", "task"):
        learner = Learner(recipe(vit, data, setting=setting, train={"epochs": 1, "lr": 0.01}))
        found[setting] = learner.run()["cells"]
        weights[setting] = [p.tolist() for p in learner.method.parameters()]
    assert weights["class"] == weights["task"]
    for row, easier in zip(found["class"], found["task"], strict=True):
        for cell, other in zip(row, easier, strict=True):
            assert (cell is None) == (other is None)
            if cell is not None:
                assert cell["correct"] <= other["correct"]
    assert found["class"][1][0]["correct"] < found["task"][1][0]["correct"]  # finetune has forgotten a and b
