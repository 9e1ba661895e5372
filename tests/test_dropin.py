"""Gradient projection in one's own loop: what is found, what a guard holds, what is kept and stored, how it fails."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import perpetune
from perpetune.errors import PerpetuneError, StateError, UsageError
from perpetune.models.towers import places
from perpetune.pets import inject, using
from perpetune.pets.lora import LoRA
from perpetune.protection.dropin import DropIn
from perpetune.protection.stored import DIGEST, METADATA, digest
from perpetune.seeding import generator, own_global_state


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=generator("dropin", seed), dtype=torch.float64)


def inputs(number: int, rows: int = 32, dim: int = 8, rank: int = 3) -> Tensor:
    """Rows in `rank` directions of their own."""
    return drawn(rows, rank, seed=2 * number) @ drawn(rank, dim, seed=2 * number + 1)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    with own_global_state("dropin"):
        return make()


def mlp() -> nn.Module:
    """Two wide layers, so that the features of a few inputs leave room everywhere."""
    return made(lambda: nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 4))).double()


class HandMade(nn.Module):
    """A frozen linear layer with a low-rank update beside it, whose `up` starts at zero."""

    def __init__(self, residual: bool = False):
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.down, self.up = nn.Linear(8, 4, bias=False), nn.Linear(4, 8 if not residual else 4, bias=False)
        self.out = nn.Linear(4, 8).requires_grad_(False) if residual else None
        self.dropout = nn.Dropout(0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(self.dropout(x))
        update = self.up(h) if self.out is None else self.out(h + self.up(h))
        return self.base(x) + update


class Dictionary(nn.Module):
    """A model that is called by keywords, as transformers' are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)

    def forward(self, *, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(input=x)


def tiny_gpt2(**lora: Any) -> nn.Module:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=8, initializer_range=0.2, **ends)
    settings = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_dropout": 0.5, **lora}
    return made(lambda: get_peft_model(GPT2LMHeadModel(config), LoraConfig(**settings)))


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 20) -> None:
    targets = drawn(len(x), model(x).shape[-1], seed=9).to(x)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), targets).backward()
        optimizer.step()


def moved(before: Tensor, after: Tensor) -> float:
    return float((after - before).detach().norm() / before.detach().norm())


def names(protection: DropIn) -> list[str]:
    return [w.name for w in protection.sites]


# -- what is found -------------------------------------------------------------------------------------


def test_every_trained_linear_layer_is_found_by_object() -> None:
    layers = {"a": nn.Linear(8, 8), "frozen": nn.Linear(8, 8).requires_grad_(False), "gpt2": Conv1D(8, 8)}
    model = nn.ModuleDict({**layers, "norm": nn.LayerNorm(8), "deep": nn.Sequential(nn.ReLU(), nn.Linear(8, 2))})
    protection = perpetune.protect(model)
    assert names(protection) == ["a/weight", "gpt2/weight", "deep.1/weight"]
    assert [w.site.operand.axis for w in protection.sites] == [1, 0, 1]
    assert protection.still == list(model["norm"].parameters())


def test_of_peft_the_matrices_are_found() -> None:
    protection = perpetune.protect(tiny_gpt2())
    assert [name.rsplit(".", 2)[1] for name in names(protection)] == ["lora_A", "lora_B"]


def test_pets_of_our_own_are_found(backbone: Any) -> None:
    inject(backbone.net, places(backbone.net, ("q",)), lambda p: LoRA(p, generator("p"), rank=2), "default")
    x = torch.rand(4, 3, 16, 16)
    protection = perpetune.protect(backbone)
    with using(backbone.net, "default"):
        protection.consolidate([x])
    assert {w.kind for w in protection.sites} == {"down", "up"}


def test_a_weight_that_another_module_has_too_is_no_site() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "out": nn.Linear(8, 8, bias=False), "free": nn.Linear(8, 2)})
    model["out"].weight = model["embed"].weight
    protection = perpetune.protect(model)
    assert names(protection) == ["free/weight"]
    assert protection.still == [model["embed"].weight]


