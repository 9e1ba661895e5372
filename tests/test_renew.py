"""Renewed protected LoRA: the pair of each task rests and a new one starts where old features do not reach.
Brute force in float64, and a control that must fail for each claim."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_integrations import StopsAt, logits, texts, tiny_gpt2, trainer
from test_protection import features, method_of, net_of, pixels_of, task_of
from tiny import chiefly, paired, tiny_language_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.trainer_callback import TrainerCallback

import perpetune
from perpetune.errors import StateError, UsageError
from perpetune.export import read_peft, write_peft
from perpetune.integrations.transformers import ProtectionCallback
from perpetune.learning import learn_protected
from perpetune.numerics.lowrank import exact, reduced
from perpetune.numerics.subspace import Subspace
from perpetune.pets import Place, copy_set, fold, inject, parameters, pets, using
from perpetune.pets.lora import LoRA
from perpetune.protection.config import ProtectConfig
from perpetune.protection.dropin import DropIn
from perpetune.protection.protection import Protection
from perpetune.protection.renewal import kaiming, leading_start, random_start
from perpetune.protection.sites import pet_sites
from perpetune.seeding import generator, own_global_state
from perpetune.tasks import Task

DIM, RANK = 64, 8
NEVER = {"directions": "none", "energy": 1.0, "renew": True}
RENEWED = {"energy": 1.0, "renew": True}


def drawn(*shape: int, seed: int | str = 0) -> Tensor:
    return torch.randn(*shape, generator=generator("renew", seed), dtype=torch.float64)


class Layer:
    """One frozen linear layer with a LoRA around it, and tasks of regression whose inputs fill a few directions."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        dim: int = DIM,
        parts: Sequence[tuple[int, int]] = ((0, DIM),),
        d_out: int = DIM,
        **protect: Any,
    ):
        with own_global_state("renew"):
            self.root = nn.Sequential(nn.Linear(dim, d_out, bias=False)).to(dtype)
        place = Place("0", self.root[0], ("q",), tuple(parts), 0, dim, d_out)
        options = {"rank": RANK, "alpha": RANK}
        (pet,) = inject(self.root, [place], lambda p: LoRA(p, generator("renew"), **options))
        assert isinstance(pet, LoRA)
        self.pet, self.dtype, self.dim = pet.to(dtype), dtype, dim
        config = ProtectConfig(**protect)
        sites, loose, _ = pet_sites(self.root, "exact", renew=config.renews)
        assert loose == []
        self.protection = Protection(sites, config)

    def inputs(self, task: int, rank: int = 6, rows: int = 200) -> Tensor:
        return (drawn(rows, rank, seed=f"x{task}") @ drawn(rank, self.dim, seed=f"d{task}") / rank**0.5).to(self.dtype)

    def targets(self, task: int, x: Tensor) -> Tensor:
        weight = self.root[0].base.weight.detach()
        change = 0.5 * drawn(*weight.shape, seed=f"y{task}").to(self.dtype) / DIM**0.5
        return x @ (weight + change).mT

    def outputs(self, x: Tensor) -> Tensor:
        with torch.no_grad(), using(self.root, "default"):
            found: Tensor = self.root(x)
        return found

    def renew(self, task: int, x: Tensor | None = None) -> None:
        if self.protection.waiting:
            with using(self.root, "default"):
                self.protection.renew_pairs(generator("start", task), [] if x is None else [x], self.root)

    def train(self, x: Tensor, y: Tensor, steps: int = 300, lr: float = 1e-2, decay: float = 0.0) -> None:
        optimizer = torch.optim.AdamW(self.pet.parameters(), lr=lr, weight_decay=decay)
        with self.protection.guard(optimizer), using(self.root, "default"):
            for _ in range(steps):
                optimizer.zero_grad()
                ((self.root(x) - y) ** 2).mean().backward()
                optimizer.step()

    def consolidate(self, x: Tensor) -> dict[str, Any]:
        with using(self.root, "default"):
            return self.protection.consolidate([x], self.root)

    def unlearned(self, x: Tensor, y: Tensor) -> float:
        before = x @ self.root[0].base.weight.detach().mT
        return float(((self.outputs(x) - y) ** 2).mean() / ((before - y) ** 2).mean())


