"""Backbones that a state opens again without the library that built them, because that takes long to import.

When a state is made, `described` compares the plain net with the library's and says how it is made. `reopened` makes
it from this and from the file of weights. Whoever calls it compares the fingerprint of all tensors with the state's.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from perpetune.data.pictures.view import PictureView
from perpetune.errors import PerpetuneError
from perpetune.models.backbone import Backbone
from perpetune.models.loaders.hub import hub_file
from perpetune.models.loaders.options import library
from perpetune.models.plain_timm import PlainTimmViT, sizes_of

WEIGHTS = "model.safetensors"
LIBRARY = "timm"


def described(backbone: Backbone, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """How `reopened` makes the backbone, as JSON; None if it cannot, or not to the same bits.

    Args:
        backbone: as its loader gives it, without pets.
        options: those that the loader got.
    """
    prefix, _, place = backbone.spec.partition(":")
    view, opens = backbone.preprocess, backbone.opens
    if opens.get("library") != LIBRARY or type(view) is not PictureView or options.get("load_in_4bit"):
        return None
    sizes = sizes_of(backbone.net)
    if sizes is None or sizes["image_size"] != view.size:
        return None
    hub = getattr(backbone.net, "pretrained_cfg", {}).get("hf_hub_id") if prefix == LIBRARY else None
    if prefix != "folder" and not hub:
        return None
    return {
        "library": LIBRARY,
        "spec": backbone.spec,
        "options": _plain(options),
        "hub": hub,
        "config": _config(place) if prefix == "folder" else None,
        "opens": opens,
        "net": sizes,
        "view": {**dataclasses.asdict(view), "mean": list(view.mean), "std": list(view.std), "fast": False},
    }


def reopened(spec: str, options: Mapping[str, Any], about: Mapping[str, Any]) -> Backbone | None:
    """The backbone that `described` says; None if its name, options or files are no longer those of then.

    Args:
        about: what `described` gave.
    """
    prefix, _, place = spec.partition(":")
    folder = Path(place).expanduser()
    if (about.get("library"), about.get("spec"), about.get("options")) != (LIBRARY, spec, _plain(options)):
        return None
    try:
        if prefix == "folder" and about["config"] != _config(place):
            return None
        file = folder / WEIGHTS if prefix == "folder" else hub_file(spec, about["hub"], WEIGHTS)
        if file is None:
            return None
        with torch.device("meta"):  # drawing random weights takes longer than reading the file
            net = PlainTimmViT(**about["net"])
        net.load(load_file(file))
        given = about["view"]
        view = PictureView(**{**given, "mean": tuple(given["mean"]), "std": tuple(given["std"])})
    except (OSError, SafetensorError, PerpetuneError, LookupError, TypeError, ValueError, RuntimeError):
        return None  # the library names the fault
    backbone = Backbone(
        net,
        spec=spec,
        dim=about["net"]["width"],
        preprocess=view,
        prefix=net.num_prefix_tokens,
        class_token=net.cls_token is not None,
    )
    backbone.opens = dict(about["opens"])
    return backbone


def of_library(backbone: Backbone) -> Any:
    """The net of the backbone, or the library's own net with its tensors if it was made without the library."""
    if not isinstance(backbone.net, PlainTimmViT):
        return backbone.net
    timm = library(backbone.spec, LIBRARY, LIBRARY)
    net = timm.create_model(backbone.opens["base"], **{**backbone.opens["options"], "pretrained": False})
    net.load_state_dict(backbone.net.state_dict())
    return net.requires_grad_(False).eval()


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, False)}


def _config(folder: str) -> str | None:
    """SHA-256 of the folder's `config.json`; None if there is none."""
    file = Path(folder).expanduser() / "config.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