@pytest.mark.parametrize("others", ["freeze", "leave"])
def test_other_parameters_are_kept_still_or_left(others: Any) -> None:
    model = made(lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))).double()
    protection, optimizer = perpetune.protect(model, others=others), adamw(model)
    protection.guard(optimizer)
    train(model, optimizer, inputs(1))
    assert model[0].bias.any()
    protection.consolidate([inputs(1)])
    before = model[0].bias.detach().clone()
    train(model, optimizer, inputs(2))
    assert torch.equal(model[0].bias, before) == (others == "freeze")


def test_what_is_skipped_moves_freely() -> None:
    model = mlp()
    protection, optimizer = perpetune.protect(model, skip=[model[2]]), adamw(model)
    protection.consolidate([inputs(1)])
    protection.guard(optimizer)
    hidden, out = model[:2](inputs(1)), model(inputs(1))
    train(model, optimizer, inputs(2))
    assert names(protection) == ["0/weight"]
    assert protection.still == []
    assert moved(hidden, model[:2](inputs(1))) < 0.3 * moved(out, model(inputs(1)))


@pytest.mark.parametrize("how", ["module", "list", "slice", "layers"])
def test_a_module_several_or_a_slice_may_be_skipped(how: str) -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = nn.ModuleDict({"layers": layers, "a": nn.Linear(8, 8)})
    skip = {"module": layers[1], "list": [layers[1]], "slice": layers[1:], "layers": layers}[how]
    left = [] if how == "layers" else ["layers.0/weight"]
    assert names(perpetune.protect(model, skip=skip)) == [*left, "a/weight"]


def test_a_model_that_is_one_layer_is_called_the_model() -> None:
    layer = nn.Linear(8, 4)
    protection = perpetune.protect(layer)
    assert names(protection) == ["the model/weight"]
    with pytest.raises(UsageError, match="only one of weight and bias of the model: give it both"):
        protection.guard(torch.optim.SGD([layer.weight], lr=0.1))
    with pytest.raises(PerpetuneError, match="protect: the model/weight saw no data"):
        protection.consolidate([])


# -- what a guard holds --------------------------------------------------------------------------------


def test_old_outputs_stay_as_they_are_and_without_protection_they_move() -> None:
    found = {}
    for protected in (True, False):
        model = mlp()
        protection, optimizer = perpetune.protect(model, energy=1.0), adamw(model)
        if protected:
            protection.guard(optimizer)
        train(model, optimizer, inputs(1, rows=6))
        before = model(inputs(1, rows=6))
        protection.consolidate([inputs(1, rows=6)])
        train(model, optimizer, inputs(2))
        found[protected] = moved(before, model(inputs(1, rows=6)))
    assert found[True] < 1e-12
    assert found[False] > 0.1


def test_a_guard_made_before_anything_was_protected_follows() -> None:
    model = mlp()
    protection, optimizer = perpetune.protect(model, energy=1.0), adamw(model)
    protection.guard(optimizer)
    for number in (1, 2, 3):
        x = inputs(number, rows=4)
        train(model, optimizer, x)
        protection.consolidate([x])
    first = model(inputs(1, rows=4))
    train(model, optimizer, inputs(4))
    assert moved(first, model(inputs(1, rows=4))) < 1e-12


def test_an_optimizer_is_guarded_once() -> None:
    model = mlp()
    protection, optimizer = perpetune.protect(model), adamw(model)
    protection.consolidate([inputs(1)])
    guard = protection.guard(optimizer)
    assert protection.guard(optimizer) is guard
    assert len(optimizer._optimizer_step_post_hooks) == 1
    protection.consolidate([inputs(2)])
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_a_removed_guard_stays_away() -> None:
    model = mlp()
    protection, optimizer = perpetune.protect(model), adamw(model)
    with protection.guard(optimizer):
        protection.consolidate([inputs(1)])
        assert optimizer._optimizer_step_post_hooks
    protection.consolidate([inputs(2)])
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_guard_does_not_keep_its_optimizer_alive() -> None:
    model = mlp()
    protection, optimizer = perpetune.protect(model), adamw(model)
    protection.guard(optimizer)
    protection.consolidate([inputs(1)])
    del optimizer
    gc.collect()
    assert not protection.guards
    protection.consolidate([inputs(2)])


