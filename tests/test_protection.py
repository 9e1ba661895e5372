"""Protection inside the library's loop: whole transformers in float64, the certificate against
measurements on the old pictures themselves, and the controls that must fail to protect."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny import chiefly, every, paired
from torch import Tensor, nn

from perpetune.build import build_method
from perpetune.check import SIZE, Pictures, tiny_backbone
from perpetune.data.pictures.view import PictureView
from perpetune.errors import PerpetuneError, UsageError
from perpetune.fit import FitConfig, fit
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.methods.finetune import FineTune
from perpetune.models.backbone import Backbone
from perpetune.models.classifier import Classifier
from perpetune.models.loaders.vit import class_token
from perpetune.pets import PET, Place, copy_set, inject, parameters, pets, slots, using
from perpetune.pets.adapter import Adapter
from perpetune.pets.lora import LoRA
from perpetune.protection.config import ProtectConfig
from perpetune.protection.protection import Protection
from perpetune.protection.sites import Watch, Watched, pet_sites
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime, Silent
from perpetune.seeding import generator, own_global_state
from perpetune.tasks import Batch, Task

DIM = 32  # of tokens; a picture has five
TRAIN = {"epochs": 30, "batch_size": 4, "lr": 0.003, "weight_decay": 0.01, "clip": 1.0}


def net_of(family: str) -> Backbone:
    """Two blocks of width 32 and two heads, which make five tokens of a picture; float64."""
    with own_global_state("protection", family):
        if family == "timm":
            from timm.models.vision_transformer import VisionTransformer

            net: nn.Module = VisionTransformer(SIZE, 8, num_classes=0, embed_dim=DIM, depth=2, num_heads=2)
            forward = None
        else:
            from transformers import ViTConfig, ViTModel

            sizes = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            net = ViTModel(ViTConfig(**sizes, image_size=SIZE, patch_size=8), add_pooling_layer=False)
            forward = class_token
        for name, parameter in net.named_parameters():  # random weights of std 0.02 make all pictures look alike
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.2)
            elif "bias" in name:
                nn.init.normal_(parameter, std=0.1)
    return Backbone(net, spec=family, dim=DIM, preprocess=PictureView(SIZE), forward=forward).double()


def method_of(backbone: Backbone, pet: Any, protect: Any, **changes: Any) -> Method:
    content = {"pet": pet, "protect": protect, "train": TRAIN, **changes}
    dtype = next(backbone.net.parameters()).dtype
    return build_method(make_recipe(content), backbone).to(dtype)


def task_of(index: int, classes: str, each: int, runtime: Runtime | None = None) -> Task:
    pictures: Any = Pictures(classes, each, seed=index)
    return Task(index, f"task-{index}", tuple(classes), pictures, runtime=runtime or Runtime())


def pixels_of(task: Task) -> Tensor:
    return torch.stack([task.train.load(i, None) for i in range(len(task.train))])


@torch.no_grad()
def features(method: Any, task: Task) -> Tensor:
    """Final features `(B, dim)` of a task's pictures."""
    with using(method.model, method.answering):
        found: Tensor = method.model.features(pixels_of(task))
    return found


def moved(now: Tensor, before: Tensor) -> float:
    return float((now - before).detach().norm() / before.detach().norm())


