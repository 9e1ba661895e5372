"""Vision-language models of six families, and pairs: pictures in texts against plain computations (V11–V15)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_language_backbones import gguf_of
from tiny import SIZE, VLMS, dual_folder, load_tiny_vlm, picture, tiny_language_model, tiny_vision_language, vit_folder
from torch import Tensor
from torch.nn import functional as F

from perpetune.build import load_backbone
from perpetune.data.pictured.marks import MARK
from perpetune.data.pictured.table import Shown
from perpetune.data.pictured.view import PicturedView
from perpetune.data.texts.tables import Text
from perpetune.errors import DataError, PerpetuneError, UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.causal_lm import CausalLM
from perpetune.models.vision_language import VisionLanguage
from perpetune.pets import inject, using
from perpetune.pets.lora import LoRA
from perpetune.pets.prefix import Prefix
from perpetune.tasks import Batch, Inputs, Task

KINDS = (*VLMS, "pair")
CHATS = tuple(kind for kind in KINDS if kind != "paligemma")
TEXTS = (
    (Text(f"{MARK}\nWhat is it?", "a cat", ("a cat", "no", "some longer answer"), pictures=1), ("a",)),
    (Text("hi", "no", ("no", "yes")), ()),
    (Text(f"Here {MARK} and there {MARK}: the same?", "yes", ("yes", "no"), pictures=2), ("b", "c")),
)


def made(kind: str, path: Any) -> Backbone:
    if kind != "pair":
        return load_tiny_vlm(tiny_vision_language(path, kind), kind)
    parts = f"picture: folder:{vit_folder(path / 'vit', blocks=2)}, text: folder:{tiny_language_model(path / 'lm')}"
    with pytest.warns(UserWarning, match="no projector is given: it is drawn at random, and has to be trained"):
        return load_backbone(f"pair:{{{parts}}}")


@pytest.fixture(scope="module", params=KINDS)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    found = made(request.param, tmp_path_factory.mktemp(request.param)).double()
    found.kind = request.param  # type: ignore[assignment]
    return found


def view_of(of: Any) -> PicturedView:
    view = of.preprocess if isinstance(of, Backbone) else of.view
    assert isinstance(view, PicturedView)
    return view


def shown(view: PicturedView, text: Text, names: tuple[str, ...], *, ask: bool) -> Shown:
    encoded = view.question(text) if ask else view.sequence(text)
    return Shown(encoded, tuple(view.picture(picture(name, 0)) for name in names))


def batch(of: Any, *texts: Any, ask: bool = False) -> Batch:
    view = view_of(of)
    return view.collate([(shown(view, text, names, ask=ask), 0, i) for i, (text, names) in enumerate(texts)])


def task() -> Task:
    return Task(0, "t", (), train=[])  # type: ignore[arg-type]


def pixels_of(backbone: Backbone, inputs: Inputs) -> Tensor:
    return backbone.normalised(inputs.pixels[inputs["shown"] != 0])


def plain(backbone: Backbone, inputs: Inputs, ids: Tensor) -> Tensor:
    """Logits of one example by one pass of transformers' own forward on pixels; of a pair on spliced embeddings."""
    net: Any = backbone.net
    known: Any = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    kind = backbone.kind
    if kind == "paligemma":
        known["token_type_ids"] = (torch.arange(ids.shape[1]) >= inputs.ids.shape[1]).long()[None]
    if "pixels" not in inputs:
        return net(input_ids=ids, **known).logits
    pixels = pixels_of(backbone, inputs)
    assert backbone.pictures is not None
    if kind == "pair":
        embeds = net.get_input_embeddings()(ids.masked_fill(ids == backbone.pictures.token, 0))
        states = net.picture_tower(pixels).last_hidden_state[:, 1:]
        embeds[ids == backbone.pictures.token] = net.picture_projector(states).flatten(0, 1)
        return net(inputs_embeds=embeds, **known).logits
    if kind in ("idefics3", "smolvlm"):
        known["pixel_values"] = pixels[None]
    elif kind == "qwen2_5_vl":
        count = len(pixels)
        patches = pixels.reshape(count, 3, 2, 2, 4, 2, 2, 4).permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        known["pixel_values"] = patches.expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(count * 16, -1)
        known["image_grid_thw"] = torch.tensor([[1, 4, 4]] * count)
        known["mm_token_type_ids"] = (ids == backbone.pictures.token).int()
        net.model.rope_deltas = None
    else:
        known["pixel_values"] = pixels
    return net(input_ids=ids, **known).logits


