"""The head `text` on tiny dual encoders: zero-shot, the expert behind its gate, kept texts, the verbs that use it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DUAL, dual_folder, picture_folder, recipe, split_folder
from torch import Tensor
from torch.nn import functional as F

from perpetune.build import build_method, load_backbone
from perpetune.cli import call
from perpetune.errors import UsageError
from perpetune.heads.ridge import Ridge
from perpetune.heads.templates import spoken, templates_of
from perpetune.heads.text import Text
from perpetune.learner import Learner
from perpetune.learning import learn_protected
from perpetune.models.backbone import Backbone
from perpetune.models.classifier import Classifier
from perpetune.models.loaders.kind import is_dual
from perpetune.pets import parameters
from perpetune.recipe import make_recipe
from perpetune.snapshot import restore, snapshot
from perpetune.tasks import Inputs, Task

NAMES = ["cat", "elk", "fox", "owl", "red panda", "yak"]
KINDS = list(DUAL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dual")
    return {kind: dual_folder(root / kind.replace(" ", "-"), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_folder(tmp_path_factory.mktemp("data"), NAMES[:4], 6, 3)


def backbone(folders: dict[str, Path], kind: str = "CLIP") -> Backbone:
    return load_backbone(f"folder:{folders[kind]}")


def head_of(folders: dict[str, Path], kind: str = "CLIP", classes: Sequence[str] = (), **options: Any) -> Text:
    head = Text.of(backbone(folders, kind), **options)
    head.grow(classes, torch.Generator().manual_seed(0))
    return head.eval().requires_grad_(False)


def features(rows: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def taught(head: Text, seed: int = 1, each: int = 8) -> Text:
    """Teaches the expert with features that are near their class's text."""
    rows = torch.arange(len(head.classes)).repeat_interleave(each)
    shown = head.texts(head.classes)[rows] + 0.3 * features(len(rows), head.dim, seed) / head.dim**0.5
    head.expect(torch.full((len(head.classes),), each))
    head.observe(shown, rows)
    head.flush()
    head.settle()
    return head