class Losses(Silent):
    """Keeps the losses that it is told of."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if loss is not None:
            self.seen.append(loss)


# -- one pet around one module ----------------------------------------------------------------------------


def around(kind: type[PET], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, PET]:
    """A module of one linear layer with a pet around it."""
    with own_global_state("one pet"):
        root = nn.Sequential(nn.Linear(24, 10)).to(dtype)
    role, parts = ("q", ((0, 10),)) if kind is LoRA else ("mlp", ())
    place = Place("0", root[0], (role,), parts, 0, 24, 10)
    options: Any = {"rank": 6} if kind is LoRA else {"width": 20}
    (pet,) = inject(root, [place], lambda p: kind(p, generator("one pet"), **options))
    return root, pet.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kind", [LoRA, Adapter])
def test_outputs_of_old_inputs_stay_through_two_hundred_steps(
    kind: type[PET], dtype: torch.dtype, tolerance: float
) -> None:
    """This includes the cross term of LoRA, and the nonlinearity and both biases of the adapter."""
    source = generator("one pet", "data")
    old = torch.randn(5, 24, generator=source, dtype=torch.float64).to(dtype)
    new = torch.randn(30, 24, generator=source, dtype=torch.float64).to(dtype)
    target = torch.randn(30, 10, generator=source, dtype=torch.float64).to(dtype)

    def train(root: nn.Module, pet: PET, x: Tensor, steps: int, protection: Protection) -> None:
        optimizer = torch.optim.AdamW(pet.parameters(), lr=0.01, weight_decay=0.05)
        with protection.guard(optimizer), using(root, "default"):
            for _ in range(steps):
                optimizer.zero_grad()
                (root(x) - target[: len(x)]).square().mean().backward()
                optimizer.step()

    found = {}
    for directions in ("features", "none"):
        root, pet = around(kind, dtype)
        sites, loose, _ = pet_sites(root, "exact")
        assert loose == []
        protection = Protection(sites, ProtectConfig(energy=1.0, directions=directions))
        train(root, pet, old, 30, protection)  # nothing is protected yet
        with using(root, "default"):
            protection.consolidate([old], root)
            before, values = root(old).detach(), [p.detach().clone() for p in pet.parameters()]
            train(root, pet, new, 200, protection)
            found[directions] = moved(root(old).detach(), before)
        assert any(moved(p, v) > 0.01 for p, v in zip(pet.parameters(), values, strict=True))
    assert found["features"] <= tolerance
    assert found["none"] > 1e-2


# -- whole transformers -----------------------------------------------------------------------------------

LINEARS = ["q", "k", "v", "proj", "fc1", "fc2"]
PETS: dict[str, dict[str, Any]] = {  # so large that ten tokens do not fill a site
    "lora-qv": {"name": "lora", "rank": 16},
    "lora-all": {"name": "lora", "rank": 16, "at": LINEARS},
    "adapter": {"name": "adapter", "width": 24, "scale": 1.0, "at": ["attn", "mlp"]},
    "adapter-relu": {"name": "adapter", "width": 40, "scale": 1.0, "at": ["mlp"], "activation": "relu", "bias": False},
    "prefix": {"name": "prefix", "length": 24},
    "prompt": {"name": "prompt", "length": 30},
}
FASTER = {"prefix": {**TRAIN, "lr": 0.05}, "prompt": {**TRAIN, "lr": 0.05}}


@pytest.mark.parametrize(("pet", "family"), paired(PETS, ["timm", "transformers"]))
def test_final_features_of_old_pictures_stay(family: str, pet: str) -> None:
    """All directions of the old tokens are closed in every block, so the features after each block stay."""
    losses = Losses()
    old, new = task_of(0, "ab", 1), task_of(1, "cd", 4, Runtime(progress=losses))
    method = method_of(net_of(family), PETS[pet], {"energy": 1.0}, train=FASTER.get(pet, TRAIN))
    learn_protected(method, old)
    before, new_before = features(method, old), features(method, new)
    values = [p.clone() for p in parameters(method, "default")]
    (certificate,) = learn_protected(method, new)
    assert certificate["worst"] <= 1e-8
    assert moved(features(method, old), before) <= 1e-8
    print(pet, moved(features(method, old), before), moved(features(method, new), new_before), losses.seen)
    assert moved(features(method, new), new_before) > (
        1e-5 if pet == "prompt" else 1e-2
    )  # a prompt is held on two sides
    assert losses.seen[-1] < 0.7 * losses.seen[0]
    assert sum(moved(p, v) > 1e-3 for p, v in zip(parameters(method, "default"), values, strict=True)) > 1


@pytest.mark.parametrize("pet", ["lora-qv", "adapter", "prefix", "prompt"])
def test_without_protection_they_move(pet: str) -> None:
    old, new = task_of(0, "ab", 1), task_of(1, "cd", 4)
    method = method_of(net_of("timm"), PETS[pet], {"energy": 1.0, "directions": "none"})
    learn_protected(method, old)
    before = features(method, old)
    (certificate,) = learn_protected(method, new)
    assert moved(features(method, old), before) > 1e-2
    assert certificate["worst"] > 1e-2


@pytest.mark.parametrize("pet", ["prefix", "prompt"])
def test_conditions_of_the_paper_do_not_hold_old_features(pet: str) -> None:
    """Equations 10 and 12 leave out the projections and the values."""
    old, new = task_of(0, "ab", 1), task_of(1, "cd", 4)
    short = {"name": pet, "length": 12}
    method = method_of(net_of("timm"), short, {"energy": 1.0, "conditions": "paper"}, train=FASTER[pet])
    learn_protected(method, old)
    before = features(method, old)
    learn_protected(method, new)
    assert moved(features(method, old), before) > 1e-3


# -- the head ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "weight_decay"),
    chiefly(itertools.product(["adamw", "sgd"], [0.0, 0.5]), [("adamw", 0.5), ("sgd", 0.5)]),
)
@pytest.mark.parametrize(("head", "protect"), paired(["linear", "cosine", "ncm"], [True, None]))
def test_rows_of_old_classes_rest(protect: Any, head: str, weight_decay: float, optimizer: str) -> None:
    """With mask `task` the loss does not contain these rows, and weight decay must not move them either."""
    train = {"epochs": 2, "batch_size": 4, "lr": 0.05, "weight_decay": weight_decay, "optimizer": optimizer}
    method: Any = method_of(tiny_backbone(), {"name": "lora", "rank": 2}, protect, head=head, train=train)
    learn_protected(method, task_of(0, "ab", 2))
    before = [p.clone() for p in method.model.head.per_class()]
    assert before
    learn_protected(method, task_of(1, "cd", 2))
    learn_protected(method, task_of(2, "bc", 2))  # b and c come again: they are trained
    after = method.model.head.per_class()
    for p, old in zip(after, before, strict=True):
        assert torch.equal(p[0], old[0])
        assert not torch.equal(p[1], old[1])


def test_rows_of_old_classes_move_where_the_loss_compares_them() -> None:
    method: Any = method_of(
        tiny_backbone(), {"name": "lora", "rank": 2}, True, method={"name": "finetune", "mask": "seen"}
    )
    learn_protected(method, task_of(0, "ab", 2))
    before = method.model.head.weight.clone()
    learn_protected(method, task_of(1, "cd", 2))
    assert (method.model.head.weight[:2] != before).any(1).all()


# -- the certificate --------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(method: Any, task: Task) -> dict[str, Tensor]:
    """What every site gives for a task's pictures now: its rows times its values, `(rows, heads, out)`."""
    found: dict[str, Tensor] = {}

    class Outputs(Watch):
        def add(self, watched: Watched, rows: Tensor, examples: Tensor | None = None) -> None:
            heads, _, width = watched.site.operand.shape
            rows = rows.transpose(1, 2).flatten(0, 1) if rows.dim() == 4 else rows.flatten(0, -2)[:, None]
            if watched.site.operand.bias is not None:
                rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
            assert rows.shape[1:] == (heads, width)
            found[watched.name] = torch.einsum("nhm,hom->nho", rows.double(), watched.values())

    with Outputs(method.protection.sites).on():
        method.predict(pixels_of(task))
    return found


