"""A choice of pets for each example: what one pass gives is what a pass for each group of examples gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_pets_attention import DIM, NETS, SIDE
from tiny import tiny_language_model
from torch import Tensor, nn

from perpetune.build import load_backbone
from perpetune.errors import UsageError
from perpetune.models.towers import places
from perpetune.pets import PET, Choice, InForce, Place, blendable, inject, parameters, pets, submodule, using
from perpetune.pets.adapter import Adapter
from perpetune.pets.lora import LoRA
from perpetune.pets.prefix import Prefix
from perpetune.pets.prompt import Prompt
from perpetune.pets.ssf import SSF
from perpetune.protection.sites import Watch, pet_sites
from perpetune.seeding import generator, own_global_state

MEMBERS = ("m0", "m1", "m2", "m3", "m4")
EVERY = ("q", "k", "v", "proj", "fc1", "fc2")
KINDS: dict[str, tuple[type[Any], Sequence[str], dict[str, Any]]] = {
    "lora": (LoRA, ("q", "v"), {"rank": 2}),
    "lora everywhere": (LoRA, EVERY, {"rank": 3}),
    "adapter": (Adapter, ("mlp",), {"width": 5}),
    "adapter without bias": (Adapter, ("attn", "mlp"), {"width": 5, "bias": False, "activation": "relu"}),
    "prefix": (Prefix, ("attn",), {"length": 3}),
    "prompt": (Prompt, ("attn",), {"length": 3}),
    "shallow prompt": (Prompt, ("block",), {"length": 3, "deep": False}),
    "ssf": (SSF, ("operations",), {"std": 0.1}),
}
INDEX = torch.tensor([[0], [3], [1], [3], [0], [4], [1], [0]])
PIXELS = torch.randn(len(INDEX), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def net_with(
    kind: str, of: str = "timm vit", dtype: torch.dtype = torch.float64, names: Sequence[str] = MEMBERS
) -> Any:
    """A net that carries sets of pets of one kind, whose values are all drawn."""
    with own_global_state("choice", of):
        net = NETS[of]().to(dtype).eval()
    add(net, kind, MEMBERS, dtype)
    return net.requires_grad_(False)


def add(net: nn.Module, kind: str, names: Sequence[str], dtype: torch.dtype, blocks: list[int] | None = None) -> None:
    pet, at, options = KINDS[kind]
    for name in names:
        rng = generator("choice", kind, name)
        inject(net, places(net, at, blocks), lambda place: pet(place, rng, **options), name)  # noqa: B023
        for p in parameters(net, name):
            p.data = torch.randn(p.shape, generator=rng, dtype=torch.float64).to(dtype) * 0.3


def out(net: nn.Module, x: Tensor, wanted: InForce) -> Tensor:
    with using(net, wanted):
        y = net(pixel_values=x).last_hidden_state if "hf" in type(net).__module__ or hasattr(net, "config") else net(x)
    return y if y.dim() == 2 else y[:, 0]


def grouped(net: nn.Module, x: Tensor, index: Tensor, names: Sequence[str] = MEMBERS) -> Tensor:
    """Each example alone with its own set in force."""
    return torch.cat([out(net, x[i : i + 1], names[int(m)]) for i, m in enumerate(index[:, 0])])


# -- one pass is as many ----------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["timm vit", "hf vit", "timm eva rope gqa", "timm vit qk-norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_gives_what_a_pass_for_each_example_gives(kind: str, of: str) -> None:
    """Outputs and gradients, with fused and separate projections, rotary positions and grouped queries."""
    if kind == "shallow prompt" and of == "timm eva rope gqa":
        pytest.skip("carried tokens have no place among rotary positions")
    net, x = net_with(kind, of), PIXELS.double()
    trained = [p for name in MEMBERS for p in parameters(net, name)]
    for p in trained:
        p.requires_grad_(True)
    mixed, apart = out(net, x, Choice(MEMBERS, INDEX)), grouped(net, x, INDEX)
    torch.testing.assert_close(mixed, apart, rtol=1e-12, atol=1e-12)
    weight = torch.randn(mixed.shape, generator=generator("loss"), dtype=torch.float64)
    found = torch.autograd.grad((mixed * weight).sum(), trained, allow_unused=True)
    wanted = torch.autograd.grad((apart * weight).sum(), trained, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    rolled = out(net, x, Choice(MEMBERS, INDEX.roll(1, 0)))
    assert float((rolled - mixed).abs().max()) > 1e-5, "another choice has to give something else"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_in_other_precisions(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    net = net_with(kind, dtype=torch.float32)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.no_grad():
        mixed, apart = out(net, PIXELS, Choice(MEMBERS, INDEX)), grouped(net, PIXELS, INDEX)
    scale = float(apart.float().abs().max())
    torch.testing.assert_close(mixed.float(), apart.float(), rtol=0, atol=tolerance * max(scale, 1.0))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_companions_and_their_order_do_not_matter(kind: str) -> None:
    net, order = net_with(kind), torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    x = PIXELS.double()
    whole = out(net, x, Choice(MEMBERS, INDEX))
    again = out(net, x[order], Choice(MEMBERS, INDEX[order]))
    torch.testing.assert_close(again, whole[order], rtol=1e-12, atol=1e-12)
    some = out(net, x[:3], Choice(MEMBERS, INDEX[:3]))
    torch.testing.assert_close(some, whole[:3], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_keys_go_to_keys_and_values_to_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Member m has keys m and values 100 + m; released code of DualPrompt mixes them up from two examples on."""
    net, caught = net_with("prefix"), []
    for number, name in enumerate(MEMBERS):
        for pet in pets(net, name):
            assert isinstance(pet, Prefix)
            pet.keys.fill_(number)
            pet.values.fill_(100 + number)
    attend = nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        caught.append((key[:, :, :3], value[:, :, :3]))
        return attend(query, key, value, **rest)

    monkeypatch.setattr("perpetune.pets.attention._Call.attend", lambda call: watched(**call._asdict()))
    out(net, PIXELS.double(), Choice(MEMBERS, INDEX))
    assert len(caught) == 2
    for key, value in caught:
        assert torch.equal(key, INDEX[:, 0].double()[:, None, None, None].expand_as(key))
        assert torch.equal(value, 100 + INDEX[:, 0].double()[:, None, None, None].expand_as(value))
    b = len(INDEX)
    stacked = torch.stack([INDEX[:, 0], 100 + INDEX[:, 0]])  # (2, B): keys, values
    reshaped = stacked.reshape(b, 2)  # what the released code takes for (B, 2)
    assert not torch.equal(reshaped[:, 0], INDEX[:, 0]), "the control has to fail"