# -- zero-shot ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_scaled_cosines_with_the_mean_of_normalised_texts(folders: dict[str, Path], kind: str) -> None:
    templates = ["a photo of a {}.", "{}", "one {} in the wild"]
    head = head_of(folders, kind, NAMES, templates=templates)
    side, shown = head.side, features(5, head.dim)
    assert side is not None
    wanted = []
    for name in NAMES:
        each = torch.stack([F.normalize(side.of([template.format(name)])[0], dim=-1) for template in templates])
        wanted.append(F.normalize(each.mean(0), dim=-1))
    scores = side.scale * F.normalize(shown, dim=-1) @ torch.stack(wanted).T
    scores = scores if side.bias is None else scores + side.bias
    torch.testing.assert_close(head(shown), scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_templates_have_no_order(folders: dict[str, Path], kind: str) -> None:
    one = head_of(folders, kind, NAMES, templates=["a photo of a {}.", "{}"])
    other = head_of(folders, kind, NAMES[::-1], templates=["{}", "a photo of a {}."])
    shown = features(5, one.dim)
    torch.testing.assert_close(one(shown), other(shown).flip(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(one.among(shown, [*NAMES, "a new one"])[:, :6], one(shown), rtol=0, atol=1e-5)
    torch.testing.assert_close(one(shown[2:3]), one(shown)[2:3], rtol=0, atol=1e-5)


def test_an_underscore_is_a_space_and_the_rest_stays() -> None:
    assert [spoken(name) for name in ("red_panda", "Red panda", "T-Shirt/top")] == [
        "red panda",
        "Red panda",
        "T-Shirt/top",
    ]
    assert len(templates_of("cifar")) == 18
    assert templates_of("itap of a {}.") == ("itap of a {}.",)
    for wrong, said in (("cifr", "no templates 'cifr'.*cifar"), (["{} {}"], "does not have {} once"), ([], "once")):
        with pytest.raises(UsageError, match=said):
            templates_of(wrong)


def test_two_spellings_of_one_name_are_said(folders: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match="'red panda' and 'red_panda' have the same text"):
        head_of(folders, "CLIP", ["red panda", "red_panda"])


# -- the expert -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", ["ridge", "ncm"])
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_what_was_not_learned_is_answered_as_before(folders: dict[str, Path], kind: str, expert: str) -> None:
    """Picture by picture, after any number of tasks: an answer outside of the learned classes stays, bit by bit."""
    plain = head_of(folders, kind, [], vocabulary=NAMES)
    head = head_of(folders, kind, [], vocabulary=NAMES, expert=expert)
    shown = features(200, head.dim)
    before = plain.among(shown, NAMES)
    for classes in (NAMES[:2], NAMES[2:4]):
        head.grow(classes, torch.Generator().manual_seed(0))
        taught(head)
        learned = set(head.classes)
        now = head.among(shown, NAMES)
        outside = torch.tensor([NAMES[i] not in learned for i in before.argmax(1).tolist()])
        assert 0 < int(outside.sum()) < 200
        assert torch.equal(now.argmax(1)[outside], before.argmax(1)[outside])
        others = [i for i, name in enumerate(NAMES) if name not in learned]
        probabilities = before.softmax(-1)
        assert torch.equal(now[outside][:, others], 10.0 * probabilities[outside][:, others])
        gate = head.gates(shown, NAMES)["the expert speaks"]
        assert torch.equal(gate, ~outside)
        assert torch.equal(now[:, others].argmax(1), before[:, others].argmax(1)), "among the others zero-shot decides"


def test_without_a_gate_zero_shot_is_lost(folders: dict[str, Path]) -> None:
    """The control."""
    head = head_of(folders, "CLIP", NAMES[:2], vocabulary=NAMES, expert="ridge", gate="none", fusion=0.95)
    plain = head_of(folders, "CLIP", [], vocabulary=NAMES)
    shown = features(200, head.dim)
    now, before = taught(head).among(shown, NAMES).argmax(1), plain.among(shown, NAMES).argmax(1)
    outside = before >= 2
    assert float((now[outside] == before[outside]).float().mean()) < 0.7


def test_the_expert_is_one_regression_in_any_order_of_tasks(folders: dict[str, Path]) -> None:
    def learned(order: Sequence[Sequence[str]]) -> Tensor:
        head = head_of(folders, "CLIP", [], expert={"name": "ridge", "penalty": 0.1})
        for classes in order:
            head.grow(classes, torch.Generator().manual_seed(0))
            rows = head.rows(classes).repeat_interleave(8)
            shown = torch.cat([features(8, head.dim, NAMES.index(name)) for name in classes])
            counts = torch.zeros(len(head.classes), dtype=torch.int64)
            counts[head.rows(classes)] = 8
            head.expect(counts)
            head.observe(shown, rows)
            head.flush()
            head.settle()
        return head.among(features(20, head.dim, 99), NAMES[:4])

    torch.testing.assert_close(learned([NAMES[:2], NAMES[2:4]]), learned([NAMES[2:4], NAMES[:2]]), rtol=0, atol=1e-5)


def test_no_share_of_the_expert_is_zero_shot(folders: dict[str, Path]) -> None:
    head = taught(head_of(folders, "CLIP", NAMES[:4], expert="ridge", fusion=0.0))
    shown = features(9, head.dim)
    assert torch.equal(head(shown), head_of(folders, "CLIP", NAMES[:4])(shown))


# -- kept texts -------------------------------------------------------------------------------------------


def counted(head: Text, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    assert head.side is not None
    original = head.side.of
    monkeypatch.setattr(head.side, "of", lambda strings, batch=64: (counts.append(len(strings)), original(strings))[1])
    return counts


def test_texts_are_read_once_and_stored(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of(folders, "CLIP", NAMES[:4], vocabulary=NAMES, templates="seven")
    counts, shown = counted(head, monkeypatch), features(3, head.dim)
    first = head(shown)
    head(shown), head.among(shown, NAMES)
    assert counts == [6 * 7]
    head.among(shown, ["another"])
    head.among(shown, ["another", *NAMES])
    assert counts == [6 * 7, 7], "a name that is no candidate is read once too"
    assert "another" not in head.names, "but not stored"
    stored, extra = {k: v.clone() for k, v in head.state_dict().items() if k == "kept"}, head.get_extra_state()
    loaded = head_of(folders, "CLIP", [], vocabulary=NAMES, templates="seven")
    again = counted(loaded, monkeypatch)
    loaded.set_extra_state(copy.deepcopy(extra))
    loaded.kept.copy_(stored["kept"])
    assert torch.equal(loaded(shown), first)
    assert again == []
    with pytest.raises(ValueError, match="other templates"):
        head_of(folders, "CLIP").set_extra_state(extra)


def test_names_pass_the_tower_once_and_never_at_prediction(
    folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """Counted at the tower itself, over a run and a new process; `benchmarks/clip_more.py names` asks 1,100 names."""
    names = [*NAMES[:4], *(f"thing {number}" for number in range(106))]
    head = {"name": "text", "templates": "cifar", "vocabulary": names}
    learner = Learner(recipe(folders["CLIP"], data, head=head, method="frozen", pet="none"), tmp_path / "state")
    rows: list[int] = []

    def hook(net: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows.append(len(kwargs["input_ids"]))

    for one in (learner, None):
        used = one or Learner.load(tmp_path / "state")
        used.backbone.net.get_submodule("text_model").register_forward_pre_hook(hook, with_kwargs=True)
        if one is not None:
            used.run()
            assert sum(rows) == 110 * 18
            rows.clear()
        asked = sorted(data.rglob("*.png"))[:2]
        assert used.predict(asked, names=names[:9])[0].classes
        assert used.predict(asked)[0].classes
        assert rows == []


LORA = {"name": "lora", "rank": 2}
LINEAR = {"name": "adapter", "width": 2, "activation": "none"}


def tuned(
    folders: dict[str, Path],
    at: Sequence[str],
    pet: dict[str, Any] = LORA,
    taps: int | None = None,
    method: str = "finetune",
    **head: Any,
) -> tuple[Any, list[Task]]:
    from perpetune.check import tiny_stream
    from perpetune.runtime import Runtime

    content = {
        "backbone": {"name": f"folder:{folders['CLIP']}", "taps": taps},
        "method": method,
        "pet": {**pet, "at": list(at)},
        "head": {"name": "text", **head},
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.02},
    }
    recipe_ = make_recipe(content)
    return build_method(recipe_, backbone(folders).tap(taps)), tiny_stream(Runtime())


@pytest.mark.parametrize(
    ("at", "pet"),
    [(["text.q", "text.v"], LORA), (["text.out"], LORA), (["text.feature"], LINEAR)],
    ids=["in the tower", "projection", "feature"],
)
def test_pets_that_change_the_texts(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, at: list[str], pet: dict[str, Any]
) -> None:
    """In the tower, and in its parts beside it: they learn, and the texts are read again."""
    method, stream = tuned(folders, at, pet)
    head = method.model.head
    learn_protected(method, stream[0])
    assert all(bool(p.any()) for p in parameters(method.model, "default"))
    shown = Inputs(pixels=torch.stack([stream[0].train.load(i, None) for i in range(4)]))
    first = method.predict(shown)
    counts = counted(head, monkeypatch)
    assert torch.equal(method.predict(shown), first)
    assert counts == [], "the pets have not changed, so the texts are kept"
    learn_protected(method, stream[1])
    assert not torch.equal(method.predict(shown)[:, :2], first)
    assert sum(counts) == 4


def test_texts_are_read_again_if_more_acts_beside_a_pet_that_did_not_change(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """O-LoRA's earlier LoRAs act in the set `default`, which trains nothing from the second task on."""
    method, stream = tuned(folders, ["text.q", "text.v"], method="olora")
    shown = Inputs(pixels=torch.stack([stream[0].train.load(i, None) for i in range(4)]))
    scores = []
    for task in stream:
        learn_protected(method, task)
        scores.append(method.predict(shown)[:, :2])
        other, _ = tuned(folders, ["text.q", "text.v"], method="olora")
        restore(other, snapshot(method), "memory")
        torch.testing.assert_close(other.predict(shown)[:, :2], scores[-1], rtol=0, atol=1e-6)
    assert not torch.allclose(scores[1], scores[2], rtol=0, atol=1e-4)
    counts = counted(method.model.head, monkeypatch)
    assert torch.equal(method.predict(shown)[:, :2], scores[2])
    assert counts == [], "nothing has changed, so the texts are kept"


def test_picture_pets_leave_the_texts(folders: dict[str, Path]) -> None:
    method, stream = tuned(folders, ["picture.q"])
    head = method.model.head
    learn_protected(method, stream[0])
    before = head.texts(["a", "b"])
    learn_protected(method, stream[1])
    assert torch.equal(head.texts(["a", "b"]), before)


@pytest.mark.parametrize("mask", ["task", "seen"])
def test_training_lowers_the_loss_and_reads_only_the_compared_classes(
    folders: dict[str, Path], mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, stream = tuned(folders, ["text.v", "picture.v"])
    method.model.compare(mask)
    read: list[int] = []
    side = method.model.head.side
    original = side.inputs
    monkeypatch.setattr(side, "inputs", lambda strings, device=None: (read.append(len(strings)), original(strings))[1])
    for task in stream[:2]:
        read.clear()
        learn_protected(method, task)
        classes = len(method.classes) if mask == "seen" else 2
        assert max(read) == classes
    assert all(bool(p.any()) for p in parameters(method.model, "default"))


def test_the_scale_can_be_trained(folders: dict[str, Path]) -> None:
    method, stream = tuned(folders, ["picture.v"], learn_scale=True)
    learn_protected(method, stream[0])
    assert float(method.model.head.shift.detach().abs()) > 0
    fixed, stream = tuned(folders, ["picture.v"])
    assert fixed.model.trained() == []


@pytest.mark.parametrize("head", [{}, {"expert": "ridge", "vocabulary": NAMES}, {"learn_scale": True}], ids=str)
def test_states_bring_everything_back(folders: dict[str, Path], head: dict[str, Any]) -> None:
    method, stream = tuned(folders, ["picture.q", "text.q"], **head)
    states = [snapshot(method)]
    inputs = Inputs(pixels=torch.stack([stream[0].train.load(i, None) for i in range(4)]))
    scores = []
    for task in stream:
        learn_protected(method, task)
        scores.append(method.predict(inputs))
        states.append(snapshot(method))
    other, _ = tuned(folders, ["picture.q", "text.q"], **head)
    for number in (3, 1, 2):
        restore(other, states[number], "memory")
        torch.testing.assert_close(other.predict(inputs), scores[number - 1], rtol=0, atol=1e-6)


# -- what the expert reads beside zero-shot ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_taps_change_nothing_but_the_expert(folders: dict[str, Path], kind: str) -> None:
    net = backbone(folders, kind)
    inputs = Inputs(pixels=torch.randint(0, 256, (6, 3, net.preprocess.size, net.preprocess.size)).to(torch.uint8))
    with torch.no_grad():
        own = net.features(inputs)
        wide = net.tap(2).features(inputs)
        assert torch.equal(net.compared(wide), own)
        assert wide.shape[1] == net.dim == own.shape[1] + (wide[:, own.shape[1] :].shape[1])
        assert torch.equal(wide[:, net.end], own), "a loss reads the feature that is compared with texts"
    head = Text.of(net, expert="ridge", vocabulary=NAMES)
    plain = head_of(folders, kind, [], vocabulary=NAMES)
    torch.testing.assert_close(head.among(wide, NAMES), plain.among(own, NAMES), rtol=0, atol=1e-5)
    head.grow(NAMES[:2], torch.Generator().manual_seed(0))
    head.expect(torch.tensor([3, 3]))
    head.observe(wide, torch.tensor([0, 1, 0, 1, 0, 1]))
    head.flush()
    head.settle()
    assert head.expert is not None
    assert head.expert.dim == net.dim
    alone = Ridge(net.dim, scale=1.0)
    alone.grow(NAMES[:2], torch.Generator().manual_seed(0))
    alone.expect(torch.tensor([3, 3]))
    shown = torch.cat([F.normalize(own, dim=-1), wide[:, own.shape[1] :]], dim=-1)
    alone.observe(shown, torch.tensor([0, 1, 0, 1, 0, 1]))
    alone.flush()
    alone.settle()
    torch.testing.assert_close(head._expert(wide), alone(shown))


@pytest.mark.parametrize(("method", "taps"), [("finetune", None), ("finetune", 2), ("first_session", 2)])
def test_the_bare_net_answers_names_whatever_pets_learn(
    folders: dict[str, Path], method: str, taps: int | None
) -> None:
    """The gate, and every score outside of the learned classes, stay. The control: the tuned net."""
    names = [*"abcdef", *NAMES]
    learners = {}
    for reads in ("bare", "tuned"):
        made, stream = tuned(
            folders, ["picture.q", "picture.v"], LORA, taps, method, expert="ridge", vocabulary=names, zero_shot=reads
        )
        learners[reads] = made
    plain = head_of(folders, "CLIP", [], vocabulary=names)
    pixels = torch.stack([stream[0].train.load(i, None) for i in range(8)])
    inputs = Inputs(pixels=torch.cat([pixels, torch.randint(0, 256, (40, *pixels.shape[1:])).to(torch.uint8)]))
    with torch.no_grad():
        before = plain.among(backbone(folders).features(inputs), names).softmax(-1)
    moved = {}
    for reads, made in learners.items():
        for task in stream[:2]:
            learn_protected(made, task)
        head, now = made.model.head, made.among(inputs, names)
        others = [i for i, name in enumerate(names) if name not in made.classes]
        shut = torch.tensor([i in others for i in before.argmax(1).tolist()])
        moved[reads] = float((now[shut][:, others] / 10 - before[shut][:, others]).abs().max())
        if reads == "bare":
            assert torch.equal(~made.named(inputs, names).gates["the expert speaks"], shut)
            own = made.features(inputs)[:, : head.dim]
            assert torch.equal(own, backbone(folders).features(inputs))
            tuned_own = made.features(inputs)[:, head.dim : 2 * head.dim]
            assert not torch.equal(own, tuned_own), "the pets have learned"
    assert moved["bare"] < 1e-7, "the rounding of a sum whose terms have another order"
    assert moved["tuned"] > 1e-4


def test_the_experts_sums_are_carried(folders: dict[str, Path]) -> None:
    """`carry` of the expert moves its sums when features are trained; without it they stay what they were."""
    sums = {}
    for carry in (True, False):
        made, stream = tuned(folders, ["picture.q", "picture.v"], expert={"name": "ncm", "carry": carry})
        for task in stream[:2]:
            learn_protected(made, task)
        sums[carry] = made.model.head.expert.sums[:2]
    assert not torch.allclose(sums[True], sums[False], atol=1e-5)


# -- the verbs --------------------------------------------------------------------------------------------


def test_a_run_of_zero_shot_and_the_verbs(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """No task is needed to ask among names; `frozen` learns nothing and knows the classes."""
    content = recipe(folders["CLIP"], data, head="text", method="frozen", pet="none")
    learner = Learner(content, tmp_path / "state")
    photos = picture_folder(tmp_path / "photos", NAMES[:4], 2, first=70)
    asked = sorted(photos.rglob("*.png"))
    first = learner.predict(asked, names=NAMES, top=2)
    with pytest.raises(Exception, match="has learned nothing yet"):
        learner.predict(asked)
    results = learner.run()
    assert results["tasks"][1]["classes"] == ["fox", "owl"]
    for one, other in zip(learner.predict(asked, names=NAMES, top=2), first, strict=True):
        assert [name for name, _ in one.classes] == [name for name, _ in other.classes]
        assert dict(one.classes) == pytest.approx(dict(other.classes), abs=1e-5)
    assert {name for name, _ in learner.predict(asked, top=9)[0].classes} == set(NAMES[:4])
    for wrong in ([], ["a", "a"], ["a", " "]):
        with pytest.raises(UsageError, match="expected different names"):
            learner.predict(asked, names=wrong)
    cosines = learner.match(asked, ["a photo of a cat.", "a dog"])
    assert cosines.shape == (8, 2)
    found = learner.find("a photo of a cat.", asked, top=3)
    best = cosines[:, 0].topk(3)
    assert [path for path, _ in found] == [str(asked[i]) for i in best.indices.tolist()]


def test_the_command_line(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = Learner(recipe(folders["CLIP"], data, head="text", method="frozen", pet="none"), tmp_path / "state")
    learner.run()
    photos = picture_folder(tmp_path / "photos", ["cat"], 2, first=70)
    (photos / "torn.png").write_bytes(b"no picture")
    state = str(tmp_path / "state")
    capsys.readouterr()
    assert call(["predict", state, str(photos / "cat"), "--names", "red panda, otter", "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.rpartition(": ")[2].split(" 0")[0] in ("red panda", "otter") for line in lines)
    assert call(["find", state, "a dog on a beach", str(photos), "--top", "5"]) == 1
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2
    assert "torn.png" in told.err
    assert call(["predict", state, str(photos / "cat"), "--names", "a,,b"]) == 2
    assert "expected different names" in capsys.readouterr().err


def test_an_exam_may_read_names_in_templates_of_its_own(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Its figures are those of a head with these templates; nothing else changes, in the head or in the state."""
    source = str(picture_folder(tmp_path / "suite", NAMES, 4, first=300))
    asked = {"name": "dataset", "source": source, "among": "own"}
    found: list[tuple[Any, Any, Tensor]] = []
    for head, exams in (
        ("photo", {"plain": asked, "other": {**asked, "templates": "seven"}}),
        ("seven", {"plain": asked}),
        ("photo", {}),
    ):
        text = {"name": "text", "templates": head, "expert": {"name": "ridge"}, "vocabulary": NAMES}
        content = recipe(folders["CLIP"], data, head=text, method="frozen", pet="none", exams=exams)
        learner = Learner(content, tmp_path / f"{head}-{len(exams)}")
        results = learner.run()
        found.append((results.get("exams"), snapshot(learner.method), learner.method.model.head.kept))
    (both, stored, kept), (other, _, _), (_, alone, bare) = found
    assert [entry["of"]["other"] for entry in both] == [entry["of"]["plain"] for entry in other]
    assert [entry["of"]["other"] for entry in both] != [entry["of"]["plain"] for entry in both]
    assert stored == alone
    assert torch.equal(kept, bare)
    content = recipe(folders["CLIP"], data, head="linear", exams={"one": {**asked, "templates": "seven"}})
    with pytest.raises(UsageError, match="exam one: templates are for a head that reads names, and linear reads none"):
        Learner(content, tmp_path / "linear").run()


def test_init_takes_the_recipe_that_fits(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "its recipe is update-text; --recipe update is for pictures alone"
    model = ["--model", f"folder:{folders['Siglip']}", "--device", "cpu"]
    for state, asked, head in (("by itself", [], "text"), ("asked", ["--recipe", "update"], "ridge")):
        assert call(["init", str(tmp_path / state), *model, *asked]) == 0
        assert capsys.readouterr().err.count(said) == (not asked)
        assert Learner.load(tmp_path / state).recipe.head.name == head
    clip = tmp_path / "open_clip"
    clip.mkdir()
    (clip / "open_clip_config.json").write_text("{}")
    for spec in ("openclip:ViT-B-16.x", f"folder:{clip}", f"hf:{folders['ViT and BERT']}"):
        assert is_dual(spec)
    for spec in ("timm:vit", "perpetune:micro", "another:thing", f"folder:{tmp_path}", f"hf:{tmp_path / 'x.gguf'}"):
        assert not is_dual(spec)


def test_heads_and_backbones_that_do_not_fit(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    from tiny import vit_folder

    vit = vit_folder(tmp_path / "vit")
    with pytest.raises(UsageError, match="has no text tower"):
        Learner(recipe(vit, data, head="text", method="frozen", pet="none"), tmp_path / "a")
    learner = Learner(recipe(vit, data), tmp_path / "b")
    with pytest.raises(UsageError, match=r"names need a head that knows classes by their names"):
        learner.predict([], names=["a"])
    with pytest.raises(UsageError, match="reads no texts beside pictures"):
        learner.match([], ["a"])
    for options, said in (
        ({"vocabulary": str(tmp_path / "none.txt")}, "vocabulary: cannot read"),
        ({"vocabulary": ["a", " "]}, "empty name"),
        ({"expert": {"name": "ridge", "projecton": 3}}, "projecton"),
        ({"expert": "linear"}, "ridge"),
        ({"expert": {"name": "ridge", "penalty": -1}}, "penalty"),
        ({"expert": {"name": "ridge", "projection": "many"}}, "projection"),
    ):
        content = recipe(folders["CLIP"], data, head={"name": "text", **options}, method="frozen", pet="none")
        with pytest.raises(UsageError, match=said):
            Learner(content, tmp_path / "c")
    with pytest.raises(UsageError, match=r"leave backbone.taps out"):
        Text.of(backbone(folders).tap(1))
    with pytest.raises(UsageError, match=r"add an expert"):
        Text.of(backbone(folders), zero_shot="bare")
    bare = {"name": "text", "expert": "ridge", "zero_shot": "bare"}
    for pet, said in (
        ("none", "the recipe has no pet"),
        ({"name": "lora", "at": ["text.q"]}, "a pet changes the text"),
    ):
        with pytest.raises(UsageError, match=said):
            Learner(recipe(folders["CLIP"], data, head=bare, pet=pet, method="frozen"), tmp_path / "d")


def test_a_vocabulary_in_a_file(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufeffcat\n\nred_panda\ncat\n")
    assert head_of(folders, "CLIP", vocabulary=str(tmp_path / "names.txt")).vocabulary == ["cat", "red_panda"]


def test_it_is_a_head_of_a_classifier(folders: dict[str, Path]) -> None:
    method, _ = tuned(folders, ["picture.q"])
    assert isinstance(method.model, Classifier)
    assert method.model.any_class
    shared = copy.deepcopy(method.model.head)
    assert shared.side is method.model.head.side
