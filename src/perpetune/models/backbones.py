"""Where backbones come from: `timm:NAME[.TAG]`, `hf:ID_OR_FOLDER`, `folder:PATH`, `perpetune:micro`.

The middle two are vision transformers or causal language models, as the model's config says, or a GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perpetune.errors import PerpetuneError, UsageError, closest
from perpetune.models import from_timm, from_transformers, language
from perpetune.models.backbone import Backbone
from perpetune.models.families import LINEAR_ROLES, places, roles
from perpetune.models.hub import one_line
from perpetune.models.language import Dtype
from perpetune.models.taps import Count, Read
from perpetune.seeding import own_global_state

__all__ = ["LOADERS", "PACKAGED", "Backbone", "load_backbone"]

PACKAGED = {"micro": "micro-vit"}  # name: folder in perpetune/assets


def load_backbone(
    spec: str,
    *,
    pretrained: bool = True,
    image_size: int | None = None,
    architecture: str | None = None,
    load_in_4bit: bool = False,
    dtype: Dtype = "float32",
    max_length: int | None = None,
    chat: bool = False,
    gradient_checkpointing: bool = False,
    taps: Count | None = None,
    tokens: Read = "both",
    seed: int = 0,
) -> Backbone:
    """The frozen model that `PREFIX:REST` names, on the CPU, in evaluation mode.

    Args:
        spec: as in a recipe. Installed packages may bring prefixes by the entry point `perpetune.backbones`.
        pretrained: False gives random weights, which `seed` decides.
        image_size: side of the input in pixels where it is not the model's own; position embeddings
            are interpolated.
        architecture: timm's name for what is in a `folder:` that has no `config.json`.
        load_in_4bit: hold the linear layers of the blocks in 4 bits (NF4), by bitsandbytes. A model that comes
            quantised stays as it is.
        dtype: of the frozen weights; for language models only, as are the next three.
        max_length: tokens of a text, question and answer together; None is what the model takes.
        chat: whether plain prompts are put into the form of a chat too.
        gradient_checkpointing: keep only what goes into each block while PETs are trained, and compute the rest again.
        taps: features are read behind so many of the last blocks; `auto` chooses how many; None reads the net's own
            feature alone.
        tokens: which tokens the taps read.

    Raises:
        UsageError: an unknown prefix or name (with the closest three), or options that do not fit.
        MissingExtra: the package that the prefix needs is not installed.
        PerpetuneError: the weights cannot be fetched, or are not those of the model.
    """
    prefix, colon, rest = spec.partition(":")
    if not colon or not rest:
        raise UsageError(f"backbone {spec!r}: PREFIX:NAME is expected; prefixes: {', '.join(LOADERS)}")
    if image_size is not None and image_size < 1:
        raise UsageError(f"backbone {spec!r}: image_size is {image_size}; a number of pixels is expected")
    loader = _loader(spec, prefix)
    # Loaders of other packages need not know options that came later, unless they are used.
    given: dict[str, Any] = {"dtype": dtype, "max_length": max_length, "chat": chat}
    given["gradient_checkpointing"] = gradient_checkpointing
    later = {name: value for name, value in given.items() if value not in ("float32", None, False)}
    with own_global_state("backbone", seed):
        backbone: Backbone = loader(
            rest,
            pretrained=pretrained,
            image_size=image_size,
            architecture=architecture,
            load_in_4bit=load_in_4bit,
            seed=seed,
            **later,
        )
        if image_size is not None and not load_in_4bit:
            _try(backbone, image_size)
    return backbone.tap(taps, tokens)


def load_timm(
    rest: str,
    *,
    pretrained: bool,
    image_size: int | None,
    architecture: str | None,
    load_in_4bit: bool,
    seed: int,
    **texts: Any,
) -> Backbone:
    """`timm:NAME[.TAG]`: what `timm.create_model` gives, with the weights of that tag."""
    spec = f"timm:{rest}"
    _no_architecture(spec, architecture)
    _for_texts(spec, texts)
    backbone = from_timm.load_by_name(spec, rest, pretrained=pretrained, image_size=image_size)
    return _in_4bit(backbone) if load_in_4bit else backbone


def load_hf(
    rest: str,
    *,
    pretrained: bool,
    image_size: int | None,
    architecture: str | None,
    load_in_4bit: bool,
    seed: int,
    **texts: Any,
) -> Backbone:
    """`hf:ID_OR_FOLDER`, `hf:FILE.gguf`: ViT, DeiT, DINOv2 and their kin, or a language model."""
    spec = f"hf:{rest}"
    _no_architecture(spec, architecture)
    if language.is_gguf(rest):
        source = language.gguf_source(spec, rest, hub=True)
    else:
        source = language.Source(str(Path(rest).expanduser()) if rest.startswith("~") else rest)
    return _transformers(spec, source, pretrained, image_size, load_in_4bit, texts)


def load_folder(
    rest: str,
    *,
    pretrained: bool,
    image_size: int | None,
    architecture: str | None,
    load_in_4bit: bool,
    seed: int,
    **texts: Any,
) -> Backbone:
    """`folder:PATH`: a local checkpoint with its config, in transformers' or timm's layout, or a GGUF file."""
    spec, folder = f"folder:{rest}", Path(rest).expanduser()
    if language.is_gguf(rest) and not folder.is_dir():
        _no_architecture(spec, architecture)
        source = language.gguf_source(spec, rest, hub=False)
        return _transformers(spec, source, pretrained, image_size, load_in_4bit, texts)
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise UsageError(f"{spec}: there is no such folder; in {folder.parent}: {closest(folder.name, beside)}")
    config = _config(spec, folder)
    if architecture is None and "model_type" in config:
        source = language.Source(str(folder))
        return _transformers(spec, source, pretrained, image_size, load_in_4bit, texts)
    _for_texts(spec, texts)
    if architecture is not None or "architecture" in config:
        backbone = from_timm.load_local(
            spec, folder, config, architecture=architecture, pretrained=pretrained, image_size=image_size
        )
    else:
        raise UsageError(
            f"{spec}: no config.json that names a `model_type` (transformers) or an `architecture` (timm); "
            "give timm's name for the weights as the option `architecture`"
        )
    return _in_4bit(backbone) if load_in_4bit else backbone


def load_packaged(
    rest: str,
    *,
    pretrained: bool,
    image_size: int | None,
    architecture: str | None,
    load_in_4bit: bool,
    seed: int,
    **texts: Any,
) -> Backbone:
    """`perpetune:micro`: the small ViT whose weights ship in this package; its card lies beside them."""
    spec = f"perpetune:{rest}"
    _no_architecture(spec, architecture)
    _for_texts(spec, texts)
    if rest not in PACKAGED:
        raise UsageError(f"{spec}: no such packaged model; {closest(rest, PACKAGED)}")
    with as_file(files("perpetune") / "assets" / PACKAGED[rest]) as folder:
        backbone = from_transformers.load(spec, str(folder), pretrained=pretrained, image_size=image_size)
    return _in_4bit(backbone) if load_in_4bit else backbone


LOADERS: dict[str, Callable[..., Backbone]] = {
    "timm": load_timm,
    "hf": load_hf,
    "folder": load_folder,
    "perpetune": load_packaged,
}


def _loader(spec: str, prefix: str) -> Callable[..., Backbone]:
    if prefix in LOADERS:
        return LOADERS[prefix]
    brought = {entry.name: entry for entry in entry_points(group="perpetune.backbones")}
    if prefix not in brought:
        raise UsageError(f"backbone {spec!r}: there is no prefix {prefix!r}; {closest(prefix, [*LOADERS, *brought])}")
    try:
        loader: Callable[..., Backbone] = brought[prefix].load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"backbones: {prefix!r} of an installed package cannot be loaded: {error}") from error
    return loader


def _transformers(
    spec: str,
    source: language.Source,
    pretrained: bool,
    image_size: int | None,
    load_in_4bit: bool,
    texts: dict[str, Any],
) -> Backbone:
    """A vision transformer or a language model, as the config at `source` says."""
    config = from_transformers.config_of(spec, source.place, **source.where)
    if config.model_type in from_transformers.FAMILIES or not language.is_causal(config):
        _for_texts(spec, texts)
        backbone = from_transformers.load(spec, source.place, config, pretrained=pretrained, image_size=image_size)
        return _in_4bit(backbone) if load_in_4bit else backbone
    if image_size is not None:
        raise UsageError(f"{spec}: `image_size` is for pictures, and this is a language model; it takes `max_length`")
    quantised = getattr(config, "quantization_config", None) is not None
    backbone = language.load(spec, source, config, pretrained=pretrained, **texts)
    return _in_4bit(backbone) if load_in_4bit and not quantised else backbone


def _for_texts(spec: str, texts: dict[str, Any]) -> None:
    if texts:
        names = ", ".join(f"`{name}`" for name in texts)
        raise UsageError(f"{spec}: {names} can be given for a language model only, and this takes pictures")


def _try(backbone: Backbone, image_size: int) -> None:
    """One forward pass, so that a size the net cannot take is told now and not when training begins."""
    try:
        with torch.no_grad():
            backbone(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise UsageError(
            f"{backbone.spec}: image_size {image_size} does not fit this net: {one_line(error)}"
        ) from error


def _no_architecture(spec: str, architecture: str | None) -> None:
    if architecture is not None:
        raise UsageError(f"{spec}: `architecture` ({architecture}) is for a folder: without config.json; leave it out")


def _config(spec: str, folder: Path) -> dict[str, Any]:
    """The folder's `config.json`; empty when there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f"{spec}: config.json is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{spec}: config.json holds a {type(config).__name__}; an object is expected")
    return config


def _in_4bit(backbone: Backbone) -> Backbone:
    """The linear layers of the blocks replaced by bitsandbytes' 4-bit ones (NF4, arXiv:2305.14314)."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise PerpetuneError(f"{backbone.spec}: load_in_4bit needs bitsandbytes: pip install bitsandbytes") from error
    backbone.quantised_from = f"nf4 of {backbone.fingerprint()}"
    linears = [role for role in roles(backbone.net) if role in LINEAR_ROLES]
    for place in places(backbone.net, linears):
        values = dict(place.module.state_dict())
        if not isinstance(place.module, nn.Linear):  # GPT-2's Conv1D, whose weight is the other way round
            values["weight"] = values["weight"].t().contiguous()
        new = bitsandbytes.nn.Linear4bit(place.d_in, place.d_out, bias="bias" in values, quant_type="nf4")
        new.load_state_dict(values)
        # On some CPUs a layer in evaluation mode, as all are here, would compute by a function without a gradient.
        new.support_avx512bf16_for_cpu = False
        backbone.net.set_submodule(place.path, new.requires_grad_(False).eval())
    return backbone