def moved(now: Tensor, before: Tensor) -> float:
    return float((now - before).norm() / before.norm())


def through(layer: Layer, tasks: int, **inputs: Any) -> tuple[list[float], float, list[dict[str, Any]]]:
    """Learn the tasks: what is left unlearned right after each, the worst move of old outputs, the certificates."""
    left, old, certificates = [], [], []
    for task in range(tasks):
        x = layer.inputs(task, **inputs)
        y = layer.targets(task, x)
        layer.renew(task, x)
        layer.train(x, y)
        left.append(layer.unlearned(x, y))
        old.append((x, layer.outputs(x)))
        certificates.append(layer.consolidate(x))
    return left, max(moved(layer.outputs(x), before) for x, before in old[:-1]), certificates


def test_toy() -> None:
    left, drift, _ = through(Layer(energy=1.0), 3)
    print("pegp", left, drift)
    assert left[2] >= 0.8
    for start in ("random", "leading"):
        layer = Layer(**RENEWED, start=start)
        left, drift, certificates = through(layer, 5)
        print(start, left, drift, [c["worst"] for c in certificates])
        assert max(left) < 0.01
        assert drift < 1e-12
    _, drift, certificates = through(Layer(**NEVER), 3)
    print("not projected", drift, certificates[-1]["worst"])
    assert drift > 0.1


# -- in one's own loop ------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """Frozen layers that PEFT puts its LoRA around, and a head that is trained itself where asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


def with_peft(dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    with own_global_state("renew", "peft"):
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["first", "second"], **options})
        return get_peft_model(TwoLayers(), config).to(dtype)


def rows(task: int, dim: int = 24, rank: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return (drawn(12, rank, seed=f"rows{task}") @ drawn(rank, dim, seed=f"span{task}")).to(dtype)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, task: int, count: int = 60) -> None:
    x = rows(task, dtype=next(model.parameters()).dtype)
    y = drawn(12, 16, seed=f"answers{task}").to(x)
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
    model.eval()


def answers(model: nn.Module, task: int) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(rows(task, dtype=next(model.parameters()).dtype))
    return found


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(("start", "dropout"), paired(["random", "leading"], [0.0, 0.3]))
def test_peft_in_ones_own_loop(start: str, dropout: float) -> None:
    """Three tasks by one optimizer: old outputs stay, B moves, renewal itself moves nothing; and not without."""
    moves = {}
    for how in ({"energy": 1.0}, {"directions": "none"}):
        model = with_peft(lora_dropout=dropout)
        protection = perpetune.protect(model, renew=True, start=start, **how)
        optimizer = torch.optim.AdamW(trained(model), lr=0.02, weight_decay=0.01)
        protection.guard(optimizer)
        old: list[Tensor] = []
        for task in range(3):
            if task:
                before = [answers(model, t) for t in range(task + 1)]
                protection.renew([rows(task)])
                for t, b in enumerate(before):
                    assert moved(answers(model, t), b) < 1e-12
            steps(model, optimizer, task)
            old.append(answers(model, task))
            protection.consolidate([rows(task)])
        moves["energy" in how] = max(moved(answers(model, t), old[t]) for t in (0, 1))
        ups = [p for n, p in model.named_parameters() if "lora_B" in n]
        assert all(p.norm() > 0.1 for p in ups)
        if "energy" in how:
            found = protection.report()
            assert found["worst"] < 1e-7
            assert len(found["sites"]) == 2  # those of A
            held = protection.closed()[0]
            assert not any(p is up for operand, _ in held for p in operand.parameters for up in ups)
    assert moves[True] < 1e-9
    assert moves[False] > 0.1


