"""The loader of dual encoders by transformers: CLIP, SigLIP, SigLIP2, or a picture model beside a text model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone, Forward
from perpetune.models.loaders import vit
from perpetune.models.loaders.causal_lm import Dtype
from perpetune.models.loaders.checkpoint import config_of, model_of
from perpetune.models.loaders.hub import one_line
from perpetune.models.loaders.options import Side, side_of, try_size
from perpetune.models.text_side import PROBES, TextSide, Tokenise, wide
from perpetune.models.towers import with_features

BOTH = "vision-text-dual-encoder"
FAMILIES = ("clip", "siglip", "siglip2", BOTH)
"""`model_type` of the dual encoders."""

# Tensors of older checkpoints that are counted anew.
POSITIONS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def load(
    spec: str,
    source: str,
    config: Any = None,
    *,
    pretrained: bool = True,
    image_size: Side | None = None,
    dtype: Dtype = "float32",
) -> Backbone:
    """The dual encoder at `source`, a folder or an id on the hub, with its tokenizer; safetensors only.

    The features are those of a picture in the space that it shares with texts, not normalised. `backbone.texts` reads
    texts.

    Args:
        config: the result of `config_of`, if the caller has it already.
        pretrained: False gives random weights.
        image_size: side of the input in pixels, if it is not the model's own; position embeddings are interpolated.
        dtype: the type of the frozen weights.

    Raises:
        UsageError: there is no such model or tokenizer, its parts do not fit each other, or it cannot take pictures of
            that size.
        PerpetuneError: the tensors in the checkpoint are not those of the model; the message names them.
    """
    config = config or config_of(spec, source)
    if config.model_type not in FAMILIES:
        raise UsageError(f"{spec}: a {config.model_type!r} model is no dual encoder: {', '.join(FAMILIES)}")
    pictures = config.vision_config
    channels = getattr(pictures, "num_channels", 3)
    if channels != 3:
        raise UsageError(f"{spec}: it takes pictures of {channels} channel(s), and perpetune gives it 3 (RGB)")
    kind = pictures.model_type if config.model_type == BOTH else config.model_type
    own = _own_side(spec, kind, pictures)
    preprocess = vit.preprocess_of(spec, source, SimpleNamespace(image_size=own), image_size, _usual(kind, own))
    tokenizer = _tokenizer(spec, source)
    net = model_of(spec, source, config, pretrained=pretrained, dtype=dtype, ignored=POSITIONS)
    dim = pictures.hidden_size if config.model_type.startswith("siglip") else config.projection_dim
    with_features(net, dim)
    if kind.startswith("siglip2"):
        warnings.warn(
            f"{spec}: its pictures are squeezed to a square of {preprocess.size} pixels; it was trained on pictures "
            "that keep their shape",
            stacklevel=2,
        )
        forward: Forward = partial(_patches, patch=pictures.patch_size)
    else:
        interpolates = vit.FAMILIES.get(kind, True) and preprocess.size != own
        forward = partial(_pictures, interpolate_pos_encoding=True) if interpolates else _pictures
    tokens = not kind.startswith("siglip")
    backbone = Backbone(
        net,
        spec=spec,
        dim=dim,
        width=pictures.hidden_size,
        preprocess=preprocess,
        forward=forward,
        prefix=(1 + getattr(pictures, "num_register_tokens", 0) + (kind == "deit")) if tokens else 0,
        class_token=tokens,
        texts=_texts(spec, net, config.text_config, tokenizer, dim),
    )
    try_size(backbone, image_size)
    return backbone


def _pictures(net: Any, pixels: Tensor, **options: Any) -> Tensor:
    """Projected features `(B, D)` of normalised pixels `(B, 3, H, W)`."""
    pooled: Tensor = net.get_image_features(pixel_values=pixels.to(net.dtype), **options).pooler_output
    features: Tensor = net.picture_feature(pooled)
    return wide(features)


def _patches(net: Any, pixels: Tensor, *, patch: int) -> Tensor:
    """As `_pictures`, for a model that takes patches `(B, N, patch · patch · 3)` instead of pixels."""
    rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
    cut = pixels.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # (B, 3, rows, patch, columns, patch)
    patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), rows * columns, -1)
    shape = torch.tensor([[rows, columns]], device=pixels.device).expand(len(pixels), 2)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
    return _pictures(net, patches, pixel_attention_mask=mask, spatial_shapes=shape)


def _own_side(spec: str, kind: str, config: Any) -> int:
    """The side, in pixels, of the pictures that the model was trained with."""
    if kind.startswith("siglip2"):
        return math.isqrt(config.num_patches) * int(config.patch_size)
    return side_of(spec, config.image_size)


def _usual(kind: str, side: int) -> dict[str, Any] | None:
    """What `preprocessor_config.json` says in this family if nobody changed it; None if it says many things."""
    if kind.startswith("clip"):
        crop = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": side}
        return {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3, **crop}
    if kind.startswith("siglip"):
        half, filter_ = (0.5, 0.5, 0.5), 2 if kind.startswith("siglip2") else 3
        return {"image_mean": half, "image_std": half, "resample": filter_, "size": side}
    return None


def _texts(spec: str, net: nn.Module, config: Any, tokenizer: Any, dim: int) -> TextSide:
    """The text side.

    SigLIP reads the last position of a text that is padded to its full length, and its padding is part of the text
    unless its tokenizer makes a mask.
    """
    fixed = str(config.model_type).startswith("siglip")
    positions = int(config.max_position_embeddings)
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):  # their positions begin behind the padding token's
        positions -= int(config.pad_token_id) + 1
    known = tokenizer.model_max_length  # a number of 30 digits if the tokenizer gives none
    length = positions if fixed else min(positions, int(known))
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    tokenise = partial(tokens_of, tokenizer, length)
    side = TextSide(
        net,
        spec=spec,
        dim=dim,
        tokenise=tokenise,
        encode=_encode,
        length=length,
        rows=int(config.vocab_size),
        pad=pad,
        fixed=fixed,
        masked=not fixed or "attention_mask" in tokenizer.model_input_names,
        vocabulary=tokenizer.get_vocab(),
    )
    if str(config.model_type).startswith("clip"):
        # Where the config says 2, as OpenAI's does, transformers reads the highest token of a text.
        check_end(spec, None if config.eos_token_id == 2 else config.eos_token_id, tokenise)
    return side


def _encode(net: Any, ids: Tensor, mask: Tensor) -> Tensor:
    pooled: Tensor = net.get_text_features(input_ids=ids, attention_mask=mask.long()).pooler_output
    features: Tensor = net.text_feature(pooled)
    return features


def tokens_of(tokenizer: Any, length: int, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
    """The tokens of each text by a tokenizer of transformers, at most `length`, and whether its end was cut off."""
    ask: Callable[..., Mapping[str, Any]] = partial(tokenizer, list(texts), padding=False, verbose=False)
    made = ask(truncation=True, max_length=length)
    if tokenizer.is_fast:
        return made["input_ids"], [bool(one.overflowing) for one in made.encodings]  # type: ignore[attr-defined]
    return made["input_ids"], [len(ids) > length for ids in ask()["input_ids"]]


def check_end(spec: str, end: int | None, tokenise: Tokenise) -> None:
    """Raise UsageError if a tower would not read a text at its last token.

    Args:
        end: the token at which it reads a text; None is the highest one.
    """
    for ids in tokenise(PROBES)[0]:
        at = ids.index(max(ids)) if end is None else ids.index(end) if end in ids else 0
        if at != len(ids) - 1:
            wanted = "the highest token" if end is None else f"token {end}"
            raise UsageError(
                f"{spec}: its text tower reads a text at {wanted}, and its tokenizer does not end a text with it: the "
                "tokenizer belongs to another model"
            )


def _tokenizer(spec: str, source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a file of strangers makes transformers fail in any way
        raise UsageError(
            f"{spec}: its tokenizer cannot be loaded: {one_line(error) or type(error).__name__}"
        ) from error
    if not len(tokenizer):
        raise UsageError(f"{spec}: it has no tokenizer: tokenizer.json is expected beside config.json")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer
