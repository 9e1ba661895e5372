"""The loader of vision-language models by transformers: LLaVA, Idefics3 and SmolVLM, Qwen2.5-VL, PaliGemma."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.data.pictured.marks import Mark
from perpetune.data.pictured.view import PicturedView
from perpetune.data.pictures.view import PictureView
from perpetune.errors import UsageError, out_of_memory
from perpetune.models.backbone import Backbone
from perpetune.models.loaders import vit
from perpetune.models.loaders.causal_lm import (
    Dtype,
    Length,
    Source,
    check_tokenizer,
    hidden_states,
    is_causal,
    longest_text,
    net_of,
    tokenizer_of,
)
from perpetune.models.loaders.checkpoint import config_of
from perpetune.models.loaders.hub import one_line
from perpetune.models.loaders.options import Side, in_4bit, side_of
from perpetune.models.picture_side import PictureSide, States

USUAL_SIDE = 448
"""The side of pictures, in pixels, of a model that takes pictures of any size."""


@dataclass(frozen=True)
class Family:
    """What differs between the families.

    Attributes:
        tower, projector: their paths in the net; None where the tower has the projector in it.
        states: computes what the projector reads.
        start, stop: tokens around those of a picture. `in_form` says whether the chat form writes them.
        first: whether pictures come before the text, and the tokens of a question see each other both ways.
        squeezed: whether the model was trained on pictures in their own shape, or in tiles.
    """

    tower: str
    projector: str | None
    states: States
    start: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    in_form: bool = False
    first: bool = False
    squeezed: bool = False


def _through(net: Any, pixels: Tensor) -> Tensor:
    """The states of a model whose `get_image_features` calls `multi_modal_projector` last."""
    model = net.model
    projector, model.multi_modal_projector = model.multi_modal_projector, nn.Identity()
    try:
        found = model.get_image_features(pixel_values=pixels.to(net.dtype)).pooler_output
    finally:
        model.multi_modal_projector = projector
    return found if isinstance(found, Tensor) else torch.stack(list(found))


def _whole(net: Any, pixels: Tensor) -> Tensor:
    """The states of Idefics3's tower; a picture is one tile, all of whose patches count."""
    tower = net.model.vision_model
    rows, columns = (side // tower.config.patch_size for side in pixels.shape[2:])
    mask = torch.ones(len(pixels), rows, columns, dtype=torch.bool, device=pixels.device)
    states: Tensor = tower(pixel_values=pixels.to(net.dtype), patch_attention_mask=mask).last_hidden_state
    return states


def _merged(net: Any, pixels: Tensor) -> Tensor:
    """The embeddings of pictures by Qwen's tower, which takes patches in the order in which it merges them."""
    tower = net.model.visual
    config = tower.config
    patch, merge, times = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    rows, columns = (side // patch for side in pixels.shape[2:])
    cut = pixels.to(net.dtype).reshape(len(pixels), 3, rows // merge, merge, patch, columns // merge, merge, patch)
    order = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # a picture is a film that stands still
    patches = order.expand(-1, -1, -1, -1, -1, -1, times, -1, -1).reshape(len(pixels) * rows * columns, -1)
    grid = torch.tensor([[1, rows, columns]], device=pixels.device).expand(len(pixels), 3)
    found: Tensor = tower(patches, grid_thw=grid).pooler_output
    return found.reshape(len(pixels), -1, found.shape[-1])


_IDEFICS = Family(
    "model.vision_model",
    "model.connector",
    _whole,
    start=("<fake_token_around_image>", "<global-img>"),
    stop=("<fake_token_around_image>",),
    squeezed=True,
)
FAMILIES: dict[str, Family] = {
    "llava": Family("model.vision_tower", "model.multi_modal_projector", _through),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_5_vl": Family(
        "model.visual",
        None,
        _merged,
        start=("<|vision_start|>",),
        stop=("<|vision_end|>",),
        in_form=True,
        squeezed=True,
    ),
    "paligemma": Family("model.vision_tower", "model.multi_modal_projector", _through, first=True),
}
"""By `model_type`."""


def check_other(spec: str, config: Any) -> None:
    """Raise UsageError if `config` is that of a vision-language model of another family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and not is_causal(config):
        raise UsageError(
            f"{spec}: a {config.model_type!r} model is a vision-language model of another family than "
            f"{', '.join(FAMILIES)}"
        )


def load(
    spec: str,
    source: Source,
    config: Any = None,
    *,
    pretrained: bool = True,
    image_size: Side | None = None,
    load_in_4bit: bool = False,
    dtype: Dtype = "float32",
    max_length: Length | None = None,
    chat: bool = False,
    gradient_checkpointing: bool = False,
) -> Backbone:
    """The vision-language model at `source` with its tokenizer, without dropout; safetensors only.

    Args:
        config: the result of `config_of`, if the caller has it already.
        image_size: side of pictures in pixels, where the model takes any size.

    The other options are those of `causal_lm.load`.

    Raises:
        UsageError: there is no such model or tokenizer, or an option does not fit the model.
        PerpetuneError: the tensors in the checkpoint are not those of the model; the message names them.
    """
    config = config or config_of(spec, source.place)
    family, quantised = FAMILIES[config.model_type], getattr(config, "quantization_config", None) is not None
    picture = _picture(spec, source, config, family, image_size)
    tokenizer = tokenizer_of(spec, source, chat=chat)
    net = net_of(spec, source, config, "AutoModelForImageTextToText", pretrained, dtype, gradient_checkpointing)
    rows = check_tokenizer(spec, tokenizer, net)
    count = count_of(spec, net, family.states, family.projector, picture)
    token = int(config.image_token_id)
    grid = (
        picture.size // (config.vision_config.patch_size * config.vision_config.spatial_merge_size)
        if (config.model_type == "qwen2_5_vl")
        else None
    )
    side = PictureSide(
        token=token,
        count=count,
        tower=family.states,
        path=family.tower,
        projector=family.projector,
        drawn=False,
        grid=grid,
        mutual=family.first,
    )
    backbone = Backbone(
        net,
        spec=spec,
        dim=config.get_text_config().hidden_size,
        preprocess=PicturedView(
            tokenizer,
            picture=picture,
            mark=_mark(spec, tokenizer, family, token, count),
            max_length=longest_text(spec, config, tokenizer, max_length),
            chat=chat,
            rows=rows,
        ),
        forward=hidden_states,
        pictures=side,
    )
    backbone.opens = {"library": "transformers", "base": source.place, "options": {"dtype": dtype}}
    return in_4bit(backbone) if load_in_4bit and not quantised else backbone


def _picture(spec: str, source: Source, config: Any, family: Family, image_size: int | None) -> PictureView:
    """The pixels that the model takes."""
    vision = config.vision_config
    own = USUAL_SIDE if config.model_type == "qwen2_5_vl" else side_of(spec, vision.image_size)
    if image_size is not None and image_size != own and not family.squeezed:
        raise UsageError(f"{spec}: it takes pictures of {own} pixels only: leave image_size out")
    if config.model_type == "qwen2_5_vl":
        unit = vision.patch_size * vision.spatial_merge_size
        own = own if own % unit == 0 else max(1, own // unit) * unit
    else:
        unit = vision.patch_size * getattr(config, "scale_factor", 1)
    if (image_size or own) % unit:
        raise UsageError(f"{spec}: image_size {image_size or own} is no multiple of {unit}, the side of a token")
    if family.squeezed:
        warnings.warn(
            f"{spec}: its pictures are squeezed to a square of {image_size or own} pixels; it was trained on pictures "
            "that keep their shape",
            stacklevel=2,
        )
    return vit.preprocess_of(spec, source.place, SimpleNamespace(image_size=own), image_size, fixed=family.squeezed)


@torch.no_grad()
def count_of(spec: str, net: Any, states: States, projector: str | None, picture: PictureView) -> int:
    """The number of embeddings of one picture, found by one pass.

    Raises:
        UsageError: the net cannot read the pictures that its view makes, or gives embeddings of another width.
    """
    try:
        found = states(net, torch.zeros(1, 3, picture.size, picture.size))
        if projector is not None:
            project: Callable[[Tensor], Tensor] = net.get_submodule(projector)
            found = project(found)
    except Exception as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise UsageError(
            f"{spec}: the model cannot read pictures of {picture.size} pixels ({one_line(error)}): its parts do not "
            "fit each other"
        ) from error
    width = net.get_input_embeddings().weight.shape[1]
    if found.dim() != 3 or len(found) != 1 or found.shape[2] != width:
        raise UsageError(
            f"{spec}: a picture becomes numbers of the shape {tuple(found.shape)}; (1, number, {width}) is expected"
        )
    return int(found.shape[1])


def _mark(spec: str, tokenizer: Any, family: Family, token: int, count: int) -> Mark:
    """How the model writes a picture.

    Raises:
        UsageError: its tokenizer lacks a token for it.
    """
    text = tokenizer.convert_ids_to_tokens(token)
    if text is None or tokenizer(text, add_special_tokens=False)["input_ids"] != [token]:
        raise UsageError(
            f"{spec}: its tokenizer makes no single token of the mark of a picture (image_token_id {token} in its "
            "config): the tokenizer belongs to another model"
        )
    known = tokenizer.get_vocab()
    for name in (*family.start, *family.stop):
        if name not in known:
            raise UsageError(f"{spec}: its tokenizer has no token {name}, which stands around pictures")
    start, stop = (tuple(known[name] for name in names) for names in (family.start, family.stop))
    if family.in_form:
        plain = "".join((*family.start, text, *family.stop))
        return Mark(token, count, text, plain, around=(*start, *stop), first=family.first)
    return Mark(token, count, text, text, before=start, after=stop, first=family.first)