@torch.no_grad()
def test_one_distinct_member_is_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_with("lora", dtype=torch.float32)
    plain = out(net, PIXELS, "m3")
    monkeypatch.setattr(LoRA, "mixed", lambda *_, **__: pytest.fail("the mixed path ran"))
    assert torch.equal(out(net, PIXELS, Choice(MEMBERS, torch.full((len(INDEX), 1), 3))), plain)


def test_only_members_that_were_chosen_are_trained() -> None:
    net = net_with("lora", dtype=torch.float32)
    every = {name: parameters(net, name) for name in MEMBERS}
    trained = [p for group in every.values() for p in group]
    for p in trained:
        p.requires_grad_(True)
    before = {name: [p.detach().clone() for p in group] for name, group in every.items()}
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        out(net, PIXELS, Choice(MEMBERS, INDEX)).square().sum().backward()
        optimizer.step()
    for name, group in every.items():
        same = all(torch.equal(p, b) for p, b in zip(group, before[name], strict=True))
        assert same == (name == "m2"), "m2 is the one that no example chose"


# -- several members for one example ----------------------------------------------------------------------

TWO = torch.tensor([[0, 1], [3, 2], [1, 4], [3, 0], [0, 2], [4, 1], [1, 2], [0, 4]])


@pytest.mark.parametrize("kind", ["lora", "lora everywhere", "adapter"])
@torch.no_grad()
def test_the_sum_of_several_is_both_in_force(kind: str) -> None:
    net, x = net_with(kind), PIXELS.double()
    both = torch.cat([out(net, x[i : i + 1], [MEMBERS[a], MEMBERS[b]]) for i, (a, b) in enumerate(TWO.tolist())])
    torch.testing.assert_close(out(net, x, Choice(MEMBERS, TWO)), both, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "shallow prompt"])