def test_a_step_before_the_renewal_is_refused() -> None:
    """B is free under renewal, so the pair of the last task must not be trained on."""
    model = with_peft()
    protection = perpetune.protect(model, renew=True)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    protection.guard(optimizer)
    steps(model, optimizer, 0)
    protection.consolidate([rows(0)])
    with pytest.raises(UsageError, match=r"call protection\.renew\(\) before the next step"):
        steps(model, optimizer, 1)
    protection.renew()
    steps(model, optimizer, 1)
    protection.renew()  # nothing was consolidated since
    assert protection.report()["worst"] < 0.5


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad", "LBFGS", "RMSprop"])
def test_an_optimizer_forgets_what_it_had_of_the_pair(kind: str) -> None:
    """After a renewal the next step is the one of a new optimizer."""

    def after(fresh: bool) -> list[Tensor]:
        model = with_peft()
        protection = perpetune.protect(model, renew=True, energy=1.0)
        options = {"momentum": 0.9} if kind in ("SGD", "RMSprop") else {}
        make = getattr(torch.optim, kind)
        optimizer = make(trained(model), lr=0.01, **options)
        protection.guard(optimizer)

        def step(task: int, count: int) -> None:
            def loss() -> Tensor:
                optimizer.zero_grad()
                value = ((model(rows(task)) - drawn(12, 16, seed=f"answers{task}")) ** 2).mean()
                value.backward()
                return value

            for _ in range(count):
                optimizer.step(loss)

        step(0, 5)
        protection.consolidate([rows(0)])
        protection.renew()
        if fresh:
            optimizer = make(trained(model), lr=0.01, **options)
            protection.guard(optimizer)
        step(1, 3)
        return [p.detach().clone() for p in trained(model)]

    for one, other in zip(after(False), after(True), strict=True):
        assert torch.equal(one, other)


def test_what_rests_acts_with_its_own_adapter_alone() -> None:
    """Another adapter of the same layer is what it is without it."""
    model = with_peft()
    protection = perpetune.protect(model, renew=True, energy=1.0)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    protection.guard(optimizer)
    steps(model, optimizer, 0, 5)
    protection.consolidate([rows(0)])
    protection.renew()
    learned = answers(model, 0)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
    model.set_adapter("other")
    assert torch.equal(answers(model, 0), answers(with_peft(), 0))  # B of both is zero
    model.set_adapter("default")
    assert torch.equal(answers(model, 0), learned)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    """PEFT's adapter and the protection's file on the bare model give the same outputs; a torn state gives a line."""
    model = with_peft()
    protection = perpetune.protect(model, renew=True, energy=1.0)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    protection.guard(optimizer)
    for task in range(3):
        protection.renew()
        steps(model, optimizer, task)
        protection.consolidate([rows(task)])
    model.save_pretrained(tmp_path / "adapter")
    protection.save(tmp_path / "protection.safetensors")
    other = with_peft()
    other.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True)
    other = other.double()
    loaded = perpetune.protect(other, renew=True, energy=1.0)
    assert moved(answers(other, 1), answers(model, 1)) > 0.1  # without the file what rests is missing
    loaded.load(tmp_path / "protection.safetensors")
    assert loaded.waiting
    for task in range(3):
        assert moved(answers(other, task), answers(model, task)) < 1e-12
    assert loaded.report() == protection.report()
    with model.disable_adapter():
        bare = answers(model, 0)
    assert torch.equal(bare, answers(with_peft(), 0))  # B is zero there
    plain = perpetune.protect(with_peft(), energy=1.0)
    with pytest.raises(StateError, match="it was made with renew"):
        plain.load(tmp_path / "protection.safetensors")
    state = protection.state_dict()
    torn = {n: v for n, v in state.items() if not n.startswith("rests.")}
    with pytest.raises(StateError, match="has no product of earlier tasks"):
        loaded.load_state_dict(torn)
    with pytest.raises(StateError, match="it was made without renew"):
        loaded.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("through", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_has_its_own_rest(through: Any) -> None:
    model = with_peft()
    protection = perpetune.protect(model, renew=True, energy=1.0)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    protection.guard(optimizer)
    for task in range(2):
        protection.renew()
        steps(model, optimizer, task)
        protection.consolidate([rows(task)])
    other, its = through((model, protection))
    assert torch.equal(answers(other, 0), answers(model, 0))
    its.renew()
    again = torch.optim.AdamW(trained(other), lr=0.02)
    its.guard(again)
    steps(other, again, 2)
    its.consolidate([rows(2)])
    its.renew()
    assert moved(answers(other, 2), answers(model, 2)) > 0.1
    for task in range(2):
        assert moved(answers(other, task), answers(model, task)) < 1e-9
    assert its.of(its.sites[0]).rank > protection.of(protection.sites[0]).rank


def test_merging_leaves_nothing_out() -> None:
    """PEFT's own merge would lose what rests, so it is refused until that is merged; then one net has all."""
    model = with_peft()
    protection = perpetune.protect(model, renew=True, energy=1.0)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    for task in range(3):
        protection.renew()
        steps(model, optimizer, task)
        protection.consolidate([rows(task)])
    before = [answers(model, t) for t in range(3)]
    with pytest.raises(UsageError, match=r"call protection\.merge_rest\(\) first"):
        model.merge_and_unload()
    protection.merge_rest()
    protection.merge_rest()
    whole = model.merge_and_unload()
    assert isinstance(whole, TwoLayers)
    for task in range(3):
        assert moved(answers(whole, task), before[task]) < 1e-12


def test_gpt2s_turned_weights_merge_too() -> None:
    config = GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    with own_global_state("renew", "gpt2"):
        net = GPT2LMHeadModel(config)
        model = get_peft_model(net, LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)).double()
    words = torch.arange(24).reshape(4, 6) % 8
    protection = perpetune.protect(model, renew=True)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    for task in range(2):
        protection.renew()
        for _ in range(5):
            optimizer.zero_grad()
            model(input_ids=words + 8 * task, labels=words + 8 * task).loss.backward()
            optimizer.step()
        protection.consolidate([{"input_ids": words + 8 * task}])
    with torch.no_grad():
        before = model.eval()(input_ids=words).logits
        protection.merge_rest()
        assert moved(model.merge_and_unload()(input_ids=words).logits, before) < 1e-12