@torch.no_grad()
def test_features_given_are_pixels_read_and_a_mixed_batch_is_one_by_one(backbone: Backbone) -> None:
    model = VisionLanguage(backbone)
    whole = batch(model, *TEXTS)
    losses, counts = [], []
    for text, names in TEXTS:
        alone = batch(model, (text, names))
        inputs = alone.inputs
        assert inputs.labels is not None
        question = Inputs(**{**inputs.tensors, "ids": inputs.ids[:, : int((inputs.labels[0] < 0).sum())]})
        logits = plain(backbone, question, inputs.ids)[0]
        wanted = F.cross_entropy(logits[:-1], inputs.labels[0, 1:], ignore_index=-100)
        torch.testing.assert_close(model.loss(task(), alone).double(), wanted, atol=1e-6, rtol=1e-6)
        losses.append(wanted)
        counts.append(int((inputs.labels >= 0).sum()))
    mean = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(model.loss(task(), whole).double(), mean, atol=1e-6, rtol=1e-6)
    asked = batch(model, *TEXTS, ask=True).inputs
    for row, features in enumerate(model.features(asked)):
        alone_ = model.features(batch(model, TEXTS[row], ask=True).inputs)[0]
        torch.testing.assert_close(features, alone_, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_an_option_scores_what_one_long_pass_gives_its_tokens(backbone: Backbone, monkeypatch: Any) -> None:
    model = VisionLanguage(backbone)
    inputs = batch(model, *TEXTS, ask=True).inputs
    scores = model.predict(inputs)
    monkeypatch.setattr("perpetune.models.causal_lm._repeatable", lambda memory: None)
    torch.testing.assert_close(model.predict(inputs), scores, atol=1e-5, rtol=1e-5)
    for row, (text, names) in enumerate(TEXTS):
        item = shown(view_of(model), text, names, ask=True)
        alone = batch(model, (text, names), ask=True).inputs
        for k, option in enumerate(item.encoded.options):
            ids = torch.cat([item.encoded.ids, option])[None]
            said = plain(backbone, alone, ids)[0].log_softmax(-1)[len(item.encoded) - 1 : -1]
            wanted = said.gather(1, option.unsqueeze(1)).sum()
            torch.testing.assert_close(scores[row, k].double(), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_written_answer_is_the_likeliest_token_after_each_other(backbone: Backbone) -> None:
    model = VisionLanguage(backbone, eval="generate", max_new_tokens=5)
    found = model.predict(batch(model, *TEXTS, ask=True).inputs)
    for row, (text, names) in enumerate(TEXTS):
        alone = batch(model, (text, names), ask=True).inputs
        ids = alone.ids
        for _ in range(5):
            ids = torch.cat([ids, plain(backbone, alone, ids)[0, -1].argmax().view(1, 1)], 1)
        assert model.read(found[row]) == view_of(model).decode(ids[0, alone.ids.shape[1] :])


@torch.no_grad()
def test_pictures_count_and_rows_do_not(backbone: Backbone) -> None:
    """Other pictures give other scores; other places in the batch do not."""
    model = VisionLanguage(backbone)
    scores = model.predict(batch(model, *TEXTS, ask=True).inputs)
    turned = model.predict(batch(model, *TEXTS[::-1], ask=True).inputs)
    torch.testing.assert_close(turned.flip(0), scores, atol=1e-5, rtol=1e-5)
    others = (TEXTS[0][0], ("b",)), TEXTS[1], (TEXTS[2][0], ("c", "b"))
    swapped = model.predict(batch(model, *others, ask=True).inputs)
    assert [bool((a - b).nan_to_num(0.0).abs().max() > 1e-4) for a, b in zip(swapped, scores, strict=True)] == [
        True,
        False,
        True,
    ]


def test_each_picture_has_its_place_in_any_form_however_long_the_text(backbone: Backbone) -> None:
    view = view_of(backbone)
    assert backbone.pictures is not None
    count, token = backbone.pictures.count, backbone.pictures.token
    assert count == 4
    long = Text(f"{MARK}{MARK}\n" + "words and more of them, " * 40 + "What?", "a cat", pictures=2)
    for text in (*(text for text, _ in TEXTS), long):
        for encoded in (view.sequence(text), view.question(text)):
            assert int((encoded.ids == token).sum()) == text.pictures * count
            assert len(encoded) <= view.max_length
    assert view.question(long).cut > 0
    said = view.sequence(long)
    assert said.answer is not None
    assert "a cat" in view.decode(said.ids[said.answer])
    with pytest.raises(DataError, match=r"its 60 pictures need 240 tokens, and prompt and answer together can have"):
        view.question(Text(MARK * 60 + "What?", pictures=60))
    with pytest.raises(DataError, match="it has 0 pictures and 1 marks <image>; one for each is expected"):
        view.question(Text(f"{MARK} What?"))
    if view.mark.text != MARK:
        with pytest.raises(DataError, match=r"the text holds the model's own mark <\|image_pad\|>"):
            view.question(Text(f"{view.mark.text} What?"))


def test_a_chat_shows_its_pictures_too(backbone: Backbone) -> None:
    if backbone.kind == "paligemma":
        return
    view = view_of(backbone)
    chat = (("user", f"one {MARK}"), ("assistant", "two"), ("user", f"{MARK} and {MARK}"))
    encoded = view.sequence(Text(chat, "four", pictures=3))
    assert int((encoded.ids == view.mark.token).sum()) == 12
    assert encoded.answer is not None
    assert view.decode(encoded.ids[encoded.answer]).startswith("two")
    with torch.no_grad():
        VisionLanguage(backbone).loss(task(), batch(backbone, (Text(chat, "four", pictures=3), ("a", "b", "c"))))


def test_a_pet_that_adds_nothing_is_the_base_and_leaves_pictures_as_they_are(tmp_path: Any) -> None:
    for kind in KINDS:
        backbone = made(kind, tmp_path / kind)
        model = VisionLanguage(backbone, keep=0)
        inputs = batch(model, *TEXTS, ask=True).inputs
        assert backbone.pictures is not None
        pictures = backbone.pictures.features(backbone.net, inputs, backbone.normalised)
        base = model.predict(inputs)
        inject(backbone.net, backbone.pet_places(["q", "v"]), lambda place: LoRA(place, torch.Generator()), "text")
        with using(model, "text"):
            assert torch.equal(model.predict(inputs), base), kind
        for _, parameter in backbone.net.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        with using(model, "text"):
            assert not torch.allclose(model.predict(inputs), base)
            again = backbone.pictures.features(backbone.net, inputs, backbone.normalised)
        assert torch.equal(again, pictures), kind


def test_a_pet_in_the_tower_moves_pictures_and_learns_from_the_loss(tmp_path: Any) -> None:
    for kind in KINDS:
        backbone = made(kind, tmp_path / kind)
        model = VisionLanguage(backbone)
        inputs = batch(model, *TEXTS)
        assert backbone.pictures is not None
        old = backbone.pictures.features(backbone.net, inputs.inputs, backbone.normalised)
        places = backbone.pet_places(["picture.q", "picture.v"], [0])  # LLaVA does not read the last block
        assert all(place.path.startswith(backbone.pictures.path) for place in places), kind
        inject(backbone.net, places, lambda place: LoRA(place, torch.Generator().manual_seed(0)), "picture")
        parameters = [p for p in backbone.net.parameters() if p.requires_grad]
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.3)
        with using(model, "picture"):
            new = backbone.pictures.features(backbone.net, inputs.inputs, backbone.normalised)
            model.loss(task(), inputs).backward()
        assert not torch.allclose(old, new), kind
        assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in parameters), kind
        assert torch.equal(backbone.pictures.features(backbone.net, inputs.inputs, backbone.normalised), old), kind


