"""Nets of several transformers: each is found, is called by what it reads, and gets pets of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perpetune.data.pictures.view import PictureView
from perpetune.data.texts.view import TextView
from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.towers import places, roles, towers
from perpetune.pets import Place, inject, parameters, using
from perpetune.pets.lora import LoRA
from perpetune.seeding import generator, own_global_state

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
PICTURE = {**SIZES, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
TEXT = {**SIZES, "num_hidden_layers": 2, "vocab_size": 50, "max_position_embeddings": 8}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS = torch.tensor([[1, 7, 8, 2], [1, 9, 3, 2]])


def dual(kind: str) -> nn.Module:
    """A dual encoder with random weights, made from a config."""
    import transformers as t

    with own_global_state("towers", kind):
        if kind in ("CLIP", "Siglip", "Siglip2"):
            config = getattr(t, f"{kind}Config")(text_config={**TEXT, **ENDS}, vision_config=PICTURE)
            net: nn.Module = getattr(t, f"{kind}Model")(config)
            return net.eval()
        if kind == "ViT and BERT":
            both = t.VisionTextDualEncoderConfig.from_vision_text_configs(t.ViTConfig(**PICTURE), t.BertConfig(**TEXT))
            return t.VisionTextDualEncoderModel(both).eval()
        model = pytest.importorskip("open_clip.model")
        vision = {"layers": 3, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
        text = {"context_length": 4, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
        made: nn.Module = getattr(model, kind.removeprefix("open_clip "))(embed_dim=8, vision_cfg=vision, text_cfg=text)
        return made.eval()


CLIP_ROLES = {"q", "k", "v", "proj", "fc1", "fc2", "attn", "mlp", "block", "norm1", "norm2", "norm"}
OPEN_ROLES = CLIP_ROLES - {"q", "k", "v", "proj"}  # its attention is one module of torch's
PICTURE_ROLES, TEXT_ROLES = CLIP_ROLES | {"patch"}, CLIP_ROLES | {"embed", "out"}
# Of each: where its towers are, and the roles they have.
DUAL: dict[str, tuple[str, set[str], str, set[str]]] = {
    "CLIP": ("vision_model", PICTURE_ROLES | {"norm_pre", "out"}, "text_model", TEXT_ROLES),
    "Siglip": ("vision_model", PICTURE_ROLES, "text_model", TEXT_ROLES),
    "Siglip2": ("vision_model", PICTURE_ROLES, "text_model", TEXT_ROLES),
    "ViT and BERT": ("vision_model", PICTURE_ROLES | {"out"}, "text_model", TEXT_ROLES - {"mlp", "norm"}),
    "open_clip CLIP": ("visual", OPEN_ROLES | {"patch", "norm_pre"}, "", OPEN_ROLES | {"embed"}),
    "open_clip CustomTextCLIP": ("visual", OPEN_ROLES | {"patch", "norm_pre"}, "text", OPEN_ROLES | {"embed"}),
}


@pytest.mark.parametrize("kind", DUAL)
def test_both_towers_of_a_dual_encoder_are_found(kind: str) -> None:
    net = dual(kind)
    found = towers(net)
    assert list(found) == ["picture", "text"]
    picture, picture_roles, text, text_roles = DUAL[kind]
    assert (found["picture"].path, set(found["picture"].roles())) == (picture, picture_roles)
    assert (found["text"].path, set(found["text"].roles())) == (text, text_roles)
    assert [len(tower.blocks) for tower in found.values()] == [3, 2]
    assert list(towers(net, "text")) == ["text", "picture"]
    for tower in found.values():
        assert (tower.norm is not None) == ("norm" in tower.roles())
        here = places(net, [f"{tower.name}.operations"])
        assert here
        assert all(place.module is net.get_submodule(place.path) for place in here)
        assert all(place.path.startswith(f"{tower.path}." if tower.path else "") for place in here)
        inside = tower.sequence + "."
        assert {p.block for p in here if p.path.startswith(inside)} == set(range(len(tower.blocks)))
    assert [p.path for p in places(net, ["fc2"])] == [p.path for p in places(net, ["picture.fc2"])]
    assert set(roles(net)) == picture_roles | {f"picture.{r}" for r in picture_roles} | {
        f"text.{r}" for r in text_roles
    }


def lora(place: Place) -> LoRA:
    return LoRA(place, generator("towers", place.path), rank=2)


def features(kind: str, net: Any) -> tuple[Tensor, Tensor]:
    """Of pictures and of texts."""
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    if kind.startswith("open_clip"):
        return net.encode_image(pixels), net.encode_text(IDS)
    return (
        net.get_image_features(pixel_values=pixels).pooler_output,
        net.get_text_features(input_ids=IDS, attention_mask=torch.ones_like(IDS)).pooler_output,
    )


@pytest.mark.parametrize("kind", [kind for kind in DUAL if kind != "Siglip2"])  # which takes patches, not pixels
def test_a_pet_in_one_tower_leaves_the_other_bit_for_bit(kind: str) -> None:
    net = dual(kind)
    picture, text = features(kind, net)  # with gradients: without them torch's attention goes another way
    role = "fc2" if kind.startswith("open_clip") else "q"
    for tower in ("picture", "text"):
        inject(net, places(net, [f"{tower}.{role}"]), lora, tower)
        with torch.no_grad():
            for parameter in parameters(net, tower):
                parameter.add_(0.3)
        with using(net, tower):
            moved = features(kind, net)
        assert torch.equal(moved[0], picture) == (tower == "text")
        assert torch.equal(moved[1], text) == (tower == "picture")
        sum(f.square().sum() for f in moved).backward()  # type: ignore[union-attr]
        assert all(p.grad is not None and p.grad.any() for p in parameters(net, tower))
    assert [tower.path for tower in towers(net).values()] == [DUAL[kind][0], DUAL[kind][2]]  # seen through slots


def test_roles_of_both_towers_go_tower_by_tower_and_each_once() -> None:
    net = dual("CLIP")
    found = places(net, ["text.v", "q", "picture.q", "text.norm", "text.q"], [-1])
    assert [(p.path, p.roles) for p in found] == [
        ("vision_model.encoder.layers.2.self_attn.q_proj", ("q",)),
        ("text_model.encoder.layers.1.self_attn.q_proj", ("q",)),
        ("text_model.encoder.layers.1.self_attn.v_proj", ("v",)),
        ("text_model.final_layer_norm", ("norm",)),
    ]


@pytest.mark.parametrize(
    ("asked", "blocks", "said"),
    [
        (["sound.q"], None, "role 'sound.q': CLIPModel has no tower 'sound'; its towers are picture, text"),
        (["text.patch"], None, "block 0 has no role 'patch'; it has q, .*norm, out; its towers are picture, text"),
        (["q", "text.q"], [2], "block 2 is out of range: the tower text has 2 blocks, 0 to 1"),
    ],
)
def test_what_a_dual_encoder_lacks_names_its_towers(asked: list[str], blocks: list[int] | None, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        places(dual("CLIP"), asked, blocks)
    assert "\n" not in str(caught.value)


def test_a_net_of_one_tower_knows_its_name_too() -> None:
    from transformers import ViTConfig, ViTModel

    net = ViTModel(ViTConfig(**PICTURE))
    assert [p.path for p in places(net, ["picture.q"])] == [p.path for p in places(net, ["q"])]
    assert "picture.q" not in roles(net)
    with pytest.raises(UsageError, match=r"role 'text.q': ViTModel has no tower 'text'; its towers are picture"):
        places(net, ["text.q"])


class Pair(nn.Module):
    """A net of somebody's own: two towers, and no word on which of them answers."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaModel, ViTConfig, ViTModel

        super().__init__()
        self.eye = ViTModel(ViTConfig(**PICTURE))
        self.ear = LlamaModel(LlamaConfig(**TEXT, **ENDS))


def test_of_two_towers_that_answers_which_reads_what_goes_in() -> None:
    from tiny import tiny_tokenizer

    view = TextView(tiny_tokenizer(), max_length=8)
    pictures = Backbone(Pair(), spec="pair", dim=16, preprocess=PictureView(16))
    texts = Backbone(Pair(), spec="pair", dim=16, preprocess=view)
    assert (pictures.tower.path, texts.tower.path) == ("eye", "ear")
    assert pictures.pet_places(["q"])[0].path.startswith("eye.")
    assert texts.pet_places(["q"])[0].path.startswith("ear.")
    assert "picture.q" in texts.roles()
    taps = texts.tap(1).taps
    assert taps is not None
    assert (taps.sequence, taps.norm) == ("ear.layers", "ear.norm")


@pytest.mark.shared
def test_the_shared_dual_encoder(shared: Path) -> None:
    from transformers import VisionTextDualEncoderModel

    net = VisionTextDualEncoderModel.from_pretrained(shared / "models" / "dual-encoder")
    assert {name: (tower.path, len(tower.blocks)) for name, tower in towers(net).items()} == {
        "picture": ("vision_model", 12),
        "text": ("text_model", 7),
    }
