"""Backbones that transformers builds: an id on the hub or a local folder in its layout, or a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from perpetune.models.backbone import Backbone
from perpetune.models.loaders import causal_lm, dual, vision_language, vit
from perpetune.models.loaders.causal_lm import Dtype, Length, Source
from perpetune.models.loaders.checkpoint import config_of
from perpetune.models.loaders.options import Side, taken


def load_hf(
    rest: str,
    *,
    pretrained: bool = True,
    image_size: Side | None = None,
    load_in_4bit: bool = False,
    dtype: Dtype | None = None,
    max_length: Length | None = None,
    chat: bool | None = None,
    gradient_checkpointing: bool | None = None,
) -> Backbone:
    """`hf:ID_OR_FOLDER`, `hf:FILE.gguf`: ViT, DINOv2 and similar, dual encoders, (vision-)language models.

    A vision transformer takes the first three options; a language model takes all except `image_size`; a dual encoder
    (CLIP, SigLIP, SigLIP2, a picture and a text model) takes `pretrained`, `image_size` and `dtype`; a vision-language
    model takes all.
    """
    spec = f"hf:{rest}"
    if causal_lm.is_gguf(rest):
        source = causal_lm.gguf_source(spec, rest, hub=True)
    else:
        source = Source(str(Path(rest).expanduser()) if rest.startswith("~") else rest)
    given = {"pretrained": pretrained, "image_size": image_size, "load_in_4bit": load_in_4bit, "dtype": dtype}
    given |= {"max_length": max_length, "chat": chat, "gradient_checkpointing": gradient_checkpointing}
    return load_checkpoint(spec, source, given)


def load_checkpoint(spec: str, source: Source, given: Mapping[str, Any]) -> Backbone:
    """The vision transformer, dual encoder, language or vision-language model at `source`; its config decides.

    Args:
        given: options of either kind of model; None means that the option is not given.

    Raises:
        UsageError: there is no such model, or the model at `source` does not take a given option.
    """
    source = source.unpacked(given.get("dtype"))
    config = config_of(spec, source.read, **source.where)
    if config.model_type in dual.FAMILIES:
        return dual.load(spec, source.place, config, **taken(spec, "a dual encoder", dual.load, given))
    if config.model_type in vision_language.FAMILIES:
        both: Callable[..., Backbone] = vision_language.load
        return both(spec, source, config, **taken(spec, "a vision-language model", both, given))
    vision_language.check_other(spec, config)
    if config.model_type in vit.FAMILIES or not causal_lm.is_causal(config):
        return vit.load(spec, source.place, config, **taken(spec, "a model of pictures", vit.load, given))
    load: Callable[..., Backbone] = causal_lm.load
    return load(spec, source, config, **taken(spec, "a language model", load, given))