def test_what_cannot_be_renewed_is_said() -> None:
    with pytest.raises(UsageError, match="has no LoRA to renew"):
        perpetune.protect(nn.Linear(4, 4), renew=True)
    with pytest.raises(UsageError, match="renew is off"):
        perpetune.protect(nn.Linear(4, 4)).renew()
    with pytest.raises(UsageError, match="renew is off"):
        ProtectionCallback(perpetune.protect(nn.Linear(4, 4)), renew=True)
    with pytest.raises(UsageError, match="needs strength: hard"):
        perpetune.protect(with_peft(), renew=True, strength="soft")
    with pytest.raises(UsageError, match="needs renew: true"):
        perpetune.protect(with_peft(), start="leading")
    leading = perpetune.protect(with_peft(), renew=True, start="leading")
    leading.consolidate([rows(0)])
    with pytest.raises(UsageError, match="needs a few batches"):
        leading.renew()


def test_a_head_that_is_trained_itself_stays_protected_as_ever() -> None:
    model = with_peft(modules_to_save=["second"], target_modules=["first"])
    protection = perpetune.protect(model, renew=True, energy=1.0)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    protection.guard(optimizer)
    steps(model, optimizer, 0)
    before = answers(model, 0)
    protection.consolidate([rows(0)])
    protection.renew()
    steps(model, optimizer, 1)
    assert moved(answers(model, 0), before) < 1e-9
    assert sum(w.pair is None for w in protection.sites) == 1


# -- at one layer -----------------------------------------------------------------------------------------


def test_in_float32_old_outputs_stay_while_b_moves_freely() -> None:
    """With weight decay, against the same steps with A not projected."""
    for how, held in ((RENEWED, True), (NEVER, False)):
        layer = Layer(torch.float32, **how)
        old: list[tuple[Tensor, Tensor]] = []
        for task in range(4):
            x = layer.inputs(task)
            layer.renew(task)
            layer.train(x, layer.targets(task, x), decay=0.1)
            if task:
                assert layer.pet.up[0].norm() > 0.5
            old.append((x, layer.outputs(x)))
            layer.consolidate(x)
        drift = max(moved(layer.outputs(x), before) for x, before in old[:-1])
        print(held, drift)
        assert drift < 1e-6 if held else drift > 0.1


