"""The pet `context`, the linear adapter at features, and the methods that they make: CLIP-PGP and S-liPrompts."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_digests import StopsOnce
from test_dual import PIXELS, TEXTS, load, put, shake, side
from tiny import DUAL, chiefly, dual_folder, picture_folder, recipe, split_folder
from torch import Tensor

from perpetune import Learner
from perpetune.errors import Interrupted, UsageError
from perpetune.heads.text import Text
from perpetune.methods.pool import Pool
from perpetune.models.backbone import Backbone
from perpetune.models.classifier import Classifier
from perpetune.numerics.projection import ProjectedStep
from perpetune.numerics.subspace import Subspace
from perpetune.pets import pets, using
from perpetune.pets.adapter import Adapter
from perpetune.pets.base import outermost
from perpetune.pets.context import Context
from perpetune.recipe import make_recipe
from perpetune.seeding import generator
from perpetune.snapshot import snapshot

KINDS = (*DUAL, "open_clip")
MARKED = ("[context] red fox.", "[context] cat.", "dog")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: dual_folder(tmp_path_factory.mktemp(kind.split()[0]), kind) for kind in DUAL}
    try:
        from test_openclip import folder_of
    except pytest.skip.Exception:
        return made
    return made | {"open_clip": folder_of(tmp_path_factory.mktemp("open") / "net", "plain")}


def opened(folders: dict[str, Path], kind: str, **options: Any) -> Backbone:
    if kind not in folders:
        pytest.skip("open_clip is not installed")
    return load(folders[kind], **options)


def embedded(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """What the table of tokens, with the pets in force, gives for the texts."""
    caught: list[Tensor] = []
    place = backbone.pet_places(["text.embed"])[0]
    handle = outermost(backbone.net, place.path).register_forward_hook(lambda _m, _a, out: caught.append(out))
    side(backbone).encode(side(backbone).inputs(texts))
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_that_are_the_words_tokens_change_no_bit(folders: dict[str, Path], kind: str) -> None:
    backbone = opened(folders, kind)
    put(backbone, "text.embed", kind=Context, init="a photo of a")
    with torch.no_grad():
        expected = side(backbone).of(["a photo of a red fox.", "a photo of a cat.", "dog"])
        assert torch.equal(side(backbone).of(MARKED), expected)  # not in force
        with using(backbone.net, "default"):
            assert torch.equal(side(backbone).of(MARKED), expected)
            alone = side(backbone).of(MARKED[:1])[0]
            torch.testing.assert_close(alone, side(backbone).of(MARKED)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_vectors_places_change_and_only_they_learn(folders: dict[str, Path], kind: str) -> None:
    backbone = opened(folders, kind)
    (vectors,) = put(backbone, "text.embed", kind=Context, length=4)
    assert vectors.shape == (4, 16)
    assert 0.01 < float(vectors.detach().std()) < 0.03
    where = side(backbone).inputs(MARKED)["context"]
    assert where.sum(1).tolist() == [4, 4, 0]
    start = 0 if kind.startswith("Siglip") else 1  # behind the token that begins a text
    assert where[0].nonzero().flatten().tolist() == [start + i for i in range(4)]
    bare = embedded(backbone, MARKED)
    with using(backbone.net, "default"):
        tuned = embedded(backbone, MARKED)
        assert torch.equal(tuned[~where], bare[~where])
        assert torch.equal(tuned[where], vectors.expand(2, -1, -1).flatten(0, 1))
        assert not torch.equal(bare[where], tuned[where])
        side(backbone).of(MARKED).square().sum().backward()  # type: ignore[no-untyped-call]
        assert "context" not in side(backbone).inputs(TEXTS)
        with torch.no_grad():
            plain = side(backbone).of(TEXTS)
    assert vectors.grad is not None
    assert bool((vectors.grad.abs().sum(1) > 0).all())
    assert all(p.grad is None for p in backbone.net.parameters() if p is not vectors)
    with torch.no_grad():
        assert torch.equal(side(backbone).of(TEXTS), plain)  # texts without a context are read as ever


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_vectors_and_adapters_are_float32_in_a_net_of_half_precision(
    folders: dict[str, Path], kind: str, dtype: str
) -> None:
    """Small steps arrive; in the type of the net most entries would not change."""
    backbone = opened(folders, kind, dtype=dtype)
    changed = put(backbone, "text.embed", kind=Context, length=4)
    changed += put(
        backbone, "picture.feature", "text.feature", kind=Adapter, width=3, scale=1.0, bias=False, activation="none",
        name="more",
    )  # fmt: skip
    shake(changed)
    with using(backbone.net, ("default", "more")):
        result = backbone.features(PIXELS), side(backbone).of(MARKED)
    assert {f.dtype for f in result} == {torch.float32}
    assert all(bool(f.isfinite().all()) for f in result)
    assert {p.dtype for p in changed} == {torch.float32}
    half = [p.detach().to(getattr(torch, dtype)) for p in changed]
    before = [p.detach().clone() for p in changed]
    for parameter in changed:
        parameter.grad = torch.full_like(parameter, 1e-3)
    torch.optim.SGD(changed, lr=1e-3).step()
    assert all(bool((a != b).all()) for a, b in zip(before, changed, strict=True))
    unchanged = [float((h - 1e-6 * torch.ones_like(h) == h).float().mean()) for h in half]
    assert min(unchanged) > 0.5  # control


def test_a_name_that_is_too_long_loses_its_end_and_never_its_context(folders: dict[str, Path]) -> None:
    backbone = opened(folders, "CLIP")
    put(backbone, "text.embed", kind=Context, length=16)
    with pytest.warns(UserWarning, match="takes 40 tokens; longer texts lose their end"):
        made = side(backbone).inputs(["[context] " + "the fox " * 40])
    assert made.ids.shape == (1, 40)
    assert int(made.ids[0, -1]) == 3  # the end token
    assert int(made["context"].sum()) == 16
    other = opened(folders, "CLIP")
    put(other, "text.embed", kind=Context, length=38)
    with pytest.raises(UsageError, match="38 vectors leave no room; a text has 40 tokens"):
        side(other).of(MARKED)


def test_what_cannot_be_a_context_is_one_line(folders: dict[str, Path]) -> None:
    backbone = opened(folders, "CLIP")
    for texts, said in (
        (["a [context] cat"], "has to stand once, at the beginning"),
        (["[context] a [context]"], "has to stand once, at the beginning"),
        (["[context] cat"], "there is no pet that makes it: add pet: context"),
        (["[context] "], "there is no pet that makes it"),
    ):
        with pytest.raises(UsageError, match=said):
            side(backbone).of(texts)
    for options, said in (
        ({"length": 0}, "length is 0; at least 1"),
        ({"std": -1.0}, "std is -1.0"),
        ({"init": " "}, "is empty"),
        ({"init": "a photo of a", "length": 3}, "has 11 tokens, and length is 3"),
    ):
        with pytest.raises(UsageError, match=said):
            put(backbone, "text.embed", kind=Context, **options)
    with pytest.raises(UsageError, match="is not the table of tokens of a dual encoder's text tower"):
        put(backbone, "text.q", kind=Context)
    put(backbone, "text.embed", kind=Context)
    with pytest.raises(UsageError, match="text 1 is empty"):
        side(backbone).of(["cat", "[context] "])
    made = copy.deepcopy(pets(backbone.net, "default")[0])
    with pytest.raises(UsageError, match="share: all there is no linear condition"):
        made.sites()


# -- the linear adapter -------------------------------------------------------------------------------


def test_linear_adapter_is_added_to_the_feature_and_its_conditions_are_exact(folders: dict[str, Path]) -> None:
    """`f' = f + W_u W_d f` on the unnormalised feature, and a projected step that keeps old ones (float64)."""
    backbone = opened(folders, "CLIP").double()
    linear = {"kind": Adapter, "width": 3, "scale": 1.0, "bias": False, "activation": "none"}
    changed = [p.double() for p in put(backbone, "picture.feature", **linear)]
    adapter = pets(backbone.net, "default")[0].double()
    assert isinstance(adapter, Adapter)
    plain = backbone.features(PIXELS)
    with using(backbone.net, "default"):
        assert torch.equal(backbone.features(PIXELS), plain)
        shake(list(adapter.parameters()))
        moved = backbone.features(PIXELS)
    torch.testing.assert_close(moved, plain + plain @ adapter.down.T @ adapter.up.T, atol=1e-12, rtol=1e-12)
    assert len(changed) == 2
    rng = generator("linear")
    for protected in (True, False):
        pet = copy.deepcopy(adapter)
        old, new = torch.randn(2, 8, generator=rng, dtype=torch.float64), torch.randn(5, 8, generator=rng).double()
        rows: dict[str, Tensor] = {}
        pet.watch = lambda name, given, rows=rows: rows.__setitem__(name, given)
        before = pet(torch.nn.Identity(), old).detach()
        operands = []
        for site in pet.sites():
            subspace = Subspace(site.operand.shape[2])
            subspace.extend(rows[site.name].mT @ rows[site.name], 1.0)
            operands.append((site.operand, [subspace]))
        pet.watch = None
        optimizer = torch.optim.AdamW(pet.parameters(), lr=0.05)
        with ProjectedStep(optimizer, operands if protected else []):
            for _ in range(30):
                optimizer.zero_grad()
                (pet(torch.nn.Identity(), new) - 1).square().sum().backward()
                optimizer.step()
        apart = float((pet(torch.nn.Identity(), old).detach() - before).norm() / before.norm())
        assert apart < 1e-12 if protected else apart > 0.3


# -- CLIP-PGP and S-liPrompts ---------------------------------------------------------------------------

PROMPT = {"name": "prompt", "at": ["block"], "deep": False, "length": 3}
CONTEXT = {"name": "context", "length": 4, "share": "task"}
HEAD = {"name": "text", "templates": "context"}


def clip_pgp(folder: Path, data: Path | None, **changes: Any) -> dict[str, Any]:
    pet = {**PROMPT, "beside": [CONTEXT]}
    train = {"epochs": 4, "batch_size": 8, "lr": 0.05}
    return recipe(folder, data, **{"pet": pet, "head": HEAD, "train": train, **changes})


def parts(learner: Learner) -> tuple[Text, Context]:
    model: Any = learner.method.model
    (context,) = [pet for pet in pets(model, "default") if isinstance(pet, Context)]
    assert isinstance(model, Classifier)
    assert isinstance(model.head, Text)
    return model.head, context


class Counted:
    """Counts the texts that a learner's text tower reads."""

    def __init__(self, learner: Learner, monkeypatch: pytest.MonkeyPatch):
        self.read, texts = 0, learner.method.model.backbone.texts
        assert texts is not None
        plain = texts.encode

        def counted(inputs: Any) -> Tensor:
            self.read += len(inputs)
            return plain(inputs)

        monkeypatch.setattr(texts, "encode", counted)


