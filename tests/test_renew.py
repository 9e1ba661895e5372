"""Renewed protected LoRA: the pair of each task rests and a new one starts where old features do not reach
(shared/design/features.md §6, and its toy). Brute force in float64, and a control that must fail for each claim."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import perpetune
from perpetune.errors import StateError, UsageError
from perpetune.integrations.transformers import ProtectionCallback
from perpetune.pets import Place, inject, using
from perpetune.pets.lora import LoRA
from perpetune.protection.config import ProtectConfig
from perpetune.protection.protection import Protection
from perpetune.protection.sites import pet_sites
from perpetune.seeding import generator, own_global_state

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
        sites, loose, _ = pet_sites(self.root, "exact", renew=config.renew)
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
        left, drift, certificates = through(layer, 8)
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


@pytest.mark.parametrize("start", ["random", "leading"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
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
    with pytest.raises(StateError, match="does not say what rests"):
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
    with pytest.raises(UsageError, match="no LoRA here to renew"):
        perpetune.protect(nn.Linear(4, 4), renew=True)
    with pytest.raises(UsageError, match="renew is off"):
        perpetune.protect(nn.Linear(4, 4)).renew()
    with pytest.raises(UsageError, match="renew is off"):
        ProtectionCallback(perpetune.protect(nn.Linear(4, 4)), renew=True)
    with pytest.raises(UsageError, match="needs strength: hard"):
        perpetune.protect(with_peft(), renew=True, strength="soft")
    with pytest.raises(UsageError, match="of renew: true"):
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