def test_after_twenty_tasks_b_has_its_whole_rank() -> None:
    """What rests is never of more than the layer's rank, and is joined without a change of outputs."""
    layer = Layer(**RENEWED)
    seen: list[Tensor] = []
    for task in range(20):
        x = layer.inputs(task, rank=3, rows=40)
        before = [layer.outputs(old) for old in [*seen, x]]
        layer.renew(task)
        for old, was in zip([*seen, x], before, strict=True):
            assert moved(layer.outputs(old), was) < 1e-12
        layer.train(x, layer.targets(task, x), steps=40)
        certificate = layer.consolidate(x)
        (site,) = certificate["sites"]
        assert site["site"].endswith("/down")
        assert torch.linalg.matrix_rank(layer.pet.up[0].detach()) >= 3  # of the inputs; at rank 8 it is closed by then
        seen.append(x)
    assert layer.pet.rest_down is not None
    assert len(layer.pet.rest_down) <= DIM
    assert certificate["room"] == pytest.approx(1 - 60 / DIM)
    assert certificate["worst"] < 1e-7
    assert [p.shape for p in layer.pet.parameters()] == [(RANK, DIM), (DIM, RANK)]


def test_a_site_without_free_directions_rests_and_is_named() -> None:
    layer = Layer(dim=12, d_out=12, parts=((0, 12),), **RENEWED)
    x, new = layer.inputs(0, rank=12), layer.inputs(1, rank=12)
    layer.train(x, x @ drawn(12, 12))
    before = layer.outputs(new)
    assert layer.consolidate(x)["full"] == ["0/default/down"]
    layer.renew(1)
    layer.train(new, new @ drawn(12, 12, seed=5), decay=0.1)
    assert moved(layer.outputs(new), before) < 1e-12
    assert not layer.pet.down.any()


def test_leading_starts_lie_in_the_free_directions() -> None:
    """New inputs with fewer free directions than the rank: `eigh` fills up with vectors that lie in the closed ones."""
    old, new = drawn(50, 20) @ drawn(20, 32, seed=1), drawn(50, 3, seed=2) @ drawn(3, 32, seed=3)
    new = torch.cat([new, old[:20]])
    closed = Subspace(32)
    closed.extend(old.mT @ old, 1.0)
    moments = new.mT @ new
    given = kaiming(16, 32, generator("trap"))
    start = leading_start(given, closed, moments, 2, 1e-12)
    assert start is not None
    assert (start @ closed.basis).norm() < 1e-12 * start.norm()
    naive = torch.linalg.eigh(closed.remove(closed.remove(moments).mT))[1][:, -8:]
    assert (closed.basis.mT @ naive).norm() > 0.1
    first, second = start.split(8)
    torch.testing.assert_close(first[:3], second[:3])  # each part has the three leading ones
    assert torch.linalg.matrix_rank(first) == 8  # and random free directions for the rest
    torch.testing.assert_close(start.norm(), given.norm())
    within = closed.remove(new)
    assert ((within @ first[:3].mT @ torch.linalg.pinv(first[:3].mT)) - within).norm() < 1e-9 * within.norm()
    closed.extend(torch.eye(32, dtype=torch.float64), 1.0)
    assert leading_start(given, closed, moments, 2, 1e-12) is None
    assert random_start(given, closed) is None
    assert random_start(given, None) is given