def change(now: Tensor, before: Tensor) -> tuple[float, float]:
    """Root mean square over the rows, and relative to what was."""
    return float((now - before).square().sum((1, 2)).mean().sqrt()), moved(now, before)


@pytest.mark.parametrize("pet", ["lora-all", "adapter", "prefix"])
def test_certificate_is_what_the_old_pictures_show_site_by_site(pet: str) -> None:
    """Each site is moved while those below it are as they were: the figure is exact however high up it is."""
    old = task_of(0, "ab", 1)
    method = method_of(net_of("timm"), PETS[pet], {"energy": 1.0}, train={**TRAIN, "epochs": 5})
    learn_protected(method, old)
    assert method.protection is not None
    before, source = outputs(method, old), generator("moves")
    for watched in method.protection.sites:
        values = watched.values()
        watched.set_values(values + 0.1 * torch.randn(values.shape, generator=source, dtype=torch.float64))
        figures = {s["site"]: s for s in method.protection.certificate()["sites"]}
        absolute, relative = change(outputs(method, old)[watched.name], before[watched.name])
        assert relative > 1e-3
        assert figures[watched.name]["change"] == pytest.approx(absolute, rel=1e-9)
        assert figures[watched.name]["relative"] == pytest.approx(relative, rel=1e-9)
        watched.set_values(values)