@pytest.mark.usefixtures("no_state_left")
def test_wrappers_around_an_optimizer_are_seen_through() -> None:
    model = mlp()
    protection, optimizer = perpetune.protect(model), adamw(model)
    assert protection.guard(Accelerator(cpu=True).prepare(optimizer)) is protection.guard(optimizer)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    protection = perpetune.protect(mlp())
    with pytest.raises(UsageError, match="trains nothing that is protected"):
        protection.guard(adamw(mlp()))


def test_an_optimizer_of_weights_without_their_biases_is_refused() -> None:
    model = mlp()
    with pytest.raises(UsageError, match="only one of weight and bias of 0: give it both"):
        perpetune.protect(model).guard(torch.optim.SGD([model[0].weight], lr=0.1))


def test_two_optimizers_may_share_the_layers() -> None:
    model = mlp()
    protection = perpetune.protect(model, energy=1.0)
    pair = [torch.optim.AdamW(model[0].parameters()), torch.optim.SGD(model[2].parameters(), lr=0.1)]
    protection.consolidate([inputs(1, rows=4)])
    for optimizer in pair:
        protection.guard(optimizer)
    before = model(inputs(1, rows=4))
    for optimizer in pair:
        train(model, optimizer, inputs(2))
    assert moved(before, model(inputs(1, rows=4))) < 1e-12


def test_parameters_an_optimizer_is_given_later_are_guarded() -> None:
    model = mlp()
    protection = perpetune.protect(model, energy=1.0)
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.03)
    guard = protection.guard(optimizer)
    protection.consolidate([inputs(1, rows=4)])
    before, weight = model(inputs(1, rows=4)), model[2].weight.detach().clone()
    optimizer.add_param_group({"params": model[2].parameters()})
    train(model, optimizer, inputs(2))
    assert moved(before, model(inputs(1, rows=4))) < 1e-12
    assert moved(weight, model[2].weight) > 0.01
    guard.remove()
    train(model, optimizer, inputs(2))
    assert moved(before, model(inputs(1, rows=4))) > 0.01


@pytest.mark.parametrize("through", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_guards_nothing_and_leaves_the_original_guarded(through: Callable[[Any], Any]) -> None:
    model, protection = grown(energy=1.0)
    optimizer = adamw(model)
    protection.guard(optimizer)
    twin, its_own = through((model, protection))
    assert not its_own.guards
    assert its_own.report() == protection.report()
    for one, guarded, its in ((model, protection, optimizer), (twin, its_own, adamw(twin))):
        guarded.guard(its)
        guarded.consolidate([inputs(3, rows=2)])
        before = one(inputs(3, rows=2))
        train(one, its, inputs(4))
        assert moved(before, one(inputs(3, rows=2))) < 1e-12


def test_steps_of_a_gradient_scaler_are_projected_and_may_be_left_out() -> None:
    model, x = mlp().float(), inputs(2).float()
    protection, optimizer = perpetune.protect(model, energy=1.0), adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    protection.guard(optimizer)
    old = inputs(1, rows=4).float()
    protection.consolidate([old])
    before, weight = model(old), model[0].weight.detach().clone()
    for step in range(10):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x), torch.ones(32, 4)) * (float("inf") if step == 5 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert moved(before, model(old)) < 1e-5
    assert moved(weight, model[0].weight) > 0.01


@pytest.mark.parametrize("kind", ["step", "gradient"])
def test_a_closure_is_called_under_the_guard(kind: str) -> None:
    """Lightning hands one to every step."""
    model, x = mlp(), inputs(2)
    protection = perpetune.protect(model, energy=1.0, project=kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    protection.guard(optimizer)
    protection.consolidate([inputs(1, rows=4)])
    before = model(inputs(1, rows=4))

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), torch.ones(32, 4).double())
        loss.backward()
        return loss.item()

    for _ in range(10):
        optimizer.step(closure)
    assert moved(before, model(inputs(1, rows=4))) < 1e-10