@torch.no_grad()
def test_tokens_beside_one_another_are_one_longer_set(kind: str) -> None:
    """And their order does not matter, as attention has none."""
    pet, at, options = KINDS[kind]
    net, x = net_with(kind), PIXELS.double()
    found = out(net, x, Choice(MEMBERS, TWO, join="beside"))
    for i, (a, b) in enumerate(TWO.tolist()):
        alone = copy.deepcopy(net)
        rng = generator("joined")
        long = {**options, "length": 6}
        inject(alone, places(alone, at), lambda place: pet(place, rng, **long), "joined")  # noqa: B023
        for joined, one, other in zip(*(pets(alone, n) for n in ("joined", MEMBERS[a], MEMBERS[b])), strict=True):
            for whole, first, second in zip(joined.parameters(), one.parameters(), other.parameters(), strict=True):
                whole.data = torch.cat([first, second])
        torch.testing.assert_close(out(alone, x[i : i + 1], "joined")[0], found[i], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_weight_is_a_factor_on_what_a_member_adds(kind: str) -> None:
    net, x = net_with(kind), PIXELS.double()
    weight = torch.linspace(-1, 2, len(INDEX), dtype=torch.float64)[:, None]
    found = out(net, x, Choice(MEMBERS, INDEX, weight))
    for i in range(len(INDEX)):
        alone = copy.deepcopy(net)
        for one in pets(alone, MEMBERS[int(INDEX[i, 0])]):
            for name, p in one.named_parameters():
                if name not in ("down", "down_bias"):
                    p.mul_(float(weight[i]))
        wanted = out(alone, x[i : i + 1], MEMBERS[int(INDEX[i, 0])])
        torch.testing.assert_close(wanted[0], found[i], rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_a_set_for_all_goes_beside_a_choice() -> None:
    """DualPrompt: a shared prefix in the first block, one for each example in the second."""
    with own_global_state("choice", "beside"):
        net = NETS["timm vit"]().double().eval()
    add(net, "prefix", ["shared"], torch.float64, [0])
    add(net, "prefix", MEMBERS, torch.float64, [1])
    x = PIXELS.double()
    found = out(net, x, ["shared", Choice(MEMBERS, INDEX)])
    wanted = torch.cat([out(net, x[i : i + 1], ["shared", MEMBERS[int(m)]]) for i, m in enumerate(INDEX[:, 0])])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, out(net, x, Choice(MEMBERS, INDEX)))


@torch.no_grad()
def test_a_renewed_lora_brings_what_rests_along() -> None:
    net, x = net_with("lora everywhere"), PIXELS.double()
    for name in MEMBERS:
        for pet in pets(net, name):
            assert isinstance(pet, LoRA)
            pet.renew(torch.randn(pet.down.shape, generator=generator("renew", name), dtype=torch.float64))
            for up in pet.up:
                up.copy_(torch.randn(up.shape, generator=generator("up", name), dtype=torch.float64))
    torch.testing.assert_close(out(net, x, Choice(MEMBERS, INDEX)), grouped(net, x, INDEX), rtol=1e-11, atol=1e-11)


# -- texts, windows, checkpoints of activations -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_language_models_too(kind: str, checkpointing: bool, tmp_path: Any) -> None:
    """OPT takes the tokens of all texts as one batch in its MLP; blocks that are computed again keep the choice."""
    folder = tiny_language_model(tmp_path / kind, kind)
    backbone = load_backbone(f"hf:{folder}", gradient_checkpointing=checkpointing)
    net = backbone.net.double()
    add(net, "lora everywhere" if kind != "gpt2" else "lora", MEMBERS, torch.float64)
    for p in net.parameters():
        p.requires_grad_(False)
    trained = [p for name in MEMBERS for p in parameters(net, name)]
    for p in trained:
        p.requires_grad_(True)
    net.train(checkpointing)
    ids = torch.randint(3, 300, (len(INDEX), 7), generator=generator("ids"))

    def logits(rows: Tensor, wanted: InForce) -> Tensor:
        with using(net, wanted):
            found: Tensor = net(input_ids=rows).logits
            return found

    mixed = logits(ids, Choice(MEMBERS, INDEX))
    apart = torch.cat([logits(ids[i : i + 1], MEMBERS[int(m)]) for i, m in enumerate(INDEX[:, 0])])
    torch.testing.assert_close(mixed, apart, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(mixed.square().sum(), trained, allow_unused=True)
    wanted = torch.autograd.grad(apart.square().sum(), trained, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_windows_of_a_picture_have_the_pets_of_that_picture() -> None:
    from timm.models.swin_transformer import SwinTransformer

    with own_global_state("choice", "swin"):
        net = SwinTransformer(
            img_size=32, patch_size=4, window_size=4, embed_dim=DIM, depths=(2,), num_heads=(2,), num_classes=0
        )
    net = net.double().eval()
    linear = [("layers.0.blocks.0.attn.qkv", "q"), ("layers.0.blocks.1.mlp.fc1", "fc1")]
    for name in MEMBERS:
        rng = generator("swin", name)
        for path, role in linear:
            module: Any = submodule(net, path)
            place = Place(
                path, module, (role,), ((0, module.out_features),), 0, module.in_features, module.out_features
            )
            inject(net, [place], lambda p: LoRA(p, rng, rank=2), f"{name}")  # noqa: B023
        for p in parameters(net, name):
            p.data = torch.randn(p.shape, generator=rng, dtype=torch.float64) * 0.3
    x = torch.randn(len(INDEX), 3, 32, 32, generator=generator("x"), dtype=torch.float64)
    torch.testing.assert_close(out(net, x, Choice(MEMBERS, INDEX)), grouped(net, x, INDEX), rtol=1e-11, atol=1e-11)


# -- protection sees each member's own examples -----------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("ssf", "shallow prompt")])
@pytest.mark.parametrize("join", ["one", "two"])
@torch.no_grad()
def test_a_member_is_shown_the_rows_of_its_own_examples(kind: str, join: str) -> None:
    """As if its examples had gone through alone; of two members beside one another each has its own columns."""
    net, x = net_with(kind), PIXELS.double()
    index = INDEX if join == "one" else TWO
    choice = Choice(MEMBERS, index, join="beside")
    sites, _, _ = pet_sites(net, "exact", sometimes=MEMBERS)
    with Watch(sites).on() as watch:
        out(net, x, choice)
    mixed = {name: (m.count, m.matrix) for name, m in watch.moments.items()}
    apart = Watch(sites)
    for i in range(len(index)):
        with apart.on():
            out(net, x[i : i + 1], Choice(MEMBERS, index[i : i + 1], join="beside"))
    assert {name.split("/")[-2] for name in mixed} == {MEMBERS[i] for i in set(index.flatten().tolist())}
    for name, (count, matrix) in mixed.items():
        assert count == apart.moments[name].count
        torch.testing.assert_close(matrix, apart.moments[name].matrix, rtol=1e-9, atol=1e-9)
    if join == "one":
        alone = Watch(sites)
        with alone.on():
            out(net, x[INDEX[:, 0] == 3], "m3")
        for name, moments in alone.moments.items():
            torch.testing.assert_close(moments.matrix, mixed[name][1], rtol=1e-9, atol=1e-9)


# -- errors -----------------------------------------------------------------------------------------------


def test_what_is_wrong_is_said() -> None:
    net = net_with("lora")
    with pytest.raises(UsageError, match="there is no set of pets called 'm9'"), using(net, Choice(("m9",), INDEX * 0)):
        pass
    with pytest.raises(UsageError, match="index goes from 0 to 4, and there are 2 members"):
        Choice(("m0", "m1"), INDEX)
    with pytest.raises(UsageError, match=r"index is torch.int64 \(8,\); int64 \(B, k\) is expected"):
        Choice(MEMBERS, INDEX[:, 0])
    with pytest.raises(UsageError, match=r"weight is \(8,\) and index \(8, 1\)"):
        Choice(MEMBERS, INDEX, INDEX[:, 0].double())
    with pytest.raises(UsageError, match="is made for 8 examples, but 3 rows go through the net"):
        out(net, PIXELS[:3].double(), Choice(MEMBERS, INDEX))
    add(net, "lora", ["first"], torch.float64, [0])
    assert not blendable(net, ["m0", "first"])
    with (
        pytest.raises(UsageError, match="set 'm0' has a pet around Linear and set 'first' has none"),
        using(net, Choice(("m0", "first"), INDEX.clamp(max=1))),
    ):
        pass


def test_a_pet_without_a_blend_cannot_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_with("adapter")
    assert blendable(net, MEMBERS)
    monkeypatch.setattr(Adapter, "blend", PET.blend)
    assert not blendable(net, MEMBERS)
    with pytest.raises(UsageError, match="Adapter cannot be chosen for each example, because its class has no `blend`"):
        out(net, PIXELS.double(), Choice(MEMBERS, INDEX))
