"""Backbones in a local folder: a checkpoint in the layout of transformers, timm or open_clip, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perpetune.errors import UsageError, closest
from perpetune.models.backbone import Backbone
from perpetune.models.loaders import causal_lm, openclip, timm
from perpetune.models.loaders.causal_lm import Dtype, Length, Source
from perpetune.models.loaders.hf import load_checkpoint
from perpetune.models.loaders.options import Side, taken
from perpetune.plain import read_object


def load_folder(
    rest: str,
    *,
    pretrained: bool = True,
    image_size: Side | None = None,
    architecture: str | None = None,
    load_in_4bit: bool = False,
    dtype: Dtype | None = None,
    max_length: Length | None = None,
    chat: bool | None = None,
    gradient_checkpointing: bool | None = None,
) -> Backbone:
    """`folder:PATH`: a local checkpoint in the layout of transformers, timm or open_clip, or a GGUF file.

    Args:
        architecture: timm's name of the model, for weights without a `config.json`.

    The other options are those of the loader for the kind of model in the folder; see `timm`, `vit`, `dual`,
    `openclip` and `causal_lm`.
    """
    spec, folder = f"folder:{rest}", Path(rest).expanduser()
    given = {"pretrained": pretrained, "image_size": image_size, "architecture": architecture}
    given |= {"load_in_4bit": load_in_4bit, "dtype": dtype, "max_length": max_length, "chat": chat}
    given |= {"gradient_checkpointing": gradient_checkpointing}
    if causal_lm.is_gguf(rest) and not folder.is_dir():
        return load_checkpoint(spec, causal_lm.gguf_source(spec, rest, hub=False), given)
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise UsageError(f"{spec}: there is no such folder; in {folder.parent}: {closest(folder.name, beside)}")
    if architecture is None and (folder / openclip.CONFIG).is_file() and not (folder / "config.json").is_file():
        return openclip.load_local(spec, folder, **taken(spec, "a model of open_clip", openclip.load_local, given))
    config = _config(spec, folder)
    if architecture is None and "model_type" in config:
        return load_checkpoint(spec, Source(str(folder)), given)
    if architecture is None and "architecture" not in config:
        raise UsageError(
            f"{spec}: no config.json that names a `model_type` (transformers) or an `architecture` (timm); "
            "give timm's name for the weights as the option `architecture`"
        )
    return timm.load_local(spec, folder, config, **taken(spec, "a model of timm", timm.load_local, given))


def _config(spec: str, folder: Path) -> dict[str, Any]:
    """The folder's `config.json`; empty if there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    return read_object(file, f"{spec}: config.json")