# -- what is looked at ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict", "encoding"])
def test_batches_come_in_many_forms(form: str) -> None:
    model, x = made(Dictionary).double() if form in ("dict", "encoding") else mlp(), inputs(1)
    batch: Any = {"tensor": x, "tuple": (x, x[:, 0]), "list": [x, x[:, 0]]}.get(form, {"x": x, "labels": x})
    protection = perpetune.protect(model)
    protection.consolidate([BatchEncoding(batch) if form == "encoding" else batch])
    assert protection.of(protection.sites[0]).figures["count"] == len(x)


def test_another_forward_may_be_given() -> None:
    model, shown = mlp(), []
    perpetune.protect(model).consolidate([{"pixels": inputs(1)}], lambda b: shown.append(model(b["pixels"])))
    assert not shown[0].requires_grad


def test_padding_is_left_out() -> None:
    model, x = made(Dictionary).double(), drawn(4, 6, 8)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[:, 4:] = 0
    padded, cut = perpetune.protect(model), perpetune.protect(model)
    padded.consolidate([{"x": x, "attention_mask": mask}])
    cut.consolidate([{"x": x[:, :4]}])
    assert padded.of(padded.sites[0]).figures["count"] == 16
    torch.testing.assert_close(
        padded.state_dict()["memory.inner/weight.total"], cut.state_dict()["memory.inner/weight.total"]
    )


def test_a_mask_of_tokens_is_none_of_pooled_features() -> None:
    """As many tokens as the features are wide."""
    model, mask = made(Dictionary).double(), torch.ones(4, 8, dtype=torch.long)
    mask[:, 2:] = 0
    protection = perpetune.protect(model)
    protection.consolidate([{"x": drawn(4, 8), "attention_mask": mask}])
    assert protection.of(protection.sites[0]).figures["count"] == 4


@pytest.mark.parametrize(("length", "rows"), [(6, 8), (4, 8)])
def test_an_encoder_decoder_gets_its_labels(length: int, rows: int) -> None:
    """And where both sides are equally long, the encoder's mask is not taken for the decoder's."""
    sizes = {"vocab_size": 12, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = made(lambda: T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)))
    lora = LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
    protection = perpetune.protect(made(lambda: get_peft_model(model, lora)))
    ids, mask = torch.arange(2 * length).view(2, length) % 12, torch.ones(2, length, dtype=torch.long)
    mask[:, 2:] = 0
    protection.consolidate([{"input_ids": ids, "attention_mask": mask, "labels": torch.ones(2, 4, dtype=torch.long)}])
    counts = {w.name.split(".")[2]: protection.of(w).figures["count"] for w in protection.sites}
    assert counts == {"encoder": 4 if length == 6 else rows, "decoder": rows}


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "uneven"])
def test_only_so_many_examples_are_looked_at(form: str) -> None:
    """The batch they end in is cut, but where it is not known how."""
    model = made(Dictionary).double() if form == "dict" else mlp()
    protection = perpetune.protect(model, samples=20)
    batches: list[Any] = list(inputs(1, rows=100).split(8))
    if form == "dict":
        batches = [{"x": x, "attention_mask": torch.ones(len(x), 8)} for x in batches]
    elif form in ("tuple", "uneven"):
        batches = [(x, x[:, 0] if form == "tuple" else x[:1]) for x in batches]
    protection.consolidate(batches)
    assert protection.of(protection.sites[0]).figures["count"] == (24 if form == "uneven" else 20)


def test_every_module_gets_its_mode_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(0.5), mlp(), nn.Dropout(0.5).eval())
    modes = [m.training for m in model.modules()]
    protection = perpetune.protect(model)
    seen: list[bool] = []
    protection.consolidate([inputs(1)], lambda x: (seen.append(any(m.training for m in model.modules())), model(x)))
    assert seen == [False]
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(PerpetuneError, match="saw no data"):
        protection.consolidate([])
    assert [m.training for m in model.modules()] == modes


