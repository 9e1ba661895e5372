"""Dual encoders of transformers: two towers in one backbone, and texts that become what the model was trained on."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import DUAL, SIZE, dual_folder, dual_tokenizer, picture_folder, recipe, split_folder
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune import Learner
from perpetune.build import load_backbone
from perpetune.errors import PerpetuneError, UsageError
from perpetune.export import export_learned
from perpetune.models.backbone import Backbone
from perpetune.models.text_side import TextSide
from perpetune.pets import inject, parameters, pets, using
from perpetune.pets.adapter import Adapter
from perpetune.pets.base import copy_set, outermost, submodule
from perpetune.pets.lora import LoRA
from perpetune.pets.prefix import Prefix
from perpetune.pets.prompt import Prompt
from perpetune.pets.ssf import SSF
from perpetune.protection import sites
from perpetune.seeding import generator

TEXTS = ("a photo of a cat.", "The quick brown fox jumps", "dog", "is this review good or bad?")
PIXELS = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: dual_folder(tmp_path_factory.mktemp(kind.split()[0]), kind) for kind in DUAL}


def load(folder: Path, **options: Any) -> Backbone:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "folder:.*: its pictures are squeezed to a square")
        return load_backbone(f"folder:{folder}", **options)


def side(backbone: Backbone) -> TextSide:
    assert backbone.texts is not None
    return backbone.texts


def stock(folder: Path, texts: Any, pixels: Tensor) -> Tensor:
    """`logits_per_image` of the folder by transformers alone; pixels are normalised."""
    from transformers import AutoModel, AutoTokenizer

    net = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    siglip = net.config.model_type.startswith("siglip")
    length = net.config.text_config.max_position_embeddings
    padding = {"padding": "max_length", "max_length": length} if siglip else {"padding": True}
    asked = tokenizer(list(texts), return_tensors="pt", padding_side="right", **padding)
    asked = {name: value for name, value in asked.items() if name in ("input_ids", "attention_mask")}
    if net.config.model_type == "siglip2":
        from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

        patches = torch.stack([convert_image_to_patches(one, 8) for one in pixels])
        ones = torch.ones(patches.shape[:2], dtype=torch.int32)
        shapes = torch.tensor([[2, 2]]).expand(len(pixels), 2)
        asked |= {"pixel_values": patches, "pixel_attention_mask": ones, "spatial_shapes": shapes}
    else:
        asked["pixel_values"] = pixels
    with torch.no_grad():
        logits: Tensor = net(**asked).logits_per_image
    return logits


@torch.no_grad()
def scores(backbone: Backbone, texts: Any = TEXTS, pixels: Tensor = PIXELS) -> Tensor:
    texts_of = side(backbone)
    cosines = F.normalize(backbone.features(pixels), dim=-1) @ F.normalize(texts_of.of(texts), dim=-1).T
    return texts_of.scale * cosines + (0 if texts_of.bias is None else texts_of.bias)


@pytest.mark.parametrize("kind", DUAL)
def test_scores_are_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    backbone = load(folders[kind])
    backbone.check()
    normalised = (PIXELS / 255 - backbone.mean) / backbone.std
    expected = stock(folders[kind], TEXTS, normalised)
    assert expected.std() > 0.1
    torch.testing.assert_close(scores(backbone), expected, atol=1e-5, rtol=1e-5)
    texts = side(backbone)
    assert (texts.dim, backbone.dim) == ((16, 16) if "Siglip" in kind else (8, 8))
    assert texts.scale.dim() == 0
    torch.testing.assert_close(texts.scale, torch.tensor(2.0).exp())
    assert (texts.bias is not None) == ("Siglip" in kind)


@pytest.mark.parametrize("kind", DUAL)
def test_a_text_does_not_depend_on_the_texts_beside_it(folders: dict[str, Path], kind: str) -> None:
    texts = side(load(folders[kind]))
    with torch.no_grad():
        together = texts.of(TEXTS)
        for number, text in enumerate(TEXTS):
            torch.testing.assert_close(texts.of([text])[0], together[number], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(texts.of(TEXTS, batch=2), together, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(texts.of(TEXTS[::-1]).flip(0), together, atol=1e-5, rtol=1e-5)
        made = texts.inputs(TEXTS)
        assert made.ids.shape[1] == (24 if "Siglip" in kind else int(made.mask.sum(1).max()))
        assert torch.equal(made.mask, made.mask.sort(dim=1, descending=True).values)  # padding is on the right
        torch.testing.assert_close(texts.encode(made), together, atol=1e-5, rtol=1e-5)


def off(wrong: Tensor, right: Tensor) -> float:
    return float((wrong - right).norm(dim=-1).div(right.norm(dim=-1)).max())


def test_control_left_padding_and_no_padding_are_something_else(folders: dict[str, Path]) -> None:
    """What would be computed without right padding, and without the full length that SigLIP wants."""
    clip, siglip = (load(folders[kind]) for kind in ("CLIP", "Siglip"))
    with torch.no_grad():
        made, right = side(clip).inputs(TEXTS), side(clip).of(TEXTS)
        lengths = made.mask.sum(1)
        rolled = torch.stack(
            [torch.roll(ids, made.ids.shape[1] - int(n)) for ids, n in zip(made.ids, lengths, strict=True)]
        )
        mask = torch.arange(made.ids.shape[1]) >= (made.ids.shape[1] - lengths)[:, None]
        net: Any = clip.net
        left = net.get_text_features(input_ids=rolled, attention_mask=mask.long()).pooler_output
        assert off(left, right) > 0.1
        full = torch.nn.functional.pad(made.ids, (0, 40 - made.ids.shape[1]))
        uncut = net.get_text_features(input_ids=full).pooler_output  # a causal tower needs no mask
        torch.testing.assert_close(uncut, right, atol=1e-5, rtol=1e-5)
        net = siglip.net
        ids = side(siglip).inputs(TEXTS[:1]).ids[:, : len(dual_tokenizer("Siglip")(TEXTS[0])["input_ids"])]
        assert off(net.get_text_features(input_ids=ids).pooler_output, side(siglip).of(TEXTS[:1])) > 0.1


def test_siglip_with_a_mask_pads_all_the_same_and_its_last_position_counts(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["Siglip"], tmp_path / "masked"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    backbone = load(folder)
    normalised = (PIXELS / 255 - backbone.mean) / backbone.std
    torch.testing.assert_close(scores(backbone), stock(folder, TEXTS, normalised), atol=1e-5, rtol=1e-5)
    assert not side(backbone).inputs(TEXTS).mask.all()
    assert off(side(backbone).of(TEXTS), side(load(folders["Siglip"])).of(TEXTS)) > 1e-3
    put(backbone, "text.q")
    lengths = side(backbone).inputs(TEXTS).mask.sum(1)
    assert set(counts(backbone, texts=True).values()) == {int(lengths.sum()) + len(TEXTS)}  # the last one is read


def put(backbone: Backbone, *at: str, kind: Any = LoRA, name: str = "default", **options: Any) -> list[nn.Parameter]:
    given = {"rank": 2, **options} if kind is LoRA else options
    places = backbone.pet_places(list(at))
    inject(backbone.net, places, lambda place: kind(place, generator("dual", place.path), **given), name)
    return parameters(backbone.net, name)


def shake(changed: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(changed):
            parameter.add_(torch.randn(parameter.shape, generator=generator("shake", number)) * 0.3)


@pytest.mark.parametrize("kind", DUAL)
def test_pets_reach_every_tower_and_leave_the_other_bit_for_bit(folders: dict[str, Path], kind: str) -> None:
    backbone = load(folders[kind])
    plain = backbone.features(PIXELS), side(backbone).of(TEXTS)
    for tower in ("picture", "text"):
        pieces: list[tuple[Any, list[str]]] = [(LoRA, ["q", "v", "out"]), (Prefix, ["attn"])]
        pieces += [] if kind == "ViT and BERT" and tower == "text" else [(Adapter, ["mlp"]), (SSF, ["operations"])]
        for pet, roles in pieces:
            known = (*backbone.roles(), f"{tower}.operations")
            at = [f"{tower}.{r}" for r in roles if f"{tower}.{r}" in known]
            name = f"{tower}-{pet.__name__}"
            changed = put(backbone, *at, kind=pet, name=name)
            with using(backbone.net, name):
                if not pet.adds_tokens:  # before any training nothing moves
                    assert torch.equal(backbone.features(PIXELS), plain[0])
                    assert torch.equal(side(backbone).of(TEXTS), plain[1])
                shake(changed)
                moved = backbone.features(PIXELS), side(backbone).of(TEXTS)
            assert torch.equal(moved[0], plain[0]) == (tower == "text")
            assert torch.equal(moved[1], plain[1]) == (tower == "picture")
            sum(f.square().sum() for f in moved).backward()  # type: ignore[union-attr]
            assert all(p.grad is not None and p.grad.any() for p in changed), name


@pytest.mark.parametrize("kind", DUAL)
def test_a_pet_at_q_leaves_k_and_v(folders: dict[str, Path], kind: str) -> None:
    backbone = load(folders[kind])
    for tower in ("picture", "text"):
        shake(put(backbone, f"{tower}.q", name=tower))
        q, k, v = (backbone.pet_places([f"{tower}.{role}"])[0].path for role in "qkv")
        seen: dict[str, Tensor] = {}
        for path in (q, k, v):
            outermost(backbone.net, path).register_forward_hook(
                lambda _m, _a, output, path=path, seen=seen: seen.__setitem__(path, output)
            )

        with torch.no_grad():
            backbone.features(PIXELS), side(backbone).of(TEXTS)
            bare = dict(seen)
            with using(backbone.net, tower):
                backbone.features(PIXELS), side(backbone).of(TEXTS)
        tuned = dict(seen)
        assert [torch.equal(bare[path], tuned[path]) for path in (q, k, v)] == [False, True, True]


@pytest.mark.parametrize("kind", ["CLIP", "ViT and BERT"])
def test_a_prefix_is_more_keys_and_values_and_a_causal_tower_stays_causal(folders: dict[str, Path], kind: str) -> None:
    backbone = load(folders[kind])
    put(backbone, "text.attn", kind=Prefix, length=3, std=1.0)
    place, pet = backbone.pet_places(["text.attn"])[0], pets(backbone.net, "default")[0]
    q, k, v = (submodule(backbone.net, backbone.pet_places([f"text.{r}"])[0].path) for r in "qkv")
    assert isinstance(pet, Prefix)
    caught: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        caught.update(x=args[0] if args else kwargs["hidden_states"], y=output[0])

    outermost(backbone.net, place.path).register_forward_hook(keep, with_kwargs=True)
    made = side(backbone).inputs(TEXTS)
    with torch.no_grad(), using(backbone.net, "default"):
        side(backbone).encode(made)
        x, y = caught["x"], caught["y"]
        first = made.ids.clone()
        first[:, 3] = 77
        other = made.mask.clone()
        caught.clear()
        side(backbone).encode(type(made)(ids=first, mask=other))
        before = torch.equal(caught["y"][:, :3], y[:, :3])
    assert before == (kind == "CLIP")  # a later token changes no earlier one
    with torch.no_grad():
        heads = [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q(x), k(x), v(x))]  # type: ignore[misc]
        keys = torch.cat([pet._by_head(pet.keys).expand(len(x), -1, -1, -1), heads[1]], 2)
        values = torch.cat([pet._by_head(pet.values).expand(len(x), -1, -1, -1), heads[2]], 2)
        weights = heads[0] @ keys.mT / 8**0.5
        width = x.shape[1]
        sees = made.mask[:, None, None].expand(-1, 1, width, -1)
        sees = sees & torch.ones(width, width, dtype=torch.bool).tril() if kind == "CLIP" else sees
        sees = torch.cat([torch.ones(*sees.shape[:-1], 3, dtype=torch.bool), sees], -1)
        mixed = (weights.masked_fill(~sees, -torch.inf).softmax(-1) @ values).transpose(1, 2).flatten(2)
        if kind == "CLIP":
            mixed = submodule(backbone.net, f"{place.path}.out_proj")(mixed)  # type: ignore[misc]
    torch.testing.assert_close(y[made.mask], mixed[made.mask], atol=1e-5, rtol=1e-5)


def counts(backbone: Backbone, texts: bool = False, mask: Tensor | None = None) -> dict[str, int]:
    """The number of rows that protection counts at each site."""
    watched, _, _ = sites.pet_sites(backbone, "exact")
    watch = sites.Watch(watched)
    watch.mask = mask
    with torch.no_grad(), using(backbone.net, "default"), watch.on():
        if texts:
            side(backbone).encode(side(backbone).inputs(TEXTS))
        else:
            backbone.features(PIXELS)
    return {name: moments.count for name, moments in watch.moments.items()}


@pytest.mark.parametrize("kind", DUAL)
def test_a_mask_belongs_to_the_tower_that_reads_the_texts(folders: dict[str, Path], kind: str) -> None:
    backbone = load(folders[kind])
    put(backbone, "picture.q", "text.q")
    tokens = 4 + (kind in ("CLIP", "ViT and BERT"))  # 2 x 2 patches, and a class token
    mask = torch.zeros(len(PIXELS), tokens, dtype=torch.bool)
    mask[:, :2] = True  # a batch of texts whose size happens to be that of the pictures' tokens
    seen = counts(backbone, mask=mask)
    assert set(seen.values()) == {len(PIXELS) * tokens}
    made = side(backbone).inputs(TEXTS)
    assert set(counts(backbone, texts=True).values()) == {int(made.mask.sum())}
    assert set(counts(backbone, texts=True, mask=mask).values()) == {int(made.mask.sum())}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", DUAL)
def test_pets_in_a_net_of_half_precision_are_float32_and_small_steps_arrive(
    folders: dict[str, Path], kind: str, dtype: str
) -> None:
    backbone = load(folders[kind], dtype=dtype)
    assert {p.dtype for p in backbone.net.parameters()} == {getattr(torch, dtype)}
    changed = put(backbone, "picture.q", "text.v") + put(
        backbone, "picture.attn", "text.attn", kind=Prefix, name="more"
    )
    shake(changed)
    with using(backbone.net, ("default", "more")):
        result = backbone.features(PIXELS), side(backbone).of(TEXTS)
    assert {f.dtype for f in result} == {torch.float32}
    assert {p.dtype for p in changed} == {torch.float32}
    torch.testing.assert_close(result[0], result[0].nan_to_num())
    for parameter in changed:
        parameter.grad = torch.full_like(parameter, 1e-3)
    before = [p.detach().clone() for p in changed]
    torch.optim.SGD(changed, lr=1e-3).step()
    assert all(bool((a != b).all()) for a, b in zip(before, changed, strict=True))


@pytest.mark.parametrize("kind", DUAL)
def test_taps_read_the_tokens_of_the_picture_tower(folders: dict[str, Path], kind: str) -> None:
    backbone = load(folders[kind], taps=2)
    both = kind in ("CLIP", "ViT and BERT")
    own = side(backbone).dim  # stands before the columns of taps, and is what texts are compared with
    assert backbone.dim == backbone.features(PIXELS).shape[1] == own + 16 * 2 * (2 if both else 1)
    assert backbone.tap(None).dim == backbone.features(PIXELS).shape[1] == side(backbone).dim


@pytest.mark.parametrize("kind", DUAL)
def test_the_parts_beside_the_blocks_have_roles(folders: dict[str, Path], kind: str) -> None:
    backbone = load(folders[kind])
    found = {place.roles[0]: place for place in backbone.pet_places(["text.embed", "text.feature"])}
    both = backbone.pet_places(["feature", "text.feature"])
    assert [place.path for place in both] == ["picture_feature", "text_feature"]
    assert found["embed"].module is backbone.net.get_submodule(found["embed"].path)
    assert (found["embed"].d_in, found["feature"].d_in) == (16, side(backbone).dim)
    outs = {"CLIP": ["visual_projection", "text_projection"], "ViT and BERT": ["visual_projection", "text_projection"]}
    wanted = outs.get(kind, ["text_model.head"])
    roles = [f"{t}.out" for t in ("picture", "text") if f"{t}.out" in backbone.roles()]
    assert [p.path for p in backbone.pet_places(roles)] == wanted
    assert ("norm_pre" in backbone.roles()) == (kind == "CLIP")
    caught: list[Tensor] = []
    outermost(backbone.net, "text_feature").register_forward_hook(lambda _m, _a, output: caught.append(output))
    features = side(backbone).of(TEXTS[:2])
    assert torch.equal(torch.cat(caught), features) or torch.equal(torch.cat(caught).flip(0), features)


def test_a_copy_of_the_backbone_reads_texts_by_its_own_tower(folders: dict[str, Path]) -> None:
    backbone = load(folders["CLIP"])
    other = copy.deepcopy(backbone)
    assert side(other).net is other.net
    assert copy.deepcopy(side(backbone)) is side(backbone)  # what merely holds it shares the tower
    shake(put(other, "text.q"))
    with using(other.net, "default"):
        assert not torch.equal(side(other).of(TEXTS), side(backbone).of(TEXTS))


def test_the_fingerprint_knows_weights_of_both_towers_and_the_tokenizer(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    first = load(folders["CLIP"]).fingerprint()
    assert load(folders["CLIP"]).fingerprint() == first
    folder = Path(shutil.copytree(folders["CLIP"], tmp_path / "upper"))
    described = json.loads((folder / "tokenizer.json").read_text())
    described["normalizer"] = None  # texts are not lowered
    (folder / "tokenizer.json").write_text(json.dumps(described))
    assert load(folder).fingerprint() != first
    assert load(dual_folder(tmp_path / "other", seed=1)).fingerprint() != first


def test_a_text_that_is_too_long_loses_its_end_and_that_is_said_once(folders: dict[str, Path]) -> None:
    for kind in DUAL:
        texts = side(load(folders[kind]))
        long, length = "the fox " * 60, texts.length
        with pytest.warns(
            UserWarning, match=f"takes {length} tokens; longer texts lose their end: the fox the"
        ) as said:
            made = texts.inputs([long, "dog"])
        assert len(said) == 1
        assert made.ids.shape == (2, length)
        if kind != "Siglip" and kind != "Siglip2":
            assert int(made.ids[0, -1]) == 3  # the end token is kept
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            texts.inputs([long])
        with pytest.warns(UserWarning, match="lose their end: dog dog"):
            texts.inputs([long, "dog " * 60])


def test_texts_that_cannot_be_read_are_refused(folders: dict[str, Path]) -> None:
    texts = side(load(folders["CLIP"]))
    for bad in (["cat", ""], ["cat", " \n"]):
        with pytest.raises(UsageError, match="text 1 is empty"):
            texts.of(bad)
    assert texts.of([]).shape == (0, 8)
    assert texts.of(["cat", "cat"])[0].tolist() == texts.of(["cat", "cat"])[1].tolist()
    names = [f"thing number {n}" for n in range(1100)]
    with torch.no_grad():
        assert texts.of(names).shape == (1100, 8)


def test_openais_own_config_reads_texts_at_the_highest_token(tmp_path: Path) -> None:
    """There `eos_token_id` is 2, and the end token is the last one of the vocabulary."""
    folder = dual_folder(tmp_path, eos_token_id=2)
    with pytest.raises(
        UsageError, match="reads a text at the highest token, and its tokenizer does not end a text with"
    ):
        load(folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    last = len(described["model"]["vocab"])
    described["model"]["vocab"]["<end>"] = last
    described["added_tokens"].append({**described["added_tokens"][3], "id": last, "content": "<end>"})
    described["post_processor"]["special_tokens"]["<eos>"] = {"id": "<eos>", "ids": [last], "tokens": ["<end>"]}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    backbone = load(dual_folder_like(folder, tmp_path / "more", last + 1))
    normalised = (PIXELS / 255 - backbone.mean) / backbone.std
    torch.testing.assert_close(scores(backbone), stock(tmp_path / "more", TEXTS, normalised), atol=1e-5, rtol=1e-5)


def dual_folder_like(folder: Path, new: Path, vocabulary: int) -> Path:
    """A new CLIP with another number of tokens and the tokenizer of `folder`."""
    dual_folder(new, eos_token_id=2, vocab_size=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, new / name)
    return new


@pytest.mark.parametrize("kind", DUAL)
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, kind: str) -> None:
    folder = dual_folder(tmp_path, kind, vocab_size=70)
    with pytest.raises(
        UsageError, match=r"its tokenizer turns .* into token .*, and its text tower knows 70: they do not"
    ):
        load(folder)


def test_faults_of_a_folder_are_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    def changed(name: str, change: Any) -> Path:
        folder = Path(shutil.copytree(folders["CLIP"], tmp_path / name))
        change(folder)
        return folder

    def without(*names: str) -> Any:
        return lambda folder: [(folder / name).unlink() for name in names]

    def config(**values: Any) -> Any:
        def write(folder: Path) -> None:
            given = json.loads((folder / "config.json").read_text())
            given["vision_config"].update(values)
            (folder / "config.json").write_text(json.dumps(given))

        return write

    for name, change, said in (
        ("tokenizer", without("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
        ("weights", without("model.safetensors"), "cannot be built or loaded"),
        ("layers", config(num_hidden_layers=4), "does not hold this model's tensors; missing"),
        ("huge", config(hidden_size=10**9), "hidden_size in its config is 1000000000; a whole number"),
        ("grey", config(num_channels=1), "takes pictures of 1 channel"),
    ):
        with pytest.raises(PerpetuneError, match=said) as caught:
            load(changed(name, change))
        assert "\n" not in str(caught.value)
    with pytest.raises(
        UsageError, match="this is a dual encoder, which takes pretrained, image_size, dtype, but not chat"
    ):
        load(folders["CLIP"], chat=True)
    assert not torch.equal(scores(load(folders["CLIP"], pretrained=False)), scores(load(folders["CLIP"])))


@pytest.mark.parametrize("kind", DUAL)
def test_pictures_of_another_size(folders: dict[str, Path], kind: str) -> None:
    backbone = load(folders[kind], image_size=24)
    assert backbone.preprocess.extent == "size=24"
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    assert backbone.features(pixels).shape == (2, backbone.dim)


def test_what_is_done_with_pictures_is_the_familys_where_no_file_says_it(tmp_path: Path) -> None:
    from perpetune.data.pictures.view import PictureView

    for kind, mean, filter_, crop in (
        ("CLIP", 0.48145466, "bicubic", 1.0),
        ("Siglip", 0.5, "bicubic", None),
        ("Siglip2", 0.5, "bilinear", None),
    ):
        folder = dual_folder(tmp_path / kind, kind)
        (folder / "preprocessor_config.json").unlink()
        with pytest.warns(UserWarning, match="has no preprocessor_config.json: what its family usually does"):
            view = load(folder).preprocess
        assert isinstance(view, PictureView)
        assert (view.size, view.mean[0], view.interpolation, view.crop) == (16, mean, filter_, crop)
        inner = {"image_mean": [0.2] * 3, "image_std": [0.3] * 3, "resample": 1}  # as transformers 5 writes it
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
        view = load(folder).preprocess
        assert isinstance(view, PictureView)
        assert (view.size, view.mean[0], view.std[0], view.interpolation) == (16, 0.2, 0.3, "lanczos")


def test_siglip2_says_that_pictures_lose_their_shape(folders: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match="squeezed to a square of 16 pixels"):
        load_backbone(f"folder:{folders['Siglip2']}")


@pytest.mark.shared
def test_the_shared_dual_encoder_scores_exactly_as_transformers(shared: Path) -> None:
    folder = shared / "models" / "dual-encoder"
    backbone = load(folder)
    pixels = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = ["a photo of a cat.", "a photo of a red panda.", "dog"]
    normalised = (pixels / 255 - backbone.mean) / backbone.std
    expected = stock(folder, names, normalised)
    torch.testing.assert_close(scores(backbone, names, pixels), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        from transformers import AutoModel, AutoTokenizer

        net = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        asked = AutoTokenizer.from_pretrained(folder)(names, return_tensors="pt", padding=True)
        assert torch.equal(
            side(backbone).encode(side(backbone).inputs(names)), net.get_text_features(**asked).pooler_output
        )
        assert torch.equal(backbone.features(pixels), net.get_image_features(pixel_values=normalised).pooler_output)


def test_a_shallow_prompt_through_norm_pre_stands_before_that_norm(folders: dict[str, Path]) -> None:
    """As S-Prompts and PGP have it: tokens beside the embedded patches. Where among them does not matter."""
    backbone = load(folders["CLIP"]).double()
    (tokens,) = put(backbone, "block", kind=Prompt, deep=False, through="norm_pre", length=4, std=1.0)
    put(backbone, "block", kind=Prompt, deep=False, length=4, std=1.0, name="behind")
    net: Any = backbone.net
    tower = net.vision_model
    with torch.no_grad():
        with using(backbone.net, "default"):
            ours = backbone.features(PIXELS)
        with using(backbone.net, "behind"):
            behind = backbone.features(PIXELS)
        embedded = tower.embeddings((PIXELS.double() / 255 - backbone.mean) / backbone.std)
        for at in (1, 3, embedded.shape[1]):
            mixed = torch.cat([embedded[:, :at], tokens.expand(len(PIXELS), -1, -1), embedded[:, at:]], 1)
            made = tower.encoder(inputs_embeds=tower.pre_layrnorm(mixed)).last_hidden_state
            expected = net.visual_projection(tower.post_layernorm(made[:, 0]))
            torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
        assert off(behind, ours) > 1e-3
    copy_set(backbone.net, "default", "copy")
    copied = pets(backbone.net, "copy")[0]
    assert isinstance(copied, Prompt)
    assert copied.place.before is tower.pre_layrnorm
    for kind, options in (("Siglip", {"deep": False}), ("CLIP", {})):
        with pytest.raises(UsageError, match=r"through: norm_pre is for deep: false in a net with a norm before"):
            put(load(folders[kind]), "attn" if not options else "block", kind=Prompt, through="norm_pre", **options)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip2"])
def test_any_head_learns_on_a_dual_encoder_and_comes_back(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    pictures = split_folder(tmp_path / "pictures", ["cat", "elk", "fox", "owl"], 8, 4)
    pet = {"name": "lora", "at": ["picture.q", "picture.v"], "rank": 2}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*squeezed to a square")
        for number, head in enumerate(("linear", "ridge")):
            plan = recipe(folders[kind], pictures, pet=pet, head=head, protect=True)
            learner = Learner(plan, tmp_path / f"state{number}")
            learner.run()
            asked = sorted(picture_folder(tmp_path / "new", ["cat", "owl"], 2, first=50).rglob("*.png"))
            assert Learner.load(tmp_path / f"state{number}").predict(asked) == learner.predict(asked)


def test_an_export_says_that_the_own_feature_stands_before_taps(folders: dict[str, Path], tmp_path: Path) -> None:
    data = split_folder(tmp_path / "data", ["cat", "dog"], 4, 2)
    backbone = {"name": f"folder:{folders['CLIP']}", "taps": 2}
    learner = Learner(recipe(folders["CLIP"], data, backbone=backbone, head="ridge", method="frozen", pet="none"))
    learner.run()
    with pytest.warns(UserWarning, match=r"head.json does not say it either"):
        export_learned(learner.method, learner.backbone, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "head.json").read_text())
    weight = load_file(tmp_path / "out" / "head.safetensors")["weight"]
    assert weight.shape[1] == about["own"] + about["taps"] * len(about["tokens"]) * 16
