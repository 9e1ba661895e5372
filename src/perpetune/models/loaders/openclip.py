"""The loader of dual encoders that open_clip builds: by name, with weights from the hub, or from a folder."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from perpetune.data.pictures.resize import Interpolation
from perpetune.data.pictures.view import PictureView
from perpetune.errors import PerpetuneError, UsageError, closest
from perpetune.models.backbone import Backbone, triple
from perpetune.models.loaders.causal_lm import Dtype
from perpetune.models.loaders.dual import CLIP_MEAN, CLIP_STD, check_end
from perpetune.models.loaders.hub import hub_file, one_line
from perpetune.models.loaders.options import Side, library, try_size
from perpetune.models.split_attention import SplitAttention, shared_linear
from perpetune.models.text_side import TextSide, wide
from perpetune.models.towers import with_features
from perpetune.plain import read_object

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
FILTERS: dict[str, Interpolation] = {f: f for f in get_args(Interpolation)}


def load_openclip(
    rest: str, *, pretrained: bool = True, image_size: Side | None = None, dtype: Dtype = "float32"
) -> Backbone:
    """`openclip:NAME.TAG`: the model of that name with the weights of that tag; or `openclip:FOLDER`.

    Args:
        pretrained: False gives random weights; then no tag is needed.
        image_size: side of the input in pixels, if it is not the model's own; position embeddings are interpolated.
        dtype: the type of the frozen weights.

    Raises:
        UsageError: the name or tag is unknown (the message gives the closest three), or the net cannot take pictures
            of that size.
        PerpetuneError: the weights exist only as pickle, cannot be fetched, or are not those of the model.
    """
    spec = f"openclip:{rest}"
    open_clip = library(spec, "openclip", "open_clip")
    if (folder := Path(rest).expanduser()).is_dir():
        return load_local(spec, folder, pretrained=pretrained, image_size=image_size, dtype=dtype)
    name, _, tag = rest.partition(".")
    config = open_clip.get_model_config(name.replace("/", "-"))
    if config is None:
        raise UsageError(f"{spec}: open_clip has no model {name!r}; {closest(name, open_clip.list_models())}")
    tags: list[str] = open_clip.list_pretrained_tags_by_model(name)
    if (tag and tag not in tags) or (pretrained and not tag):
        wrong = f"no weights tagged {tag!r} of {name}" if tag else "weights by tag only"
        raise UsageError(f"{spec}: open_clip has {wrong}; write {name}.TAG: {closest(tag or name, tags)}")
    of_tag: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if tag:
        config["quick_gelu"] = _activation(spec, name, bool(config.get("quick_gelu")), bool(of_tag.get("quick_gelu")))
    weights = _fetched(spec, str(of_tag.get("hf_hub", ""))) if pretrained else None
    tokenizer = _tokenizer(spec, open_clip, name)
    return _wrapped(open_clip, spec, config, of_tag, weights, tokenizer, image_size, dtype)


def load_local(
    spec: str,
    folder: Path,
    *,
    pretrained: bool = True,
    image_size: Side | None = None,
    dtype: Dtype = "float32",
) -> Backbone:
    """The dual encoder in a folder of open_clip's layout: `open_clip_config.json`, and safetensors beside it.

    Raises:
        UsageError: the config or the weights file is not there, or does not say what is needed.
        PerpetuneError: the tensors in the file are not those of the model.
    """
    open_clip = library(spec, "openclip", "open_clip")
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{spec}: there is no {CONFIG} in the folder")
    given = read_object(folder / CONFIG, f"{spec}: {CONFIG}")
    config, pictures = given.get("model_cfg"), given.get("preprocess_cfg", {})
    if not (isinstance(config, dict) and all(isinstance(config.get(k), dict) for k in ("vision_cfg", "text_cfg"))):
        raise UsageError(f"{spec}: {CONFIG} has no model_cfg with vision_cfg and text_cfg")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if pretrained and weights is None:
        raise UsageError(f"{spec}: there is no {WEIGHTS[0]} in the folder; weights as pickle are not loaded")
    tokenizer = _tokenizer(spec, open_clip, f"local-dir:{folder}")
    return _wrapped(open_clip, spec, config, pictures, weights if pretrained else None, tokenizer, image_size, dtype)


def _activation(spec: str, name: str, of_name: bool, of_tag: bool) -> bool:
    """Whether the model has QuickGELU: the weights decide. Open_clip itself only warns, and computes something else."""
    if of_name and not of_tag:
        raise UsageError(
            f"{spec}: {name} has QuickGELU, and these weights were trained with GELU: take "
            f"{name.removesuffix('-quickgelu')} with this tag"
        )
    return of_tag


def _fetched(spec: str, place: str) -> Path:
    """The weights of a tag as safetensors, from `OWNER/NAME/` or `OWNER/NAME/FILE` on the hub."""
    repository, _, file = place.rpartition("/")
    if not repository:
        raise PerpetuneError(f"{spec}: its weights come only as a pickle file, which is not loaded; choose another tag")
    names = (f"{Path(file).stem}.safetensors",) if file else WEIGHTS[:2]
    for name in names:
        if (path := hub_file(spec, repository, name)) is not None:
            return path
    raise PerpetuneError(f"{spec}: {repository} has no {names[0]}; weights as pickle are not loaded")


def _tokenizer(spec: str, open_clip: ModuleType, name: str) -> Any:
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # files of strangers make transformers fail in any way
        raise UsageError(
            f"{spec}: its tokenizer cannot be loaded: {one_line(error) or type(error).__name__}"
        ) from error


def _wrapped(
    open_clip: ModuleType,
    spec: str,
    config: Mapping[str, Any],
    pictures: Mapping[str, Any],
    weights: Path | None,
    tokenizer: Any,
    image_size: int | None,
    dtype: str,
) -> Backbone:
    net = _built(open_clip, spec, config, weights, image_size).to(getattr(torch, dtype)).eval()
    split(spec, net)
    dim = int(config["embed_dim"])
    with_features(net, dim)
    visual = net.visual
    trunk = getattr(visual, "trunk", None)  # timm's
    own = hasattr(visual, "class_embedding")
    backbone = Backbone(
        net,
        spec=spec,
        dim=dim,
        width=visual.positional_embedding.shape[-1] if own else getattr(trunk, "num_features", dim),
        preprocess=_view(spec, visual, pictures),
        forward=_features,
        prefix=1 if own else int(getattr(trunk, "num_prefix_tokens", 0)),
        class_token=own or getattr(trunk, "cls_token", None) is not None,
        texts=_texts(spec, net, tokenizer, dim),
    )
    try_size(backbone, image_size)
    return backbone


def _built(
    open_clip: ModuleType, spec: str, config: Mapping[str, Any], weights: Path | None, image_size: int | None
) -> Any:
    """The net of open_clip with its two towers `visual` and `text`, and with the weights if there are any."""
    from safetensors import SafetensorError

    config = copy.deepcopy({key: value for key, value in config.items() if key != "custom_text"})
    if "multimodal_cfg" in config:
        raise UsageError(f"{spec}: CoCa, which also writes texts, cannot be used; take another model of open_clip")
    config["text_cfg"]["hf_model_pretrained"] = config["vision_cfg"]["timm_model_pretrained"] = False
    timm = bool(config["vision_cfg"].get("timm_model_name"))
    if image_size is not None and not timm:
        config["vision_cfg"]["image_size"] = image_size
    try:
        net: Any = open_clip.CustomTextCLIP(**config)
        if weights is not None:
            open_clip.load_checkpoint(net, str(weights), strict=True)
        if image_size is not None and timm:
            net.visual.set_input_size(image_size)
    except SafetensorError as error:
        raise PerpetuneError(f"{spec}: its safetensors file cannot be read: {one_line(error)}") from error
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError, AttributeError, OSError) as error:
        raise PerpetuneError(
            f"{spec}: the model cannot be built or loaded: {one_line(error) or type(error).__name__}"
        ) from error
    return net


def split(spec: str, net: Any) -> None:
    """Make the parts of open_clip's net callable modules: attention as `SplitAttention`, projections as linear layers.

    All of them share the parameters of what they replace; `split_attention.stock_names` gives open_clip's names back.

    Raises:
        UsageError: an attention computes something else (`scaled_cosine_attn`).
    """
    for tower in (net.visual, net.text):
        transformer: Any = getattr(tower, "transformer", None)
        if not hasattr(transformer, "resblocks"):
            continue  # a tower of timm or transformers
        for block in transformer.resblocks:
            if getattr(block.attn, "logit_scale", None) is not None:
                raise UsageError(f"{spec}: its attention compares by cosine (scaled_cosine_attn), which cannot be used")
            block.attn = SplitAttention(block.attn)
        # It asks the weight of the first block's MLP, where a pet may be.
        transformer.get_cast_dtype = partial(_same, next(transformer.parameters()).dtype)
    net.visual_projection = net.text_projection = None
    if isinstance(proj := getattr(net.visual, "proj", None), nn.Parameter):
        net.visual_projection, net.visual.proj = shared_linear(proj.T), None
    proj = getattr(net.text, "text_projection", None)
    if proj is not None:
        net.text_projection = proj if isinstance(proj, nn.Linear) else shared_linear(proj.T)
        net.text.text_projection = None


def _same(dtype: torch.dtype) -> torch.dtype:
    return dtype


def _features(net: Any, pixels: Tensor) -> Tensor:
    """Projected features `(B, D)` of normalised pixels `(B, 3, H, W)`."""
    return _projected(net.visual(pixels.to(net.logit_scale.dtype)), net.visual_projection, net.picture_feature)


def _encode(net: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Projected features `(n, D)`. The net makes its own mask of the tokens."""
    return _projected(net.text(ids), net.text_projection, net.text_feature)