@pytest.mark.parametrize("kind", chiefly(["CLIP", "ViT and BERT", "open_clip"], ["CLIP", "open_clip"]))
def test_each_task_has_its_context_and_the_texts_of_finished_ones_stay(
    folders: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind not in folders:
        pytest.skip("open_clip is not installed")
    pictures = split_folder(tmp_path / "pictures", ["cat", "elk", "fox", "owl"], 8, 4)
    prompt = {**PROMPT, **({} if kind == "ViT and BERT" else {"through": "norm_pre"}), "beside": [CONTEXT]}
    plan = clip_pgp(folders[kind], pictures, pet=prompt, stream={"by": "class", "classes_per_task": 2})
    learner = Learner(plan, tmp_path / "state")
    head, context = parts(learner)
    values: list[Tensor] = []
    kept: list[Tensor] = []
    learn = learner.method.learn

    def watched(task: Any) -> None:
        learn(task)
        values.append(context.vectors.detach().clone())
        assert head.settled is not None
        kept.append(head.settled.detach().clone())
        with torch.no_grad(), using(learner.method.model, learner.method.trained):  # kept texts = read again
            again = torch.nn.functional.normalize(
                side(learner.method.model.backbone).of([f"[context] {name}." for name in task.classes]), dim=-1
            )
        torch.testing.assert_close(kept[-1][-2:], again, atol=1e-6, rtol=1e-5)

    monkeypatch.setattr(learner.method, "learn", watched)
    learner.run()
    assert not torch.equal(values[0], values[1])
    assert torch.equal(kept[1][:2], kept[0])  # a finished task's texts keep their bytes
    assert kept[1].shape == (4, side(learner.method.model.backbone).dim)
    asked = sorted(picture_folder(tmp_path / "new", ["cat", "owl"], 2, first=50).rglob("*.png"))
    loaded = Learner.load(tmp_path / "state")
    counted = Counted(loaded, monkeypatch)
    assert loaded.predict(asked) == learner.predict(asked)
    assert counted.read == 0  # the texts of learned classes are stored


def test_a_run_with_contexts_that_is_stopped_goes_on_to_the_same_bits(folders: dict[str, Path], tmp_path: Path) -> None:
    pictures = split_folder(tmp_path / "pictures", ["cat", "elk", "fox", "owl"], 12, 4)
    asked, found = sorted((pictures / "test").rglob("*.png")), []
    for number, plan in enumerate((clip_pgp(folders["CLIP"], pictures), slip(folders["CLIP"], domains(tmp_path)))):
        plan |= {"run": {"device": "cpu", "checkpoint_every": 2}, "stream": plan["stream"] | {"classes_per_task": 2}}
        if number:
            plan["stream"] = {"by": "domain"}
            asked = sorted((tmp_path / "test").rglob("*.png"))
        for progress in (None, StopsOnce()):
            state = tmp_path / f"state-{number}-{progress is None}"
            learner = Learner(plan, state, **({} if progress is None else {"progress": progress}))
            if progress is None:
                learner.run()
            else:
                with pytest.raises(Interrupted):
                    learner.run()
                learner = Learner.load(state)
                learner.resume()
            found.append(dict(snapshot(learner.method)))
            assert Learner.load(state).predict(asked) == learner.predict(asked)
        assert found[-1] == found[-2]


def test_protection_holds_the_prompt_and_leaves_the_contexts_free(folders: dict[str, Path], tmp_path: Path) -> None:
    pictures = split_folder(tmp_path / "pictures", ["cat", "elk", "fox", "owl"], 8, 2)
    deep = {"name": "prompt", "length": 3, "beside": [CONTEXT]}
    plan = clip_pgp(folders["CLIP"], pictures, pet=deep, protect={"energy": 0.9})
    learner = Learner(plan | {"stream": {"by": "class", "classes_per_task": 2}})
    protection = learner.method.protection
    assert protection is not None
    assert {w.kind for w in protection.sites} == {"keys", "values"}
    assert (len(protection.still), len(protection.free)) == (0, 1)
    learner.run()
    with pytest.raises(UsageError, match="share: all there is no linear condition"):
        Learner(plan | {"pet": {**deep, "beside": [{**CONTEXT, "share": "all"}]}})


def test_a_shared_context_goes_on_from_task_to_task(folders: dict[str, Path], tmp_path: Path) -> None:
    pictures = split_folder(tmp_path / "pictures", ["cat", "elk", "fox", "owl"], 8, 2)
    pet = {"name": "context", "init": "a photo of a"}
    plan = clip_pgp(folders["CLIP"], pictures, pet=pet, stream={"by": "class", "classes_per_task": 2})
    learner = Learner(plan, tmp_path / "state")
    head, context = parts(learner)
    begun = context.vectors.detach().clone()
    learner.run()
    assert head.settled is None
    assert not torch.equal(context.vectors, begun)
    asked = sorted((pictures / "test").rglob("*.png"))
    assert Learner.load(tmp_path / "state").predict(asked) == learner.predict(asked)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "linear"}, "stands where a template of head: text has"),
        ({"head": {"name": "text"}}, "stands where a template of head: text has"),
        ({"pet": "lora"}, r"a template has \[context\], and no pet makes it"),
        ({"method": "joint"}, "joint does not start new ones"),
        ({"method": {"name": "pool", "members": 3, "select": "keys"}}, "pool does not start new ones"),
        ({"average": {"weight": 0.9}}, "each task starts from a context of its own"),
        (
            {"pet": {"name": "context", "beside": [CONTEXT]}},
            "has a pet called 'default' already",
        ),
        (
            {"pets": {"a": CONTEXT, "b": {**CONTEXT, "length": 5}}, "pet": "none"},
            "all sets of pets need the same length",
        ),
        ({"method": "pool", "pet": {**PROMPT, "beside": {**CONTEXT, "share": "all"}}}, "use share: task"),
    ],
)
def test_what_does_not_fit_together_is_said_before_anything_is_learned(
    folders: dict[str, Path], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        Learner(clip_pgp(folders["CLIP"], None, **changes))


def test_a_pet_beside_another_has_none_beside_it() -> None:
    for pet, said in (
        ({"name": "lora", "beside": [{"name": "context", "beside": ["lora"]}]}, "has no beside of its own"),
        ({"name": "lora", "beside": [{"name": "contextt"}]}, "there is no 'contextt'"),
        ({"name": "lora", "beside": [{"name": "context", "lenth": 3}]}, "lenth is not an option"),
    ):
        with pytest.raises(UsageError, match=said):
            make_recipe({"pet": pet})


def domains(path: Path, names: Sequence[str] = ("day", "dim", "dusk"), train: int = 8, test: int = 4) -> Path:
    for name in names:
        for part, count, first in (("train", train, 0), ("test", test, 100)):
            picture_folder(path / part / name, ["cat", "owl"], count, name, first)
    return path


def slip(folder: Path, data: Path | None, **changes: Any) -> dict[str, Any]:
    method = {"name": "pool", "select": {"name": "centres", "count": 2}, "start": "fresh", "answer": "own"}
    given = {"setting": "domain", "stream": {"by": "domain"}, "method": method}
    return clip_pgp(folder, data, **{**given, **changes})


def test_s_liprompts_answer_with_the_prompt_and_the_texts_of_the_chosen_domain(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brute force, picture by picture: the nearest centre of bare features, then that domain's prompt and context."""
    data = domains(tmp_path / "data")
    learner = Learner(slip(folders["CLIP"], data), tmp_path / "state")
    method, taken = learner.method, []
    assert isinstance(method, Pool)
    learn = method.learn

    def watched(task: Any) -> None:
        learn(task)
        names = [name for name in ("task-0", "task-1", "task-2") if name in method.bank.names()]
        taken.append({name: [p.detach().clone() for pet in pets(method.model, name) for p in pet.parameters()]
                      for name in names} | {"centres": [method.selector.get_buffer("centres").clone()]})  # fmt: skip

    monkeypatch.setattr(method, "learn", watched)
    learner.run()
    for before, after in itertools.pairwise(taken):
        for name in before.keys() - {"centres"}:
            assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
        count = len(before["centres"][0])
        assert torch.equal(after["centres"][0][:count], before["centres"][0])
    asked = sorted((data / "test").rglob("*.png"))
    counted = Counted(learner, monkeypatch)
    found = learner.predict(asked)
    assert counted.read == 0
    backbone, head = method.model.backbone, method.model.head  # type: ignore[attr-defined]
    inputs = pixels_of(asked)
    with torch.no_grad():
        bare = torch.nn.functional.normalize(backbone.features(inputs), dim=-1)
        centres, of = method.selector.get_buffer("centres"), method.selector.get_buffer("of")
        nearest = of[torch.cdist(bare, centres.to(bare)).argmin(1)].tolist()
        assert len(set(nearest)) > 1
        for number, (one, slot) in enumerate(zip(found, nearest, strict=True)):
            with using(backbone.net, f"task-{slot}"):
                feature = torch.nn.functional.normalize(backbone.features(inputs[number : number + 1]), dim=-1)
                texts = torch.nn.functional.normalize(side(backbone).of(["[context] cat.", "[context] owl."]), dim=-1)
            scores = (side(backbone).scale * feature @ texts.T).softmax(-1)[0]
            best = int(scores.argmax())
            name, share = one.classes[0]
            assert name == head.classes[best]
            assert share == pytest.approx(float(scores[best]), abs=1e-4)
    with torch.no_grad():
        whole = method.predict(inputs)
        alone = torch.cat([method.predict(inputs[i : i + 1]) for i in range(len(inputs))])
        torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-4)  # each picture by itself
        among = method.among(inputs, ["owl", "cat"])
        torch.testing.assert_close(among.softmax(-1), whole.softmax(-1).flip(1), atol=1e-4, rtol=1e-4)
        assert method.among(inputs, ["owl", "zebra"]).shape == (len(inputs), 2)
    loaded = Learner.load(tmp_path / "state")
    assert loaded.predict(asked) == found


def pixels_of(paths: Sequence[Path]) -> Tensor:
    """Pictures `(B, 3, 16, 16)` in files of that size."""
    arrays = [np.array(Image.open(path).convert("RGB")) for path in paths]
    return torch.stack([torch.from_numpy(array) for array in arrays]).permute(0, 3, 1, 2).contiguous()


def test_one_domain_is_plain_tuning(folders: dict[str, Path], tmp_path: Path) -> None:
    data = domains(tmp_path / "data", ["day"])
    found = []
    for method in ({"name": "pool", "select": "centres", "start": "fresh", "answer": "own"}, {"name": "finetune"}):
        learner = Learner(slip(folders["CLIP"], data, method=method))
        learner.run()
        found.append(learner.predict(sorted((data / "test").rglob("*.png"))))
    for one, other in zip(*found, strict=True):
        assert [name for name, _ in one.classes] == [name for name, _ in other.classes]
        assert [share for _, share in one.classes] == pytest.approx([share for _, share in other.classes], abs=1e-6)


def test_twelve_domains(folders: dict[str, Path], tmp_path: Path) -> None:
    names = [f"d{number}" for number in range(12)]
    learner = Learner(slip(folders["CLIP"], domains(tmp_path / "data", names, 4, 1), train={"epochs": 1}))
    assert len(learner.run()["tasks"]) == 12
    method = learner.method
    assert isinstance(method, Pool)
    assert method.bank.names() == [f"task-{number}" for number in range(12)]


def test_control_one_prompt_for_all_domains_moves(folders: dict[str, Path], tmp_path: Path) -> None:
    learner = Learner(slip(folders["CLIP"], domains(tmp_path / "data"), method="finetune"))
    moved: list[Tensor] = []
    learn = learner.method.learn

    def watched(task: Any) -> None:
        learn(task)
        moved.append(torch.cat([p.detach().flatten() for pet in pets(learner.method.model, "default")
                                for p in pet.parameters() if not isinstance(pet, Context)]))  # fmt: skip

    learner.method.learn = watched  # type: ignore[method-assign]
    learner.run()
    assert not torch.equal(moved[0], moved[2])