@pytest.mark.parametrize("pet", ["lora-qv", "adapter", "prefix"])
def test_certificate_of_a_run(pet: str) -> None:
    """At the first site it is what the old pictures show. Up the network inputs move as well, which it cannot see:
    with a tenth of the energy left open it tells how much the worst site moves to a factor of three."""
    old, new = task_of(0, "ab", 1), task_of(1, "cd", 4)
    method = method_of(net_of("timm"), PETS[pet], {"energy": 0.9}, train=FASTER.get(pet, TRAIN))
    learn_protected(method, old)
    before = outputs(method, old)
    (certificate,) = learn_protected(method, new)
    after, figures = outputs(method, old), {s["site"]: s for s in certificate["sites"]}
    measured = {name: change(after[name], before[name]) for name in before}
    first = next(iter(figures))
    assert figures[first]["relative"] > 1e-4
    assert figures[first]["change"] == pytest.approx(measured[first][0], rel=1e-6)
    assert figures[first]["relative"] == pytest.approx(measured[first][1], rel=1e-6)
    assert certificate["worst"] == max(s["relative"] for s in figures.values())
    assert 1 / 3 < certificate["worst"] / max(relative for _, relative in measured.values()) < 3


# -- controls ---------------------------------------------------------------------------------------------


def forgetting(protect: Any, seed: int = 0, **changes: Any) -> float:
    """How far features of a first task's pictures have moved after a second one."""
    runtime = Runtime(seed=seed)
    old, new = task_of(0, "ab", 3, runtime), task_of(1, "cd", 3, runtime)
    train = {"epochs": 8, "batch_size": 4, "lr": 0.005}
    content = {"train": train, "seed": seed, **changes}
    method = method_of(net_of("transformers").float(), {"name": "lora", "rank": 16}, protect, **content)
    learn_protected(method, old)
    before = features(method, old)
    learn_protected(method, new)
    return moved(features(method, old), before)


@pytest.mark.parametrize("seed", every([0, 1, 2], 3))
def test_features_protect_and_random_directions_of_equal_rank_do_not(seed: int) -> None:
    energy = {"energy": 0.99}
    real = forgetting(energy, seed)
    drawn = forgetting({**energy, "directions": "random"}, seed)
    free = forgetting({**energy, "directions": "none"}, seed)
    print("features", real, "random", drawn, "none", free)
    assert free == forgetting(None, seed), "measuring alone changes nothing"
    assert 2 * real < drawn
    assert 2 * real < free


@pytest.mark.parametrize("seed", every([0, 1, 2], 3))
def test_a_projected_gradient_protects_less_than_a_projected_step(seed: int) -> None:
    step, gradient = ({"energy": 0.99, "project": project} for project in ("step", "gradient"))
    print(forgetting(step, seed), forgetting(gradient, seed))
    assert 2 * forgetting(step, seed) < forgetting(gradient, seed)


