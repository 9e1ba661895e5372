"""The loader of backbones whose weights are part of this package."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from perpetune.errors import UsageError, closest
from perpetune.models.backbone import Backbone
from perpetune.models.loaders import vit
from perpetune.models.loaders.options import Side
from perpetune.models.plain_vit import PlainViT, class_token, sizes_of

PACKAGED = {"micro": "micro-vit"}  # name: folder in perpetune/assets


def load_packaged(
    rest: str, *, pretrained: bool = True, image_size: Side | None = None, load_in_4bit: bool = False
) -> Backbone:
    """`perpetune:micro`: the small ViT whose weights are part of this package; its model card is beside them.

    Raises:
        UsageError: there is no packaged model of that name.
    """
    spec = f"perpetune:{rest}"
    if rest not in PACKAGED:
        raise UsageError(f"{spec}: no such packaged model; {closest(rest, PACKAGED)}")
    with as_file(files("perpetune") / "assets" / PACKAGED[rest]) as folder:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if pretrained and not load_in_4bit and image_size in (None, config["image_size"]):
            return _plain(spec, folder, config)
        return vit.load(spec, str(folder), pretrained=pretrained, image_size=image_size, load_in_4bit=load_in_4bit)


def _plain(spec: str, folder: Path, config: dict[str, Any]) -> Backbone:
    """The model as it is stored, without transformers, which starts slowly; the features are the same to the bit."""
    with torch.device("meta"):  # drawing random weights takes longer than reading the file
        net = PlainViT(**sizes_of(config))
    net.load(load_file(folder / "model.safetensors"))
    view = vit.preprocess_of(spec, str(folder), SimpleNamespace(**config), None)
    backbone = Backbone(net, spec=spec, dim=config["hidden_size"], preprocess=view, forward=class_token)
    backbone.opens = vit.opened(str(folder), config["model_type"])
    return backbone