def test_an_iterator_will_do_where_one_pass_is_enough() -> None:
    protection = perpetune.protect(mlp())
    protection.consolidate(x for x in inputs(1).split(8))
    assert protection.of(protection.sites[0]).figures["count"] == 32


# -- before the first task -----------------------------------------------------------------------------


def test_where_data_are_looked_at_twice_an_iterator_is_refused() -> None:
    model = made(HandMade).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="give a list or a loader, not an iterator"):
        perpetune.protect(model).consolidate(iter([inputs(1)]))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_update_made_by_hand_starts_in_the_free_directions_and_keeps_its_room() -> None:
    model, x = made(HandMade).double(), inputs(1)
    size, before = model.down.weight.norm(), model.eval()(x)
    protection = perpetune.protect(model.train(), energy=1.0)
    protection.consolidate([x])
    assert torch.equal(model.eval()(x), before)  # what follows was zero
    assert not model.down(x).detach().abs().gt(1e-10).any()
    torch.testing.assert_close(model.down.weight.norm(), size)
    assert [protection.of(w).rank for w in protection.sites] == [3, 0]
    optimizer = adamw(model)
    protection.guard(optimizer)
    train(model, optimizer, inputs(2))
    assert moved(before, model(x)) < 1e-12
    assert model.up.weight.any()


def test_of_peft_too_with_dropout_between() -> None:
    model, ids = tiny_gpt2(), torch.arange(4).repeat(2, 2)
    before = model.eval()(ids).logits
    protection, optimizer = perpetune.protect(model.train(), energy=1 - 1e-9), adamw(model)
    protection.guard(optimizer)
    protection.consolidate([ids])
    first, second = protection.sites
    assert torch.equal(model.eval()(ids).logits, before)
    assert 0 < protection.of(first).rank < 16
    assert protection.of(second).rank == 0
    for _ in range(20):
        other = torch.arange(8, 16).repeat(2, 1)
        model.train()(other, labels=other).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert moved(before, model.eval()(ids).logits) < 1e-3
    assert first.module.weight.dtype == torch.float32


def test_with_less_energy_what_follows_keeps_its_room_too() -> None:
    """The rest that the moved matrix lets through is not taken for the whole."""
    model = made(HandMade).double()
    x = drawn(64, 8) * torch.tensor([3.0, 2, 2, 1, 0.2, 0.2, 0.1, 0.1])
    protection = perpetune.protect(model, energy=0.95)
    protection.consolidate([x])
    assert [protection.of(w).rank for w in protection.sites][1] <= 1


def test_a_layer_whose_output_is_used_elsewhere_is_not_moved() -> None:
    model, x = made(lambda: HandMade(residual=True)).double().eval(), inputs(1)
    down, before = model.down.weight.clone(), model(x)
    perpetune.protect(model).consolidate([x])
    assert torch.equal(model.down.weight, down)
    assert torch.equal(model(x), before)


