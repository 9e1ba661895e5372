"""Prefix and prompt: what they compute on every kind of attention, and what keeps old outputs as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from perpetune.build import load_backbone
from perpetune.check import tiny_backbone
from perpetune.data.pictures.view import PictureView
from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.towers import places
from perpetune.numerics.moments import Moments
from perpetune.numerics.projection import Operand, ProjectedStep
from perpetune.numerics.subspace import Subspace
from perpetune.pets import PET, Place, inject, parameters, pets, using
from perpetune.pets.attention import extended, projected
from perpetune.pets.lora import LoRA
from perpetune.pets.prefix import Prefix
from perpetune.pets.prompt import Prompt
from perpetune.protection.sites import Watch, pet_sites
from perpetune.seeding import generator, own_global_state

DIM, HEADS, SIDE = 16, 2, 16
PIXELS = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
SMALL = {"img_size": SIDE, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": HEADS, "num_classes": 0}


def timm_net(module: str, kind: str, **options: Any) -> nn.Module:
    models = __import__("timm.models", fromlist=[module])
    net: nn.Module = getattr(getattr(models, module), kind)(**{**SMALL, **options})
    for name, parameter in net.named_parameters():  # relative positions and biases begin at zero, which hides them
        if "bias" in name:
            nn.init.normal_(parameter)
    return net


def hf_net(kind: str, attention: str = "sdpa", **options: Any) -> nn.Module:
    import transformers

    config = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 32}
    made = getattr(transformers, f"{kind}Config")(**{**config, "image_size": SIDE, "patch_size": 8, **options})
    made._attn_implementation = attention
    net: nn.Module = getattr(transformers, f"{kind}Model")(made)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "timm vit": lambda: timm_net("vision_transformer", "VisionTransformer"),
    "timm vit qk-norm": lambda: timm_net("vision_transformer", "VisionTransformer", qk_norm=True),
    "timm eva": lambda: timm_net("eva", "Eva", use_rot_pos_emb=True),
    "timm eva rope gqa": lambda: timm_net(
        "eva", "Eva", use_rot_pos_emb=True, attn_type="rope", qkv_fused=False, num_heads=2, num_kv_heads=1
    ),
    "timm beit": lambda: timm_net("beit", "Beit", use_rel_pos_bias=True),
    "timm relpos": lambda: timm_net("vision_transformer_relpos", "VisionTransformerRelPos"),
    "hf vit": lambda: hf_net("ViT"),
    "hf deit": lambda: hf_net("DeiT"),
    "hf dinov2": lambda: hf_net("Dinov2"),
    "hf dinov3": lambda: hf_net("DINOv3ViT"),
}
PLAIN = ("timm vit", "hf vit", "hf dinov2")  # no mask and no rotary positions


def backbone_of(name: str, dtype: torch.dtype = torch.float64) -> Backbone:
    if name == "micro":
        return load_backbone("perpetune:micro").to(dtype)
    with own_global_state("test", name):
        net = NETS[name]()
    forward = (lambda n, x: n(pixel_values=x).last_hidden_state[:, 0]) if name.startswith("hf") else None
    return Backbone(net, spec=name, dim=DIM, preprocess=PictureView(SIDE), forward=forward).to(dtype)


def put(
    backbone: Backbone, kind: type[PET], at: str = "attn", name: str = "default", blocks: Any = None, **options: Any
) -> list[PET]:
    rng = generator("test", name)
    made = inject(backbone.net, places(backbone.net, [at], blocks), lambda place: kind(place, rng, **options), name)
    dtype = next(p for p in backbone.net.parameters() if p.is_floating_point()).dtype
    return [pet.to(dtype) for pet in made]  # type: ignore[call-arg]


def pixels_for(backbone: Backbone) -> Tensor:
    side = backbone.preprocess.size
    pixels = PIXELS if side == SIDE else F.interpolate(PIXELS, (side, side))
    return pixels.to(next(backbone.net.parameters()).dtype)


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention as it is defined, and its weights."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    weights = logits.softmax(-1)
    return weights @ v, weights


class Bare(nn.Module):
    """Just the call, as often as it is told; keys and values are given."""

    def __init__(self, k: Tensor, v: Tensor, times: int = 1, **how: Any):
        super().__init__()
        self.k, self.v, self.times, self.how = k, v, times, how

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(self.times):
            y = F.scaled_dot_product_attention(x, self.k, self.v, **self.how)
        return y


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


B, H, N, L, W = 2, 4, 5, 3, 6
MASKS = {
    "none": {},
    "scale": {"scale": 0.7},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": rand(B, 1, N, N, seed=5) > -0.5},
    "bool for all queries": {"attn_mask": rand(B, 1, 1, N, seed=6) > -0.5},
    "bool for all keys": {"attn_mask": torch.ones(N, 1, dtype=torch.bool)},
    "float": {"attn_mask": rand(H, N, N, seed=7)},
    "float and scale": {"attn_mask": rand(N, N, seed=8), "scale": 0.3},
}


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize(("own", "further"), [(H, H), (2, 2), (2, H)])
def test_further_keys_and_values_are_seen_by_all_whatever_the_mask(which: str, own: int, further: int) -> None:
    how = MASKS[which]
    q, k, v = rand(B, H, N, W, seed=1), rand(B, own, N, W, seed=2), rand(B, own, N, W, seed=3)
    more_k, more_v = rand(1, further, L, W, seed=4), rand(1, further, L, W, seed=9)
    seen: list[tuple[Tensor, Tensor]] = []
    base = Bare(k, v, enable_gqa=own < H, **how)
    got = extended(base, more_k, more_v, q, watch=lambda *rows: seen.append(rows))

    causal = torch.ones(N, N, dtype=torch.bool).tril() if how.get("is_causal") else None
    mask = how.get("attn_mask", causal)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], N)
        mask = torch.cat([torch.full((*mask.shape[:-1], L), mask.dtype == torch.bool).to(mask), mask], dim=-1)
    wide = [t.repeat_interleave(H // t.shape[1], 1).expand(B, -1, -1, -1) for t in (more_k, k, more_v, v)]
    expected, weights = dense(q, torch.cat(wide[:2], 2), torch.cat(wide[2:], 2), mask, scale=how.get("scale"))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[0][0], q, rtol=0, atol=0)
    torch.testing.assert_close(seen[0][1], weights[..., :L], rtol=1e-12, atol=1e-12)


def test_a_call_that_is_not_as_expected_is_told_and_leaves_nothing_behind() -> None:
    q, more = rand(B, H, N, W), rand(1, H, L, W)
    with pytest.raises(UsageError, match="Bare calls scaled_dot_product_attention more than once"):
        extended(Bare(q, q, times=2), more, more, q)
    with pytest.raises(UsageError, match=r'Bare does not call .*attn_implementation="sdpa".*fused_attn'):
        extended(Bare(q, q, times=0), more, more, q)
    with pytest.raises(UsageError, match="3 heads of width 6 do not fit"):
        extended(Bare(q, q), more[:, :3], more[:, :3], q)
    with pytest.raises(RuntimeError, match="is_causal"):  # torch's own complaint stays torch's
        extended(Bare(q, q, is_causal=True, attn_mask=rand(N, N)), more, more, q)
    assert torch._C._len_torch_function_stack() == 0


def test_one_around_another_adds_up() -> None:
    q, k, v = rand(B, H, N, W, seed=1), rand(B, H, N, W, seed=2), rand(B, H, N, W, seed=3)
    inner, outer = rand(1, H, L, W, seed=4), rand(1, H, 2, W, seed=5)

    class Around(nn.Module):
        def forward(self, x: Tensor) -> Any:
            assert torch._C._len_torch_function_stack() == 1
            return extended(Bare(k, v), inner, inner, x)

    whole_k, whole_v = (torch.cat([t.expand(B, -1, -1, -1) for t in (outer, inner, own)], 2) for own in (k, v))
    torch.testing.assert_close(extended(Around(), outer, outer, q), dense(q, whole_k, whole_v)[0])


# What they compute


def attention_of(backbone: Backbone, block: int = 0) -> nn.Module:
    return places(backbone.net, ["attn"], [block])[0].module


def first(y: Any) -> Tensor:
    out: Tensor = y[0] if isinstance(y, tuple) else y
    return out


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm vit", "hf vit"])
def test_prefix_is_attention_with_further_keys_and_values(name: str) -> None:
    backbone = backbone_of(name)
    (pet,) = put(backbone, Prefix, blocks=[0], length=3, std=1.0)
    assert isinstance(pet, Prefix)
    attn, x = attention_of(backbone), rand(2, 5, DIM)
    if name == "timm vit":
        q, k, v = attn.qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    k, v = (torch.cat([p.expand(2, -1, -1), t], 1) for p, t in ((pet.keys, k), (pet.values, v)))
    heads = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v)]
    mixed = dense(*heads)[0].transpose(1, 2).flatten(2)
    expected = attn.proj(mixed) if name == "timm vit" else attn.o_proj(mixed)
    torch.testing.assert_close(first(pet(attn, x)), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("inside", [False, True], ids=["frozen", "lora inside"])
def test_deep_prompt_is_the_attention_on_more_tokens_whose_own_outputs_are_dropped(name: str, inside: bool) -> None:
    backbone = backbone_of(name)
    (pet,) = put(backbone, Prompt, blocks=[0], length=3, std=1.0)
    assert isinstance(pet, Prompt)
    put(backbone, LoRA, "k", "inside", blocks=[0])
    shake(backbone, "inside")
    attn, x = attention_of(backbone), rand(2, 5, DIM)
    with using(backbone, "inside" if inside else None):
        whole = first(attn(torch.cat([x, pet.tokens.expand(2, -1, -1)], 1)))
        torch.testing.assert_close(first(pet(attn, x)), whole[:, :5], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(first(attn(x)), whole[:, :5])


def shake(root: nn.Module, name: str = "default") -> None:
    with torch.no_grad():
        for i, parameter in enumerate(parameters(root, name)):
            parameter.copy_(rand(*parameter.shape, seed=i) * 0.5)


@torch.no_grad()
def test_shallow_prompt_is_the_blocks_on_more_tokens() -> None:
    for name, pooled in (("timm vit", "token"), ("timm avg", "avg")):
        with own_global_state("shallow"):
            net = timm_net("vision_transformer", "VisionTransformer", global_pool=pooled).double()
        backbone = Backbone(net, spec=name, dim=DIM, preprocess=PictureView(SIDE))
        pixels = pixels_for(backbone)
        x = net.norm_pre(net._pos_embed(net.patch_embed(pixels)))
        blocks = [*net.blocks]
        made = put(backbone, Prompt, "block", length=3, std=1.0, deep=False)
        assert [p.shape for pet in made for p in pet.parameters()] == [(3, DIM)]
        y = torch.cat([x, made[0].tokens.expand(len(x), -1, -1)], 1)
        for block in blocks:
            y = block(y)
        with using(backbone, "default"):
            torch.testing.assert_close(backbone(pixels), net.forward_head(net.norm(y[:, :-3])), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["hf vit", "hf deit", "hf dinov2", "micro"])
def test_shallow_prompt_acts_on_other_families(name: str) -> None:
    backbone = backbone_of(name)
    put(backbone, Prompt, "block", length=3, std=1.0, deep=False)
    with using(backbone, "default"):
        acted = backbone(pixels_for(backbone))
    assert acted.shape == (3, backbone.dim)
    assert not torch.allclose(acted, backbone(pixels_for(backbone)))


@pytest.mark.parametrize("kind", [Prefix, Prompt])
@pytest.mark.parametrize("name", [*NETS, "micro"])
def test_on_every_family_each_parameter_acts_on_every_picture_alone(name: str, kind: type[PET]) -> None:
    backbone = backbone_of(name)
    bare = backbone(pixels_for(backbone))
    made = put(backbone, kind, length=3, std=1.0)
    assert len(made) >= 2
    with using(backbone, "default"):
        features = backbone(pixels_for(backbone))
        features.square().sum().backward()
        alone = torch.cat([backbone(p[None]) for p in pixels_for(backbone)])
    torch.testing.assert_close(alone, features, rtol=1e-9, atol=1e-9)
    assert not torch.equal(features, bare)
    for pet in made:
        for parameter in pet.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert (parameter.grad != 0).any(dim=1).all()
    torch.testing.assert_close(backbone(pixels_for(backbone)), bare, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Prefix, Prompt])
@pytest.mark.parametrize("name", ["timm vit", "hf vit"])
def test_gradients_are_the_same_when_activations_are_recomputed(name: str, kind: type[PET]) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        backbone = backbone_of(name)
        put(backbone, kind, length=3, std=1.0)
        with using(backbone, "default"):
            pixels = pixels_for(backbone)
            features = checkpoint(backbone, pixels, use_reentrant=False) if recompute else backbone(pixels)
            features.square().sum().backward()
        return [p.grad for p in parameters(backbone.net, "default")]

    torch.testing.assert_close(gradients(True), gradients(False))


@torch.no_grad()
@pytest.mark.parametrize("kind", [Prefix, Prompt])
@pytest.mark.parametrize("name", ["timm vit", "timm beit", "hf vit", "hf dinov3"])
def test_under_autocast_they_follow_the_precision(name: str, kind: type[PET]) -> None:
    backbone = backbone_of(name, torch.float32)
    put(backbone, kind, length=3, std=1.0)
    pixels = pixels_for(backbone)
    rows: list[Tensor] = []
    with using(backbone, "default"):
        exact = backbone(pixels)
        for pet in pets(backbone.net, "default"):
            pet.watch = lambda site, seen: rows.append(seen)
        with torch.autocast("cpu", torch.bfloat16):
            close = backbone(pixels)
    assert (close - exact).abs().max() < 0.1 * exact.abs().max()
    assert rows
    assert all(r.isfinite().all() for r in rows)


@torch.no_grad()
def test_an_attention_that_cannot_be_reached_is_one_line() -> None:
    with own_global_state("eager"):
        eager = Backbone(
            hf_net("ViT", "eager"),
            spec="eager",
            dim=DIM,
            preprocess=PictureView(SIDE),
            forward=lambda n, x: n(pixel_values=x).last_hidden_state[:, 0],
        )
    for kind in (Prefix, Prompt):
        put(eager, kind, name=kind.__name__)
        with (
            using(eager, kind.__name__),
            pytest.raises(UsageError, match=r"^ViTAttention does not call .*attn_implementation[^\n]*$"),
        ):
            eager(PIXELS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm eva", "EvaBlock gets positions or a mask"),
        ("hf dinov3", "DINOv3ViTLayer gets positions or a mask"),
        ("timm beit", "attention in Block has a mask or relative positions"),
        ("timm relpos", "attention in RelPosBlock has a mask or relative positions"),
    ],
)
def test_carried_tokens_are_refused_where_they_have_no_position(name: str, said: str) -> None:
    backbone = backbone_of(name)
    put(backbone, Prompt, "block", deep=False)
    with using(backbone, "default"), pytest.raises(UsageError, match=f"{said}.*deep: true"):
        backbone(pixels_for(backbone))


def place(**changes: Any) -> Place:
    given = {"path": "blocks.0.attn", "module": nn.Identity(), "roles": ("attn",), "parts": (), "block": 0}
    return Place(**{**given, "d_in": 8, "d_out": 8, "heads": 2, "depth": 2, **changes})


@pytest.mark.parametrize(
    ("kind", "options", "changes", "said"),
    [
        (Prefix, {"length": 0}, {}, "prefix: length is 0; at least 1"),
        (Prefix, {"std": 0.0}, {}, "prefix: std is 0.0; a number above 0"),
        (Prefix, {"std": float("nan")}, {}, "prefix: std is nan"),
        (Prefix, {}, {"roles": ("mlp",)}, r"prefix: blocks.0.attn \(mlp\) is not an attention; use the role attn"),
        (Prefix, {}, {"heads": 0}, r"\(Identity\) has width 8 and 0 heads"),
        (Prefix, {}, {"heads": 3}, "has width 8 and 3 heads"),
        (Prompt, {"length": -1}, {}, "prompt: length is -1"),
        (Prompt, {"std": -1.0}, {}, "prompt: std is -1.0"),
        (Prompt, {}, {"roles": ("block",)}, r"\(block\) is not an attention"),
        (Prompt, {"deep": False}, {}, r"\(attn\) is not a block.*set at: block"),
    ],
)
def test_what_cannot_be_is_told(kind: type, options: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as told:
        kind(place(**changes), generator("test"), **options)
    assert "\n" not in str(told.value)


def test_shallow_tokens_that_would_not_come_off_are_refused_before_anything_is_changed() -> None:
    for blocks in ([0], [1]):
        backbone = backbone_of("timm vit")
        with pytest.raises(UsageError, match=f"enter at block 0 and leave after block 1.* at blocks {blocks[0]}; "):
            put(backbone, Prompt, "block", blocks=blocks, deep=False)
        assert not [m for m in backbone.modules() if isinstance(m, PET)]


# What keeps old outputs as they are

Spaces = list[tuple[Operand, list[Subspace]]]


def spaces(net: nn.Module, old: Callable[[], Any], conditions: Any = "exact") -> Spaces:
    """For every site in `net`, all that the rows of `old` span."""
    sites, _, _ = pet_sites(net, conditions)
    watch = Watch(sites)
    with watch.on(), torch.no_grad():
        old()
    found: Spaces = []
    for site in sites:
        matrix, count = watch.merged(site, lambda t: t)
        assert count > 0
        found.append((site.site.operand, [spanned(m) for m in matrix]))
        assert all(0 < s.rank < s.dim for s in found[-1][1]), site.name
    return found


def spanned(matrix: Tensor) -> Subspace:
    subspace = Subspace(len(matrix))
    subspace.extend(matrix, 1.0)
    return subspace


def change(attn: Callable[[Tensor], Any], pet: PET, old: Tensor, protected: Spaces) -> tuple[float, float]:
    """How far outputs on old and on new inputs move, relatively, when all of the pet that may move is trained."""
    new = rand(2, 5, DIM, seed=77)
    with torch.no_grad():
        before, new_before = first(attn(old)), first(attn(new))
    optimizer = torch.optim.AdamW(pet.parameters(), lr=0.1, weight_decay=0.1)
    with ProjectedStep(optimizer, protected):
        for _ in range(5):
            optimizer.zero_grad()
            (first(attn(new)) - rand(2, 5, DIM, seed=78)).square().sum().backward()
            optimizer.step()
    with torch.no_grad():
        moved = (first(attn(old)) - before).norm() / before.norm(), (first(attn(new)) - new_before).norm()
    return float(moved[0]), float(moved[1] / new_before.norm())


def one_attention(name: str, kind: type[PET], seed: int) -> tuple[nn.Module, PET, Callable[[Tensor], Any], Tensor]:
    backbone = backbone_of(name)
    (pet,) = put(backbone, kind, name=f"seed{seed}", blocks=[0], length=10, std=1.0)
    attn = attention_of(backbone)
    with torch.no_grad():  # as attentive as a trained one: fresh weights are so small that all keys look alike
        for i, parameter in enumerate(attn.parameters()):
            parameter.copy_(rand(*parameter.shape, seed=10 * seed + i) * DIM**-0.5)
    return backbone.net, pet, partial(pet, attn), rand(1, 3, DIM, seed=seed)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", [Prefix, Prompt])
@pytest.mark.parametrize("name", ["timm vit", "hf vit", "timm eva rope gqa"])
def test_the_exact_conditions_keep_old_outputs_and_leave_room_to_learn(name: str, kind: type[PET], seed: int) -> None:
    net, pet, attn, old = one_attention(name, kind, seed)
    at_old, at_new = change(attn, pet, old, spaces(net, lambda: attn(old)))
    assert at_old < 1e-12
    assert at_new > 1e-2


@pytest.mark.parametrize("kind", [Prefix, Prompt])
@pytest.mark.parametrize("name", ["timm vit", "hf vit"])
def test_what_the_paper_states_moves_old_outputs(name: str, kind: type[PET]) -> None:
    net, pet, attn, old = one_attention(name, kind, 1)
    at_old, _ = change(attn, pet, old, spaces(net, lambda: attn(old), "paper"))
    assert at_old > 1e-2


def test_keys_alone_or_the_values_alone_are_not_enough_and_sum_space_is_none() -> None:
    for kind in (Prefix, Prompt):
        for kept in (0, 1):
            net, pet, attn, old = one_attention("timm vit", kind, 1)
            assert change(attn, pet, old, [spaces(net, lambda a=attn, o=old: a(o))[kept]])[0] > 1e-2
    net, pet, attn, old = one_attention("timm vit", Prompt, 1)
    assert isinstance(pet, Prompt)
    assert pet.tokens is not None
    summed = (pet.tokens[:3] + old[0]).detach()  # PGP's s = x + p
    moments = Moments(DIM)
    moments.update(summed)
    assert change(attn, pet, old, [(Operand(pet.tokens), [spanned(moments.matrix)])])[0] > 1e-2


def test_prefix_keys_by_the_inputs_move_the_attention_itself() -> None:
    """The control: with fixed values, keys projected by the inputs move old outputs, and keys projected by the queries
    do not."""
    for by_queries in (True, False):
        net, pet, attn, old = one_attention("timm vit", Prefix, 1)
        assert isinstance(pet, Prefix)
        pet.values.requires_grad_(False)
        kept = spaces(net, lambda a=attn, o=old: a(o), "exact" if by_queries else "paper")[:1]
        at_old, _ = change(attn, pet, old, kept)
        assert at_old < 1e-12 if by_queries else at_old > 1e-2


@pytest.mark.parametrize("name", ["timm vit", "hf vit", "timm eva rope gqa", "hf dinov3", "timm beit"])
def test_sites_see_the_rows_that_meet_the_parameters(name: str) -> None:
    """Moments through the lift are those of `W_kᵀ q`, and every parameter is at a site or meant to be free."""
    backbone = backbone_of(name)
    put(backbone, Prompt, blocks=[0], length=3)
    (pet,) = [m for m in backbone.modules() if isinstance(m, Prompt)]
    seen: dict[str, list[Tensor]] = {}
    pet.watch = lambda site, rows: seen.setdefault(site, []).append(rows)
    with using(backbone, "default"), torch.no_grad():
        backbone(pixels_for(backbone))
    keys, values = pet.sites()
    (q,), (a,) = seen["keys"], seen["values"]
    assert q.shape[1] == keys.groups
    assert q.shape[-1] == keys.width
    assert a.shape[-1] == values.width == 3
    assert [r.shape[-1] for r in seen["keys.inputs"]] == [DIM, DIM]
    unit = torch.eye(DIM, dtype=torch.float64)
    attn = pet.place.module
    zero = projected(attn, torch.zeros_like(unit[:1])[None])[0]
    weight = (projected(attn, unit[None])[0] - zero)[0].mT  # (H_kv, dh, d)
    weight = weight.repeat_interleave(keys.groups // len(weight), 0)
    rows = torch.einsum("bhnc,hcd->bhnd", q, weight).reshape(-1, DIM)
    moments = torch.einsum("bhnc,bhne->hce", q, q)
    assert keys.lift is not None
    torch.testing.assert_close(keys.lift(moments)[0], rows.T @ rows)


def test_conditions_there_are_none_for_are_told() -> None:
    backbone = backbone_of("timm vit qk-norm")
    (pet,) = put(backbone, Prompt, blocks=[0])
    lift = pet.sites()[0].lift
    assert lift is not None
    with pytest.raises(UsageError, match=r"keys of blocks.0.attn \(Attention\) are not linear.*use prefix"):
        lift(torch.zeros(HEADS, DIM // HEADS, DIM // HEADS, dtype=torch.float64))
    shallow = put(backbone, Prompt, "block", "shallow", deep=False)
    with pytest.raises(UsageError, match="that keeps old outputs exactly; use deep: true, or conditions: paper"):
        shallow[0].sites()
    assert [len(p.sites("paper")) for p in shallow] == [1, 0]
    watched: list[Tensor] = []
    shallow[0].watch = lambda site, rows: watched.append(rows)
    with using(backbone, "shallow"), torch.no_grad():
        backbone(pixels_for(backbone))
    assert [tuple(r.shape) for r in watched] == [(3, 5, DIM), (3, 10, DIM)]


def test_the_paper_leaves_the_prefix_values_free() -> None:
    pet = Prefix(place(), generator("test"))
    assert pet.free("paper") == [pet.values]
    assert pet.free() == []
    for conditions in ("exact", "paper"):
        covered = {p for s in pet.sites(conditions) for p in s.operand.parameters}.union(pet.free(conditions))
        assert covered == set(pet.parameters())


def test_a_copy_reads_its_own_attention() -> None:
    """The prompt knows its attention without owning it: it is stored with neither, and copied with both."""
    backbone = tiny_backbone()
    put(backbone, Prompt, length=3)
    other = copy.deepcopy(backbone)
    (pet, *_), (twin, *_) = ([m for m in b.modules() if isinstance(m, Prompt)] for b in (backbone, other))
    assert list(pet.state_dict()) == ["tokens"]
    assert twin.place.module is not pet.place.module
    assert twin.place.module in set(other.modules())