@pytest.mark.parametrize("rest", [None, 5])
@pytest.mark.parametrize("energy", [0.7, 0.95])
def test_the_certificate_is_what_brute_force_finds(energy: float, rest: int | None) -> None:
    """Below energy 1, with two parts of different widths, and with what rests cut back: the change of the LoRA's own
    outputs on all old rows, of all tasks, relative to what they were."""
    layer = Layer(parts=((0, 20), (40, 64)), energy=energy, renew=True, rest=rest)
    base = layer.root[0].base.requires_grad_(False)
    old: list[tuple[Tensor, Tensor]] = []
    worst = 0.0
    for task in range(4):
        x = layer.inputs(task, rank=20)
        layer.renew(task)
        layer.train(x, layer.targets(task, x), steps=60)
        found = layer.consolidate(x)["sites"][0]
        change = sum(float((layer.outputs(rows) - base(rows) - was).square().sum()) for rows, was in old)
        output = sum(float(was.square().sum()) for _, was in old)
        if task:
            assert found["change"] == pytest.approx((change / sum(len(r) for r, _ in old)) ** 0.5, rel=1e-8)
            assert found["relative"] == pytest.approx((change / output) ** 0.5, rel=1e-8)
            worst = max(worst, found["relative"])
        old.append((x, layer.outputs(x) - base(x).detach()))
    assert worst > 0.01
    if rest is not None:
        assert layer.pet.rest_down is not None
        assert len(layer.pet.rest_down) == rest
    up, _ = layer.pet.whole()
    assert not up[20:40].any()


def test_the_cut_changes_old_outputs_least() -> None:
    """`‖(ΔW − ΔW_R) M^½‖`, counted in the certificate; a cut by the singular values of ΔW alone does worse."""
    layer = Layer(energy=0.9, renew=True, rest=3)
    x = layer.inputs(0, rank=40) * torch.logspace(0, -2, DIM, dtype=torch.float64)
    layer.train(x, layer.targets(0, x))
    before = layer.outputs(x)
    product = exact(layer.pet.product())
    whole, (b, a) = product[0] @ product[1], reduced(product, 3)
    layer.consolidate(x)
    layer.renew(1)
    error = (layer.outputs(x) - before).norm()
    kept = torch.linalg.svd(whole @ x.mT)[1][3:].norm()  # Eckart and Young
    torch.testing.assert_close(error, kept, rtol=1e-6, atol=0)
    assert (x @ (b @ a - whole).mT).norm() > 1.05 * error
    found = layer.protection.certificate()["sites"][0]
    assert found["change"] == pytest.approx(float(error) / len(x) ** 0.5, rel=1e-6)


# -- whole models -----------------------------------------------------------------------------------------

LORA = {"name": "lora", "rank": 8}


def three_tasks(family: str, how: dict[str, Any], head: str = "linear") -> tuple[list[float], list[float], Any]:
    """The worst move of final features of old pictures after each task, and how far B has come."""
    method = method_of(net_of(family), LORA, {"energy": 1.0, **how}, head=head)
    old: list[tuple[Task, Tensor]] = []
    moves, ups = [0.0], []
    for index, classes in enumerate(("ab", "cd", "ef")):
        task = task_of(index, classes, 1)
        learn_protected(method, task)
        moves += [moved(features(method, t), before) for t, before in old]
        old.append((task, features(method, task)))
        ups.append(max(float(u.norm()) for pet in pets(method, "default") for u in pet.up))
    return moves, ups, method


@pytest.mark.parametrize("family", ["timm", "transformers"])
def test_final_features_of_old_pictures_stay(family: str) -> None:
    """All directions of the old tokens closed, block after block; twenty of them, and B of rank 8."""
    moves, ups, method = three_tasks(family, {"renew": True})
    assert max(moves) < 1e-8
    assert ups[2] > 0.3 * ups[0]
    assert not method.protection.still
    found, *_ = three_tasks(family, {"renew": True, "directions": "none"})
    assert max(found) > 0.1
    closed, ups, _ = three_tasks(family, {})
    print("as today", ups)
    assert max(closed) < 1e-8


def test_the_first_task_is_plain_lora() -> None:
    """Bit for bit; there is nothing at rest, and the forward is the code it was."""
    kept = []
    for protect in (None, {"renew": True}):
        method = method_of(net_of("timm"), LORA, protect)
        learn_protected(method, task_of(0, "ab", 2))
        kept.append([p.clone() for p in parameters(method, "default")])
        assert not [name for name, _ in method.named_buffers() if "rest" in name]
    for one, other in zip(*kept, strict=True):
        assert torch.equal(one, other)