def test_soft_is_between_none_and_hard() -> None:
    hard, soft, free = (
        forgetting({"energy": 0.9999, **more})
        for more in ({}, {"strength": "soft", "alpha": 1.0}, {"directions": "none"})
    )
    print(hard, soft, free)
    assert 1.2 * hard < soft
    assert 1.2 * soft < free


def test_energy_rises_from_task_to_task() -> None:
    method = method_of(tiny_backbone(), "adapter", {"energy": 0.9, "energy_rise": 0.04}, train={"epochs": 1})
    energies = [learn_protected(method, task_of(i, c, 2))[0]["energy"] for i, c in enumerate(["ab", "cd", "ef", "gh"])]
    assert energies == pytest.approx([0.9, 0.94, 0.98, 1.0])


# -- which data, which sites ------------------------------------------------------------------------------


class Looked(Pictures):
    """Keeps what is loaded as for evaluation."""

    def __init__(self, classes: Sequence[str], each: int, seed: int):
        super().__init__(classes, each, seed)
        self.seen: list[int] = []

    def load(self, index: int, seed: int | None) -> Tensor:
        if seed is None:
            self.seen.append(index)
        return super().load(index, seed)


@pytest.mark.parametrize("samples", [1, 4, 7, 100, "all"])
def test_samples_are_balanced_and_drawn_by_a_generator_of_their_own(samples: Any) -> None:
    looked, memories = [], []
    for drawn_before in (0, 3):
        train: Any = Looked("abc", 4, seed=0)
        method = method_of(tiny_backbone(), {"name": "lora", "rank": 2}, {"samples": samples}, train={"epochs": 1})
        with own_global_state("anything", drawn_before):
            torch.rand(drawn_before)
            (certificate,) = learn_protected(method, Task(0, "t", tuple("abc"), train))
        looked.append(train.seen)
        # Type: ignore[union-attr]
        memories.append([m.clone() for m in method.protection.state_dict().values() if isinstance(m, Tensor)])
    expected = 12 if samples == "all" else min(samples, 12)
    assert certificate["examples"] == expected
    assert looked[0] == looked[1]
    assert len(looked[0]) == len(set(looked[0])) == expected
    counts = [[train.targets[i] for i in looked[0]].count(c) for c in range(3)]
    assert max(counts) - min(counts) <= 1
    assert all(torch.equal(a, b) for a, b in zip(*memories, strict=True))


def test_only_the_sites_that_are_named_are_held() -> None:
    method = method_of(net_of("timm"), PETS["lora-qv"], {"energy": 1.0, "sites": ["down"]})
    old = task_of(0, "ab", 1)
    learn_protected(method, old)
    before = outputs(method, old)
    learn_protected(method, task_of(1, "cd", 4))
    after = outputs(method, old)
    held, free = ([n for n in before if n.startswith("model.backbone.net.blocks.0") and k in n] for k in ("down", "up"))
    assert len(held) == 1
    assert len(free) == 2
    assert moved(after[held[0]], before[held[0]]) <= 1e-10
    assert all(moved(after[name], before[name]) > 1e-2 for name in free)


def test_a_site_that_is_not_there() -> None:
    with pytest.raises(UsageError) as error:
        method_of(tiny_backbone(), "lora", {"sites": ["dwn"]})
    assert str(error.value) == "protect: there is no site 'dwn'; sites here are down, up"


def test_a_method_without_pets_has_nothing_to_protect() -> None:
    with pytest.raises(UsageError) as error:
        method_of(tiny_backbone(), "none", True, head="linear", train={})
    assert str(error.value) == (
        "protect: nothing can be protected; sites here are none: put in a pet, or train a linear layer"
    )


def test_a_method_that_trains_no_pet_is_refused() -> None:
    with pytest.raises(UsageError, match="method: frozen trains no pet, so there is nothing for protect: to keep"):
        method_of(tiny_backbone(), "lora", True, method="frozen", head="ncm", train={})