def test_an_error_in_the_second_look_takes_the_move_back() -> None:
    model, calls = made(HandMade).double(), []

    def stops(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return model(x)

    down, protection = model.down.weight.clone(), perpetune.protect(model)
    with pytest.raises(KeyboardInterrupt):
        protection.consolidate([inputs(1)], stops)
    assert torch.equal(model.down.weight, down)
    assert protection.consolidated == 0


def test_no_room_at_all_is_said_before_anything_is_learned() -> None:
    with pytest.raises(PerpetuneError, match=r"these data leave no free direction at down/weight"):
        perpetune.protect(made(HandMade).double(), energy=1.0).consolidate([drawn(64, 8)])


# -- the certificate -----------------------------------------------------------------------------------


def test_the_report_is_what_old_data_show() -> None:
    model = mlp()
    protection, optimizer = perpetune.protect(model, energy=0.9), adamw(model)
    protection.guard(optimizer)
    protection.consolidate([inputs(1)])
    before = model[0](inputs(1))
    train(model, optimizer, inputs(2))
    report = protection.report()
    first = report["sites"][0]
    assert first["relative"] == pytest.approx(moved(before, model[0](inputs(1))), rel=1e-6)
    assert report["worst"] >= report["median"] > 0
    assert report["consolidated"] == 1
    assert 0 < report["room"] < 1


def test_it_says_itself_in_a_line() -> None:
    protection = perpetune.protect(mlp())
    assert str(protection) == "protection of 2 sites: nothing is protected yet"
    protection.consolidate([inputs(1)])
    assert str(protection).startswith("protection of 2 sites, consolidated 1 times: ")
    assert "\n" not in str(protection)


@pytest.mark.parametrize("options", [{"directions": "none"}, {"energy": 0.0}])
def test_it_says_so_where_nothing_is_closed(options: dict[str, Any]) -> None:
    protection = perpetune.protect(nn.Sequential(mlp(), nn.LayerNorm(4).double()), **options)
    protection.consolidate([drawn(64, 8)])
    assert str(protection).endswith("; nothing is kept from moving")


def test_values_that_are_not_finite_are_said_in_its_line() -> None:
    model, protection = grown()
    model[0].weight.data.fill_(float("nan"))
    assert str(protection).startswith(
        "protection of 2 sites, consolidated 2 times: the values of 0/weight are not finite"
    )


# -- state ---------------------------------------------------------------------------------------------


def grown(**options: Any) -> tuple[nn.Module, DropIn]:
    model = mlp()
    protection = perpetune.protect(model, **options)
    for number in (1, 2):
        protection.consolidate([inputs(number, rank=2)])
    return model, protection


@pytest.mark.parametrize("strength", ["hard", "soft"])
@pytest.mark.parametrize("through", ["torch", "file", "parent"])
def test_the_state_comes_back_whole(through: str, strength: str, tmp_path: Path) -> None:
    model, protection = grown(strength=strength)
    other = perpetune.protect(model, strength=strength)
    if through == "file":
        protection.save(tmp_path / "protection.safetensors")
        other.load(tmp_path / "protection.safetensors")
        assert [p.name for p in tmp_path.iterdir()] == ["protection.safetensors"]
    elif through == "torch":
        file = io.BytesIO()
        torch.save(protection.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:  # as part of a LightningModule
        nn.ModuleDict({"part": other}).load_state_dict(nn.ModuleDict({"part": protection}).state_dict())
    assert other.report() == protection.report()
    for mine, theirs in zip(protection.closed()[0], other.closed()[0], strict=True):
        for a, b in zip(mine[1], theirs[1], strict=True):
            assert torch.equal(a.vectors, b.vectors)
            assert torch.equal(a.importance, b.importance)
    protection.consolidate([inputs(3)])
    other.consolidate([inputs(3)])
    assert other.report() == protection.report()


@pytest.mark.parametrize("through", ["itself", "parent"])
def test_a_loaded_state_holds_for_guards_made_before(through: str) -> None:
    model, protection = grown(energy=1.0)
    other, optimizer = perpetune.protect(model), adamw(model)
    other.guard(optimizer)
    if through == "itself":
        other.load_state_dict(protection.state_dict())
    else:  # as Lightning does, after configure_optimizers
        nn.ModuleDict({"part": other}).load_state_dict(nn.ModuleDict({"part": protection}).state_dict())
    before = model(inputs(1, rank=2))
    train(model, optimizer, inputs(3))
    assert moved(before, model(inputs(1, rank=2))) < 0.5
    assert optimizer._optimizer_step_post_hooks


def spoiled(state: dict[str, Any], how: str) -> dict[str, Any]:
    state = copy.deepcopy(state)
    if how == "missing":
        state = {name: value for name, value in state.items() if "2/weight" not in name}
    elif how == "unexpected":
        state["memory.9/weight.total"] = torch.zeros(1)
    elif how == "shape":
        state["memory.0/weight._extra_state"]["shape"] = [1, 3, 3]
    elif how == "cut":
        state["memory.0/weight.vectors"] = state["memory.0/weight.vectors"][:, :1]
    elif how == "nan":
        state["memory.0/weight.cross"][0, 0, 0] = float("nan")
    elif how == "forms":
        del state["memory.0/weight._extra_state"]["forms"]
    else:
        state["_extra_state"] = None
    return state


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "has nothing for 2/weight"),
        ("unexpected", r"has memory.9/weight.total, but the model has no such site"),
        ("shape", r"0/weight: the state has shape \(1, 3, 3\), the model \(1, 24, 9\)"),
        ("cut", r"0/weight: vectors is"),
        ("nan", "0/weight: it has values that are not finite"),
        ("forms", "it lacks its shape, forms or figures"),
        ("none", "has no count of consolidated data"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(how: str, says: str) -> None:
    model, protection = grown()
    other = perpetune.protect(model)
    other.consolidate([inputs(5)])
    before = copy.deepcopy(other.state_dict())
    state = spoiled(protection.state_dict(), how)
    with pytest.raises(StateError, match=says) as error:
        other.load_state_dict(state)
    assert "\n" not in str(error.value)
    with pytest.raises(StateError, match=says):
        nn.ModuleDict({"part": other}).load_state_dict({f"part.{name}": value for name, value in state.items()})
    after = other.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]


def test_a_state_of_others_that_knows_no_protection_may_be_loaded() -> None:
    model, protection = grown()
    whole = nn.ModuleDict({"model": model, "part": protection})
    whole.load_state_dict({f"model.{name}": value for name, value in model.state_dict().items()}, strict=False)
    assert protection.consolidated == 2


def test_a_soft_state_does_not_fit_a_hard_protection() -> None:
    with pytest.raises(StateError, match="one strength is hard and the other soft"):
        grown()[1].load_state_dict(grown(strength="soft")[1].state_dict())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_file_that_is_no_protection_gives_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StateError, match="cannot be read as a protection") as error:
        perpetune.protect(mlp()).load(path)
    assert "\n" not in str(error.value)