def test_pets_that_no_picture_meets_are_named(tmp_path: Any) -> None:
    """LLaVA reads its tower before the last block (vision_feature_layer -2)."""
    for kind, blocks, said in (("llava-clip", [1], 1), ("llava-clip", [0, 1], 0), ("idefics3", [1], 0)):
        backbone = made(kind, tmp_path / f"{kind}{len(blocks)}")
        places = backbone.pet_places(["picture.q", "picture.v"], blocks)
        inject(backbone.net, places, lambda place: LoRA(place, torch.Generator().manual_seed(0)), "picture")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            VisionLanguage(backbone)
        found = [str(w.message) for w in caught if "change nothing" in str(w.message)]
        assert len(found) == said, kind
        assert all("layers.1.self_attn.q_proj" in text and "name earlier blocks" in text for text in found)


@torch.no_grad()
def test_a_prefix_acts_alike_in_a_mixed_batch_and_alone(tmp_path: Any) -> None:
    for kind in KINDS:
        backbone = made(kind, tmp_path / kind).double()
        model = VisionLanguage(backbone)
        inject(
            backbone.net, backbone.pet_places(["attn"]), lambda place: Prefix(place, torch.Generator(), length=2), "p"
        )
        for parameter in backbone.net.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        backbone.double()
        base = model.predict(batch(model, *TEXTS, ask=True).inputs)
        with using(model, "p"):
            scores = model.predict(batch(model, *TEXTS, ask=True).inputs)
            assert not torch.allclose(scores, base), kind
            for row, one in enumerate(TEXTS):
                alone = model.predict(batch(model, one, ask=True).inputs)[0]
                torch.testing.assert_close(scores[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_a_frozen_tower_reads_a_picture_once(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionLanguage(backbone)
    side = backbone.pictures
    assert side is not None
    side._kept.clear()
    read: list[int] = []
    tower = side._tower
    monkeypatch.setattr(side, "_tower", lambda net, pixels: read.append(len(pixels)) or tower(net, pixels))
    inputs = batch(model, *TEXTS, ask=True).inputs
    scores, again = model.predict(inputs), model.predict(inputs)
    assert read == [1, 1, 1]
    assert torch.equal(scores, again)
    side.room, side._bytes = 0, 0
    side._kept.clear()
    torch.testing.assert_close(model.predict(inputs), scores, atol=1e-5, rtol=1e-5)
    assert read == [1, 1, 1, 3]


def test_the_projector_is_trained_on_wish(backbone: Backbone) -> None:
    kind = backbone.kind
    if kind == "qwen2_5_vl":
        with pytest.raises(UsageError, match="its projector is a part of its picture tower"):
            VisionLanguage(backbone, projector=True)
        return
    if kind == "pair":
        assert VisionLanguage(backbone).trained()
        with pytest.raises(UsageError, match="its projector has random weights, so it would see nothing in pictures"):
            VisionLanguage(backbone, projector=False)
    else:
        assert VisionLanguage(backbone).trained() == []
    model = VisionLanguage(backbone, projector=True)
    inputs = batch(model, *TEXTS)
    frozen = {name: tensor.clone() for name, tensor in backbone.net.state_dict().items()}
    before = model.loss(task(), inputs)
    trained = model.trained()
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model.loss(task(), inputs).backward()
    optimizer.step()
    assert bool(model.loss(task(), inputs) < before)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in backbone.net.state_dict().items())
    model.reset()
    torch.testing.assert_close(model.loss(task(), inputs), before)


def test_heads_of_texts_name_the_head_for_pictures(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match="takes pictured, and this head is for texts: use `head: vlm`"):
        CausalLM(backbone)


def test_a_pair_of_any_parts_with_its_projector(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    from perpetune.models.loaders.pair import PROJECTOR

    text = f"text: folder:{tiny_language_model(tmp_path / 'lm', 'gpt2')}"
    spec = f"pair:{{picture: perpetune:micro, {text}}}"
    with pytest.warns(UserWarning, match="drawn at random"):
        drawn, same, other = (load_backbone(spec, pool=2, seed=seed) for seed in (3, 3, 4))
    assert drawn.fingerprint() == same.fingerprint() != other.fingerprint()
    assert drawn.pictures is not None
    assert (drawn.pictures.count, view_of(drawn).picture.size) == (4, load_backbone("perpetune:micro").preprocess.size)
    file = tmp_path / "projector.safetensors"
    save_file(drawn.net.get_submodule(PROJECTOR).state_dict(), file)
    given = load_backbone(f"pair:{{picture: perpetune:micro, {text}, projector: {file}}}", pool=2)
    assert given.fingerprint() == drawn.fingerprint()
    assert not VisionLanguage(given).trained()
    for wrong, error in (
        (f"{{picture: perpetune:micro, {text}, projector: {tmp_path / 'no'}}}", "there is no projector"),
        (f"{{picture: perpetune:micro, {text}, extra: x}}", "there is no part 'extra'"),
        (f"{{{text}}}", "the part picture is missing"),
        (f"{{picture: {text[6:]}, {text}}}", "takes texts, and its place in a pair is for pictures"),
        ("{picture: folder:x, " + text + "}", "there is no such folder"),
        ("nothing", r"pair:\{picture: SPEC, text: SPEC, projector: FILE\} is expected"),
    ):
        with pytest.raises(UsageError, match=error):
            load_backbone(f"pair:{wrong}")
    save_file({"norm.weight": torch.ones(2)}, file)
    with pytest.raises(PerpetuneError, match=r"holds norm\.weight; norm\.weight, norm\.bias, .* are expected"):
        load_backbone(f"pair:{{picture: perpetune:micro, {text}, projector: {file}}}")


def test_a_pair_takes_weights_whose_architecture_is_named(tmp_path: Any) -> None:
    """A folder of timm's weights alone does not say what they are."""
    import timm
    from safetensors.torch import save_file

    name, lm = "vit_tiny_patch16_224", tiny_language_model(tmp_path / "lm")
    shape = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    (tmp_path / "vit").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        create = timm.create_model
        patch.setattr(timm, "create_model", lambda *a, **k: create(*a, **{**k, **shape}))
        save_file(create(name, num_classes=0, **shape).state_dict(), tmp_path / "vit" / "model.safetensors")
        spec = f"pair:{{picture: folder:{tmp_path / 'vit'}, text: folder:{lm}}}"
        with pytest.warns(UserWarning, match="drawn at random"):
            backbone = load_backbone(spec, architecture=name, image_size=32)
    assert backbone.pictures is not None
    assert backbone.pictures.count == 4
    with pytest.raises(UsageError, match="leave it out, or use folder: for pictures"):
        load_backbone(f"pair:{{picture: perpetune:micro, text: folder:{lm}}}", architecture=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pair_of_a_gguf_file_and_a_dual_encoder(dtype: str, tmp_path: Any) -> None:
    """The norm behind CLIP's last block reads the class token alone, so the states are those of the block."""
    lm, file = tiny_language_model(tmp_path / "lm"), tmp_path / "model.gguf"
    clip = dual_folder(tmp_path / "clip")
    with pytest.warns(UserWarning, match="drawn at random"):
        backbone = load_backbone(f"pair:{{picture: hf:{clip}, text: hf:{gguf_of(lm, file)}}}", dtype=dtype)
    model = VisionLanguage(backbone)
    inputs = batch(model, *TEXTS)
    assert backbone.pictures is not None
    with torch.no_grad():
        states = backbone.pictures._tower(backbone.net, pixels_of(backbone, inputs.inputs))
        vision: Any = backbone.net.get_submodule("picture_tower.vision_model")
        wanted = vision(pixels_of(backbone, inputs.inputs)).last_hidden_state[:, 1:]
    torch.testing.assert_close(states, wanted)
    for parameter in model.trained():
        parameter.requires_grad_(True)
    model.loss(task(), inputs).backward()
    assert all(bool(p.grad is not None and p.grad.abs().max() > 0) for p in model.trained())
    assert all(place.path.startswith("model.layers") for place in backbone.pet_places(["q"]))


@torch.no_grad()
def test_a_model_of_any_size_counts_its_tokens(tmp_path: Any) -> None:
    folder = tiny_vision_language(tmp_path, "qwen2_5_vl")
    for side, count in ((8, 1), (24, 9), (40, 25)):
        backbone = load_tiny_vlm(folder, "qwen2_5_vl", image_size=side)
        model = VisionLanguage(backbone)
        assert backbone.pictures is not None
        assert (backbone.pictures.count, backbone.pictures.grid) == (count, side // 8)
        encoded = view_of(model).question(TEXTS[2][0])
        assert int((encoded.ids == backbone.pictures.token).sum()) == 2 * count
        both, one = batch(model, *TEXTS[1:], ask=True).inputs, batch(model, TEXTS[2], ask=True).inputs
        torch.testing.assert_close(model.predict(both)[1], model.predict(one)[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="image_size 20 is no multiple of 8, the side of a token"):
        load_tiny_vlm(folder, "qwen2_5_vl", image_size=20)


@pytest.mark.parametrize("kind", ["llava-clip", "idefics3", "paligemma"])
def test_a_model_in_16_bits_trains_its_projector_in_32(kind: str, tmp_path: Any) -> None:
    backbone = load_tiny_vlm(tiny_vision_language(tmp_path, kind), kind, dtype="bfloat16")
    model = VisionLanguage(backbone, projector=True)
    for parameter in model.trained():
        assert parameter.dtype == torch.float32
        parameter.requires_grad_(True)
    model.loss(task(), batch(model, *TEXTS)).backward()
    assert all(bool(p.grad is not None and p.grad.abs().max() > 0) for p in model.trained())
    model.predict(batch(model, *TEXTS, ask=True).inputs)


def test_checkpoints_inside_blocks_change_no_gradient(tmp_path: Any) -> None:
    gradients = []
    for on in (False, True):
        backbone = load_tiny_vlm(
            tiny_vision_language(tmp_path / str(on), "llava-clip"), "llava-clip", gradient_checkpointing=on
        )
        places = [*backbone.pet_places(["q"]), *backbone.pet_places(["picture.q"], [0])]
        inject(backbone.net, places, lambda place: LoRA(place, torch.Generator().manual_seed(1)), "x")
        pets = [p for p in backbone.net.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(2)
        for parameter in pets:
            parameter.data.normal_(generator=generator)
        model = VisionLanguage(backbone).train()
        with using(model, "x"):
            gradients.append(torch.autograd.grad(model.loss(task(), batch(model, *TEXTS)), pets))
    for plain_, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain_, again)
        assert bool(plain_.abs().max() > 0)


def test_other_families_are_named(tmp_path: Any) -> None:
    folder = tiny_vision_language(tmp_path, "llava-vit")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"llava"', '"vipllava"'))
    with pytest.raises(UsageError, match="a 'vipllava' model is a vision-language model of another family than llava"):
        load_backbone(f"hf:{folder}")
    with pytest.raises(UsageError, match="it takes pictures of 16 pixels only: leave image_size out"):
        load_backbone(f"hf:{tiny_vision_language(tmp_path / 'b', 'llava-vit')}", image_size=SIZE * 2)