def _projected(pooled: Any, projection: nn.Module | None, place: nn.Module) -> Tensor:
    pooled = pooled[0] if isinstance(pooled, tuple) else pooled  # `output_tokens` gives the tokens too
    features: Tensor = place(pooled if projection is None else projection(pooled))
    return wide(features)


def _view(spec: str, visual: Any, given: Mapping[str, Any]) -> PictureView:
    size = visual.image_size
    sides = set(size) if isinstance(size, tuple | list) else {size}
    if len(sides) > 1:
        raise UsageError(f"{spec}: it takes pictures of {size} pixels, and perpetune gives it squares")
    mode = given.get("resize_mode", "shortest")
    if mode == "longest":
        warnings.warn(
            f"{spec}: open_clip pads its pictures to a square; here the centred square is cut out of them", stacklevel=2
        )
    return PictureView(
        size=int(sides.pop()),
        mean=triple(spec, given.get("mean", CLIP_MEAN)),
        std=triple(spec, given.get("std", CLIP_STD)),
        interpolation=FILTERS.get(str(given.get("interpolation")), "bicubic"),
        crop=None if mode == "squash" else 1.0,
    )


def _texts(spec: str, net: Any, tokenizer: Any, dim: int) -> TextSide:
    """The text side.

    A causal tower that reads the end token of a text gets texts of their own length. A tower of transformers makes a
    mask. Every other tower sees padding, so its texts are padded to the full length.
    """
    text = net.text
    length = int(tokenizer.context_length)
    inner = getattr(tokenizer, "tokenizer", None)  # of transformers; None is open_clip's own, which pads with 0
    pad = int(getattr(inner, "pad_token_id", None) or 0)
    if hasattr(text, "token_embedding"):
        rows, length = text.token_embedding.num_embeddings, min(length, int(text.context_length))
        causal = text.attn_mask is not None and text.cls_emb is None and text.pool_type in ("argmax", "eos")
        fixed, masked = not causal, causal
    else:
        rows, fixed, masked = int(text.config.vocab_size), False, True
    tokenise = partial(tokens_of, tokenizer, length, pad)
    side = TextSide(
        net,
        spec=spec,
        dim=dim,
        tokenise=tokenise,
        encode=_encode,
        length=length,
        rows=rows,
        pad=pad,
        fixed=fixed,
        masked=masked,
        vocabulary=tokenizer.encoder if inner is None else inner.get_vocab(),
    )
    if hasattr(text, "token_embedding") and text.pool_type in ("argmax", "eos"):
        check_end(spec, text.eos_id if text.pool_type == "eos" else None, tokenise)
    return side


def tokens_of(tokenizer: Any, length: int, pad: int, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
    """The tokens of each text by a tokenizer of open_clip, at most `length`, and whether its end was cut off."""
    rows = tokenizer(list(texts), context_length=length).tolist()
    full = [number for number, row in enumerate(rows) if row[-1] != pad]
    longer = tokenizer([texts[number] for number in full], context_length=2 * length) if full else ()
    cut = {number for number, row in zip(full, longer, strict=True) if (row[length:] != pad).any()}
    for row in rows:
        while len(row) > 1 and row[-1] == pad:
            row.pop()
    return rows, [number in cut for number in range(len(rows))]