def test_a_pass_that_leaves_the_pets_out_is_an_error() -> None:
    method = method_of(tiny_backbone(), "lora", True)
    method.observe = lambda inputs: None  # type: ignore[method-assign, assignment]
    with pytest.raises(PerpetuneError) as error:
        learn_protected(method, task_of(0, "ab", 1))
    assert "\n" not in str(error.value)
    assert "saw no data, because the pass did not go through it" in str(error.value)


class TrainsAnother(FineTune):
    """Trains a copy of the pets, and says that the first set is the one that it trains."""

    def __init__(self, model: Classifier, *, train: FitConfig):
        super().__init__(model, train=train)
        copy_set(model, "default", "another")

    def learn(self, task: Task) -> None:
        self.model.grow(task)
        fit(self.loss, self.groups(self.train_config, ["another"]), task, self.train_config)

    def loss(self, task: Task, batch: Batch) -> torch.Tensor:
        with using(self.model, "another"):
            return self.model.loss(task, batch)


class TrainsAnotherInPrivate(TrainsAnother):
    """Says that no later task uses what it trains."""

    def __init__(self, model: Classifier, *, train: FitConfig):
        super().__init__(model, train=train)
        self.private = ("another",)


def test_a_guard_that_guards_nothing_of_what_is_trained_is_an_error() -> None:
    """Before anything is protected too, for the fault is there from the first task on."""
    kind = f"{__name__}:TrainsAnother"
    method = method_of(tiny_backbone(), "lora", True, method=kind)
    with pytest.raises(UsageError) as error:
        learn_protected(method, task_of(0, "ab", 1))
    assert str(error.value).startswith(
        "protect: the optimizer trains the set of pets 'another', but protection holds 'default': the method has to"
    )
    learn_protected(method_of(tiny_backbone(), "lora", True, method=f"{kind}InPrivate"), task_of(0, "ab", 1))
    learn_protected(method_of(tiny_backbone(), "lora", None, method=kind), task_of(0, "ab", 1))


def test_a_method_that_keeps_all_data_has_nothing_to_protect() -> None:
    with pytest.raises(UsageError) as error:
        method_of(tiny_backbone(), "lora", True, method="joint")
    assert str(error.value) == "method: joint keeps all data, so there is nothing for protect: to keep"


def test_a_site_without_room_stays_and_the_run_goes_on() -> None:
    """With full rank and energy 1 no bit of the site changes."""
    method: Any = method_of(net_of("transformers"), {"name": "lora", "rank": 2}, {"energy": 1.0})
    (first,) = learn_protected(method, task_of(0, "ab", 12))
    assert first["room"] == 0
    assert len(first["full"]) == len(first["sites"])
    before = [p.clone() for p in parameters(method, "default")]
    rows = method.model.head.weight.clone()
    (second,) = learn_protected(method, task_of(1, "cd", 12))
    assert all(torch.equal(p, b) for p, b in zip(parameters(method, "default"), before, strict=True))
    assert not torch.equal(method.model.head.weight[2:], rows)
    assert second["worst"] == 0


# -- reference data ---------------------------------------------------------------------------------------


class Starts(Silent):
    """Asks something whenever training begins."""

    def __init__(self, ask: Callable[[], Any]):
        self.ask, self.found = ask, []

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        if phase == "train":
            self.found.append(self.ask())


