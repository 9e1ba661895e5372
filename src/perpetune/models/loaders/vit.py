"""The loader of vision transformers by transformers: an id on the hub or a local folder in its layout."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from perpetune.data.pictures.resize import Interpolation
from perpetune.data.pictures.view import PictureView
from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone, triple
from perpetune.models.loaders.checkpoint import config_of, model_of
from perpetune.models.loaders.hub import hub_file
from perpetune.models.loaders.options import Side, in_4bit, side_of, try_size
from perpetune.plain import read_object

# `model_type` of the families whose feature is the class token after the final norm. True if the family interpolates
# its position embeddings only with a keyword.
FAMILIES = {
    "vit": True,
    "deit": True,
    "vit_msn": True,
    "dinov2": False,
    "dinov2_with_registers": False,
    "dinov3_vit": False,
}

# Tensors of heads that a checkpoint may hold. They are not loaded, because only features are needed.
HEADS = ("pooler.", "classifier.", "cls_classifier.", "distillation_classifier.", "decoder.")

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def load(
    spec: str,
    source: str,
    config: Any = None,
    *,
    pretrained: bool = True,
    image_size: Side | None = None,
    load_in_4bit: bool = False,
) -> Backbone:
    """The vision transformer at `source`, a folder or an id on the hub; safetensors only.

    Args:
        config: the result of `config_of`, if the caller has it already.
        pretrained: False gives random weights.
        image_size: side of the input in pixels, if it is not the model's own; position embeddings are interpolated.
        load_in_4bit: hold the linear layers of the blocks in 4 bits (NF4), by bitsandbytes.

    Raises:
        UsageError: there is no such model, its family is not in `FAMILIES`, or it cannot take pictures of that size.
        PerpetuneError: the tensors in the checkpoint are not those of the model; the message names them.
    """
    config = config or config_of(spec, source)
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"{spec}: a {config.model_type!r} model cannot be used; usable are {', '.join(FAMILIES)}, dual encoders "
            "(clip, siglip, siglip2, vision-text-dual-encoder), and causal language models"
        )
    channels = getattr(config, "num_channels", 3)
    if channels != 3:
        raise UsageError(f"{spec}: it takes pictures of {channels} channel(s), and perpetune gives it 3 (RGB)")
    preprocess = preprocess_of(spec, source, config, image_size)
    net = model_of(spec, source, config, pretrained=pretrained, ignored=HEADS, **_extra(config.model_type))
    interpolates = FAMILIES[config.model_type] and preprocess.size != side_of(spec, config.image_size)
    forward = partial(class_token, interpolate_pos_encoding=True) if interpolates else class_token
    # And DeiT's distillation token
    prefix = 1 + getattr(config, "num_register_tokens", 0) + (config.model_type == "deit")
    backbone = Backbone(net, spec=spec, dim=config.hidden_size, preprocess=preprocess, forward=forward, prefix=prefix)
    backbone.opens = opened(source, config.model_type)
    if interpolates:
        backbone.opens["call"] = {"interpolate_pos_encoding": True}
    try_size(backbone, image_size)
    return in_4bit(backbone) if load_in_4bit else backbone


def class_token(net: nn.Module, pixels: Tensor, **options: Any) -> Tensor:
    """Class token after the final norm, `(B, D)`."""
    tokens: Tensor = net(pixel_values=pixels, **options).last_hidden_state  # (B, N, D)
    return tokens[:, 0]


def opened(source: str, model_type: str) -> dict[str, Any]:
    """How transformers opens the model at `source`: what `Backbone.opens` says."""
    return {"library": "transformers", "base": source, "options": {"dtype": "float32", **_extra(model_type)}}


def _extra(model_type: str) -> dict[str, Any]:
    return {"add_pooling_layer": False} if model_type in ("vit", "deit") else {}


def preprocess_of(
    spec: str,
    source: str,
    config: Any,
    image_size: int | None,
    usual: Mapping[str, Any] | None = None,
    *,
    fixed: bool = False,
) -> PictureView:
    """The view that `preprocessor_config.json` or `processor_config.json` describes.

    Args:
        config: the config of the model; its `image_size` counts where the file gives no size.
        image_size: the side that the user wants; None is the model's own.
        usual: what the file says in the family of the model, for entries that are missing; None means that a missing
            file is replaced by ImageNet's mean and std, with a warning.
        fixed: whether the size of the config counts, and none of the file: it is a range, or one for tiles.
    """
    given = _processor(spec, source)
    if given is None:
        assumed = "ImageNet's mean and std are" if usual is None else "what its family usually does with pictures is"
        warnings.warn(f"{spec} has no {PREPROCESSOR}: {assumed} assumed", stacklevel=2)
        if usual is None:
            return PictureView(size=image_size or side_of(spec, config.image_size))
    if usual is not None:  # files of these families say `size: null` where the family has one size
        own = {name: value for name, value in (given or {}).items() if (name, value) != ("size", None)}
        given = {**usual, **own}
    assert given is not None
    size = config.image_size if fixed else given.get("size", config.image_size)
    side, crop, squeeze = side_of(spec, size), None, False
    if given.get("do_center_crop"):
        side, whole = side_of(spec, given.get("crop_size", side)), side
        crop = min(1.0, side / whole)
        squeeze = isinstance(size, dict) and "height" in size  # resized to a square before the crop
        crop, squeeze = (None, False) if squeeze and crop == 1.0 else (crop, squeeze)
    if given.get("do_resize", True) is False:
        warnings.warn(
            f"{spec}: {PREPROCESSOR} says do_resize: false. Pictures are resized to {image_size or side} pixels all "
            "the same, because all pictures of a batch have one size",
            stacklevel=2,
        )
    resample = given.get("resample", 2)
    if resample not in FILTERS:
        raise UsageError(f"{spec}: resample {resample!r} in {PREPROCESSOR}; one of {FILTERS} is expected")
    normalise = given.get("do_normalize", True)
    mean = triple(spec, given.get("image_mean", (0.5, 0.5, 0.5)) if normalise else (0.0, 0.0, 0.0))
    std = triple(spec, given.get("image_std", (0.5, 0.5, 0.5)) if normalise else (1.0, 1.0, 1.0))
    scale = _scale(spec, given)
    if scale != 1.0:  # the view divides by 255: (scale x − mean) / std = (x − mean / scale) / (std / scale)
        mean, std = (triple(spec, [value / scale for value in values]) for values in (mean, std))
    if not all(value > 0 for value in std):
        raise UsageError(f"{spec}: {PREPROCESSOR} gives {std} as std; numbers above 0 are needed")
    return PictureView(
        size=image_size or side,
        mean=mean,
        std=std,
        interpolation=FILTERS[resample],
        crop=crop,
        squeeze=squeeze,
    )


def _processor(spec: str, source: str) -> dict[str, Any] | None:
    """What the checkpoint says about its pictures; None if it says nothing."""
    for name in (PREPROCESSOR, PROCESSOR):
        file = Path(source) / name
        path = (file if file.is_file() else None) if Path(source).is_dir() else hub_file(spec, source, name)
        if path is None:
            continue
        given = read_object(path, f"{spec}: {name}")
        inner = given.get("image_processor")  # a file for pictures and texts
        if name == PREPROCESSOR or isinstance(inner, dict):
            return inner if isinstance(inner, dict) else given
    return None


def _scale(spec: str, given: dict[str, Any]) -> float:
    """By which pixels from 0 to 1 are multiplied before mean and std: 1 unless the file says something unusual."""
    if given.get("do_rescale", True) is False:
        return 255.0
    factor = given.get("rescale_factor", 1 / 255)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 255:
        raise UsageError(f"{spec}: rescale_factor {factor!r} in {PREPROCESSOR}; a number above 0 is expected")
    return 1.0 if abs(255 * factor - 1) < 1e-4 else 255.0 * factor