def test_renewed_at_the_first_task_over_reference_data() -> None:
    """Reference data are looked at once, and A starts in their free directions."""
    method = method_of(net_of("timm"), LORA, {"renew": True, "energy": 1.0})
    reference, task = task_of(5, "xy", 1), task_of(0, "ab", 1)
    before = features(method, reference)
    batches: Any = iter([reference])  # once
    method.protection.consolidate(batches, lambda t: method.observe(pixels_of(t)))
    assert torch.equal(features(method, reference), before)
    learn_protected(method, task)
    assert moved(features(method, reference), before) < 1e-8
    assert all(pet.rest_down is None for pet in pets(method, "default"))  # B was zero: there is nothing to rest


def test_the_export_has_the_whole_product(tmp_path: Path) -> None:
    """A net with PEFT's adapter of the joined rank, and one with the pet folded in, give the features of the state."""
    *_, method = three_tasks("timm", {"renew": True, "rest": 10}, head="ncm")
    x = pixels_of(task_of(2, "ef", 1)).double() / 255
    with using(method.model, "default"), torch.no_grad():
        wanted = method.model.backbone(x)
    write_peft(method.model.backbone, "default", tmp_path / "own")
    bare = net_of("timm")
    loaded = PeftModel.from_pretrained(bare.net, str(tmp_path / "own")).double()
    bare.net = loaded.base_model.model
    with torch.no_grad():
        assert moved(bare(x), wanted) < 1e-6  # the file is float32
    ranks = {len(pet.whole()[1]) for pet in pets(method, "default")}
    assert max(ranks) > 2 * LORA["rank"]
    other = net_of("timm")
    read_peft(other, tmp_path / "own", "read")
    with using(other.net, "read"), torch.no_grad():
        assert moved(other(x), wanted) < 1e-6
    fold(method.model.backbone.net, "default")
    with torch.no_grad():
        assert moved(method.model.backbone(x), wanted) < 1e-12


def test_sets_are_copied_with_what_rests() -> None:
    *_, method = three_tasks("timm", {"renew": True})
    task = task_of(1, "cd", 1)
    copy_set(method.model, "default", "twin")
    first = pets(method, "twin")[0]
    assert isinstance(first, LoRA)
    first.restart(generator("other"))
    copy_set(method.model, "default", "twin")  # into a set that has less at rest
    with using(method.model, "twin"), torch.no_grad():
        assert torch.equal(method.model.features(pixels_of(task)), features(method, task))


def test_a_language_model_fed_month_by_month(tmp_path: Path) -> None:
    """Three months; stored, loaded, and exported for PEFT."""
    model = tiny_language_model(tmp_path / "model")
    content = {
        "backbone": {"name": f"hf:{model}", "max_length": 64},
        "pet": {"name": "lora", "rank": 4},
        "head": {"name": "lm", "max_new_tokens": 4},
        "protect": {"renew": True, "start": "leading", "energy": 0.9},
        "train": {"epochs": 3, "batch_size": 4, "lr": 0.01},
        "run": {"device": "cpu"},
    }
    learner = perpetune.Learner(content, tmp_path / "state")
    for month in ("2026-10", "2026-11", "2026-12"):
        lines = [{"prompt": f"{month}: what is {i}?", "answer": str(i)} for i in range(8)]
        path = tmp_path / f"{month}.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        results = learner.learn(str(path))
    *_, last = results["protection"]
    assert last["worst"] is not None
    assert all(site["site"].endswith("down") for site in last["sites"])
    loaded = perpetune.Learner.load(tmp_path / "state")
    ranks = {len(pet.rest_down) for pet in pets(loaded.method, "default")}
    assert ranks == {8}
    for one, other in zip(loaded.method.state_dict().items(), learner.method.state_dict().items(), strict=True):
        assert one[0] == other[0]
        if isinstance(one[1], Tensor):
            assert torch.equal(one[1], other[1])


# -- in a Trainer -----------------------------------------------------------------------------------------


def tasks_in_a_row(
    folder: Path, *calls: TrainerCallback, resume: bool = False, start: str = "random", **how: Any
) -> tuple[nn.Module, DropIn, Tensor]:
    """Two tasks by one model, the second saved at each third step; the logits of the first task as it was learned."""
    model = tiny_gpt2()
    protection = perpetune.protect(model, renew=True, start=start, energy=0.999, **how)
    callback = ProtectionCallback(protection, renew=True)
    trainer(model, folder / "first", texts(0), callback).train()
    before = logits(model, texts(0))
    runs = trainer(model, folder, texts(8), callback, *calls, save_strategy="steps", save_steps=3, seed=1)
    runs.train(resume_from_checkpoint=resume)
    return model, protection, before


@pytest.mark.parametrize("start", chiefly(["random", "leading"], ["leading"]))
def test_two_tasks_in_a_trainer(start: str, tmp_path: Path) -> None:
    """The logits of the first task stay, those of the second are learned; and not with A free."""
    moves = {}
    for how in ({}, {"directions": "none"}):
        model, protection, before = tasks_in_a_row(tmp_path / str(len(how)), start=start, **how)
        moves[bool(how)] = moved(logits(model, texts(0)), before)
        assert protection.consolidated == 2
        assert protection.waiting
        assert len(protection.rests) == 3
    print(start, moves)
    assert moves[False] < 0.2 * moves[True]


def test_a_resumed_trainer_does_not_renew_again(tmp_path: Path) -> None:
    whole, its, _ = tasks_in_a_row(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tasks_in_a_row(tmp_path / "cut", StopsAt(4))
    # in a new process: the bare model, a new protection, and the checkpoint
    model = tiny_gpt2()
    protection = perpetune.protect(model, renew=True, energy=0.999)
    runs = trainer(
        model,
        tmp_path / "cut",
        texts(8),
        ProtectionCallback(protection),
        save_strategy="steps",
        save_steps=3,
        seed=1,
    )
    runs.train(resume_from_checkpoint=True)
    assert protection.consolidated == its.consolidated == 2
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    torch.testing.assert_close(logits(model, texts(0)), logits(whole, texts(0)))
    assert protection.report() == its.report()


def test_what_rests_acts_without_dropout() -> None:
    layer = Layer(**RENEWED)
    x = layer.inputs(0)
    layer.train(x, layer.targets(0, x))
    layer.consolidate(x)
    before = layer.outputs(x)
    layer.renew(1)
    layer.pet.dropout = 0.5
    assert moved(layer.outputs(x), before) < 1e-12
    layer.pet.train()
    assert moved(layer.outputs(x), before) < 1e-12  # B of the new pair is zero
    with torch.no_grad():
        layer.pet.up[0].fill_(1.0)
    assert moved(layer.outputs(layer.inputs(1)), layer.outputs(layer.inputs(1))) > 1e-3  # the new pair has it


def test_below_energy_1_a_free_b_moves_old_outputs_further() -> None:
    """Tasks that share a part of their inputs and want different answers for it: what docs/protect.md warns of."""
    moves = {}
    for renew in (False, True):
        layer = Layer(energy=0.99, renew=renew)
        old: list[tuple[Tensor, Tensor]] = []
        for task in range(4):
            x = 0.6 * layer.inputs(99, rank=10) + layer.inputs(task, rank=20)
            x = 3 * x * torch.logspace(0, -1.5, DIM, dtype=torch.float64)
            layer.renew(task)
            layer.train(x, layer.targets(task, x), lr=5e-3)
            old.append((x, layer.outputs(x)))
            layer.consolidate(x)
        bare = layer.root[0].base.requires_grad_(False)
        moves[renew] = max(float((layer.outputs(x) - was).norm() / (was - bare(x)).norm()) for x, was in old[:-1])
    print("moved, relative to what the LoRA gave:", moves)
    assert moves[True] > 1.5 * moves[False]