def test_reference_is_protected_from_the_first_step_on() -> None:
    """Its features move less in the first task, and LoRA's A is moved out of their way, which changes no output."""
    reference = task_of(9, "xy", 2)
    found: dict[bool, float] = {}
    for protected in (True, False):
        method = method_of(net_of("timm"), {"name": "lora", "rank": 4}, {"energy": 1.0})
        before, down = features(method, reference), [pet.down.clone() for pet in pets(method, "default")]
        starts = Starts(lambda m=method: (features(m, reference), [pet.down.clone() for pet in pets(m, "default")]))
        task = task_of(0, "ab", 4, Runtime(progress=starts))
        certificates = learn_protected(method, task, reference.train if protected else None)
        assert [c["of"] for c in certificates] == (["reference", "task"] if protected else ["task"])
        ((at_start, down_then),) = starts.found
        assert torch.equal(at_start, before)
        assert [moved(now, then) > 0.1 for now, then in zip(down_then, down, strict=True)] == [protected] * 2
        found[protected] = moved(features(method, reference), before)
    assert found[True] <= 1e-8
    assert found[False] > 1e-2


# -- head first, and the merge ----------------------------------------------------------------------------


def two_tasks(method: Method) -> tuple[dict[str, Any], float]:
    """The second task's certificate, and how far the first one's features moved."""
    old, new = task_of(0, "ab", 1), task_of(1, "cd", 4)
    learn_protected(method, old)
    before = features(method, old)
    (certificate,) = learn_protected(method, new)
    return certificate, moved(features(method, old), before)


def test_a_merged_copy_costs_what_the_certificate_says() -> None:
    worst, moves = {}, {}
    for share in (0.0, 0.2, 0.8, "falling"):
        options = {"name": "finetune", "merge": share, "merge_epochs": 4}
        method = method_of(net_of("timm"), PETS["lora-qv"], {"energy": 1.0}, method=options)
        certificate, moves[share] = two_tasks(method)
        worst[share] = certificate["worst"]
        assert {name for _, slot in slots(method) for name in slot.pets} == {"default"}
    assert worst[0.0] <= 1e-8
    assert moves[0.0] <= 1e-8
    assert worst[0.2] > 1e-4
    assert worst[0.2] < worst["falling"] < worst[0.8]  # falling: a half, after one task
    assert moves[0.2] < moves[0.8]


def test_what_the_merged_copy_is_held_near_is_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, modes = FineTune._free_loss, []

    def watched(self: FineTune, copies: tuple[str, ...], task: Task, batch: Batch) -> Tensor:
        modes.append([{pet.training for pet in pets(self, name)} for name in ("default", *copies)])
        return loss(self, copies, task, batch)

    monkeypatch.setattr(FineTune, "_free_loss", watched)
    pet = {**PETS["lora-qv"], "dropout": 0.5}
    options = {"name": "finetune", "merge": 0.5}
    two_tasks(method_of(net_of("timm"), pet, {"energy": 1.0}, method=options, train={**TRAIN, "epochs": 1}))
    assert modes
    assert all(mode == [{True}, {False}] for mode in modes)


def test_head_first_trains_the_head_alone_from_the_second_task_on() -> None:
    phases: list[tuple[str, int]] = []

    class Phases(Silent):
        def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
            phases.append((phase, epochs))

    runtime = Runtime(progress=Phases())
    options = {"name": "finetune", "head_first": 0.6}
    method = method_of(net_of("timm"), PETS["lora-qv"], {"energy": 1.0}, method=options, train={**TRAIN, "epochs": 5})
    old, new = task_of(0, "ab", 1, runtime), task_of(1, "cd", 4, runtime)
    learn_protected(method, old)
    before = features(method, old)
    learn_protected(method, new)
    protecting = ("protect task", 1)
    assert phases == [("train", 5), protecting, ("head", 3), ("train", 2), protecting]
    assert moved(features(method, old), before) <= 1e-8


def test_training_the_head_alone_needs_no_room() -> None:
    method = method_of(net_of("timm"), PETS["lora-qv"], {"energy": 0.9}, method={"name": "finetune", "head_first": 1.0})
    learn_protected(method, task_of(0, "ab", 1))
    before = copy.deepcopy([p.data for p in parameters(method, "default")])
    learn_protected(method, task_of(1, "cd", 2))
    assert all(torch.equal(p, b) for p, b in zip(parameters(method, "default"), before, strict=True))