def test_a_file_of_other_tensors_is_no_protection(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(StateError, match="not written by a protection"):
        perpetune.protect(mlp()).load(tmp_path / "a.safetensors")


def test_every_byte_of_a_file_counts(tmp_path: Path) -> None:
    _, protection = grown()
    path = tmp_path / "p.safetensors"
    protection.save(path)
    content, before = path.read_bytes(), protection.report()
    for place in (3, 40, len(content) // 3, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(StateError, match="cannot be read as a protection") as error:
            protection.load(path)
        assert "\n" not in str(error.value)
    path.write_bytes(content)
    protection.load(path)
    assert protection.report() == before


@pytest.mark.parametrize("rest", ["[]", "3", "null", "[", '{"_extra_state": {"consolidated": true}}', None])
@pytest.mark.parametrize("sealed", [True, False])
def test_metadata_of_another_kind_give_one_line(rest: str | None, sealed: bool, tmp_path: Path) -> None:
    _, protection = grown()
    path = tmp_path / "p.safetensors"
    protection.save(path)
    tensors = load_file(path)
    if rest is not None and rest.startswith("{"):
        with safe_open(path, framework="pt") as file:
            rest = json.dumps({**json.loads(file.metadata()[METADATA]), **json.loads(rest)})
    metadata = {METADATA: rest} if rest is not None else {}
    save_file(tensors, path, {**metadata, DIGEST: digest(rest or "", tensors)} if sealed else metadata or None)
    with pytest.raises(StateError) as error:
        protection.load(path)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_written_gives_one_line(tmp_path: Path) -> None:
    _, protection = grown()
    with pytest.raises(PerpetuneError, match=r"none/p cannot be written \(No such file or directory\): name a file in"):
        protection.save(tmp_path / "none" / "p")
    assert not list(tmp_path.iterdir())


# -- how it fails --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_coarse_parameters_is_said(dtype: torch.dtype) -> None:
    with pytest.warns(
        UserWarning, match=r"2 of 2 sites are trained in torch\.\w+16 .* keep trained parameters in float32"
    ):
        perpetune.protect(mlp().to(dtype))


def test_float32_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perpetune.protect(mlp().float())


def test_a_full_site_is_said_and_stays_as_it_is() -> None:
    model = mlp()
    protection, optimizer = perpetune.protect(model, energy=1.0), adamw(model)
    protection.guard(optimizer)
    with pytest.warns(
        UserWarning, match=r"1 of 2 sites have no free direction left and do not change from now on \(0/weight\)"
    ):
        protection.consolidate([drawn(20, 8, scale=0.3)])
    weight = model[0].weight.detach().clone()
    train(model, optimizer, inputs(2))
    torch.testing.assert_close(model[0].weight.detach(), weight, rtol=0, atol=1e-12)
    assert protection.report()["full"] == ["0/weight"]
    with warnings.catch_warnings():  # it is said once
        warnings.simplefilter("error")
        protection.consolidate([drawn(20, 8, scale=0.3)])


@pytest.mark.parametrize(
    "options", [{"directions": "none"}, {"directions": "random"}, {"strength": "soft"}, {"sites": ["weight"]}]
)
def test_only_what_is_closed_is_said_to_be_full(options: dict[str, Any]) -> None:
    protection = perpetune.protect(mlp(), energy=1.0, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        protection.consolidate([drawn(64, 8)])
    assert len(said) == ("sites" in options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_add_nothing(bad: float) -> None:
    _, protection = grown()
    before, x = copy.deepcopy(protection.state_dict()), inputs(3)
    x[0, 0] = bad
    with pytest.raises(PerpetuneError, match="features at 0/weight are not finite, so nothing was added"):
        protection.consolidate([inputs(4), x])
    after = protection.state_dict()
    assert all(torch.equal(v, after[name]) for name, v in before.items() if isinstance(v, Tensor))


def test_a_layer_that_is_not_called_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 4), "unused": nn.Linear(8, 4)})
    protection = perpetune.protect(model)
    with pytest.raises(PerpetuneError, match="unused/weight saw no data"):
        protection.consolidate([torch.rand(4, 8)], model["used"])
    assert protection.consolidated == 0


def test_a_layer_that_grew_is_named() -> None:
    model, protection = grown()
    optimizer = adamw(model)
    model[2].weight.data = torch.zeros(6, 24, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"2/weight has shape \(1, 6, \d+\) now and had \(1, 4, 25\)"):
        protection.guard(optimizer)


def test_a_weight_that_was_replaced_is_named() -> None:
    model, protection = grown()
    model[2].weight = nn.Parameter(torch.zeros(6, 24, dtype=torch.float64))
    with pytest.raises(UsageError, match="the weight of 2/weight was replaced"):
        protection.consolidate([inputs(3)])


def test_dora_is_refused() -> None:
    with pytest.raises(UsageError, match=r"is DoRA, .* use plain LoRA"):
        perpetune.protect(tiny_gpt2(use_dora=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"energi": 1}, "no option 'energi'; closest: energy"),
        ({"energy": 2}, "energy is 2"),
        ({"strength": "firm"}, "strength is 'firm'"),
        ({"reference": {"path": "x"}}, r"call consolidate\(batches\) before the first task"),
        ({"others": "drop"}, "others is 'drop'; freeze or leave"),
        ({"skip": [nn.Linear(1, 1)]}, "skip names a module that is not in the model"),
        ({"skip": nn.Linear(1, 1)}, "skip names a module that is not in the model"),
        ({"skip": ["0"]}, "skip holds '0'; modules are expected, such as model.head"),
    ],
)
def test_options_that_make_no_sense_give_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        perpetune.protect(mlp(), **options)
    assert "\n" not in str(error.value)


def test_a_model_without_a_trained_linear_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing can be protected"):
        perpetune.protect(nn.Sequential(nn.LayerNorm(4)))


@pytest.fixture
def backbone() -> Any:
    from perpetune.check import tiny_backbone

    return tiny_backbone()


@pytest.fixture
def no_state_left() -> Any:
    """Accelerate keeps its state once per process; the next test starts without it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
