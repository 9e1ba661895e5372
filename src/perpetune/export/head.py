"""`head.json` and `head.safetensors`: the head as one linear map, and how features are read."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from perpetune.data.examples import View
from perpetune.data.pictures.view import PictureView
from perpetune.data.texts.templates import NOW
from perpetune.data.texts.view import TextView
from perpetune.heads.base import Head
from perpetune.methods.base import Method
from perpetune.models.backbone import Backbone
from perpetune.models.loaders.packaged import PACKAGED

FORMAT = 2  # of head.json and head.safetensors; docs/export.md has both
BASE = "base"
"""The folder of a packaged model, beside `head.json`."""


def head_in(method: Method) -> Head | None:
    """The head of classes of a method; None for a language model that answers with its own output layer."""
    return next((m for m in method.model.modules() if isinstance(m, Head)), None)


def write_head(method: Method, backbone: Backbone, folder: Path, *, adapter: bool, own: bool = False) -> None:
    """Write the two files of the head, and the folder `base` of a packaged model; nothing where there is no head.

    Args:
        adapter: whether the folder has an adapter.
        own: whether the folder itself holds the model, with the pets in its weights.
    """
    head = head_in(method)
    if head is None:
        return
    about, tensors = head_of(head)
    about |= reading(backbone, method.model.view) | {
        "adapter": adapter,
        "frozen_beside": head.dim == 2 * backbone.dim,
    }
    if own:
        about |= {"base": None, "folder": "."}
        about["options"] = {
            k: v for k, v in about["options"].items() if k not in ("img_size", "pretrained_cfg_overlay")
        }
    stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(stored, folder / "head.safetensors", metadata={"format": "pt"})
    written = json.dumps(about, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "head.json").write_text(f"{written}\n", encoding="utf-8")
    if not own and packaged(backbone):
        with as_file(files("perpetune") / "assets" / PACKAGED[backbone.spec.partition(":")[2]]) as stored_here:
            shutil.copytree(stored_here, folder / BASE)


def packaged(backbone: Backbone) -> bool:
    prefix, _, rest = backbone.spec.partition(":")
    return prefix == "perpetune" and rest in PACKAGED


def head_of(head: Head) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `head.json` says of a head, and its tensors."""
    about: dict[str, Any] = {"format": FORMAT, "head": type(head).__name__, "classes": head.classes}
    folded = head.folded()
    if folded is None:  # of another package, which has to say what its tensors mean
        return about, head.needed()
    tensors = {"weight": folded.weight, "bias": folded.bias}
    if folded.projected is not None:
        tensors["projected"] = folded.projected
    return {**about, "normalise": folded.normalise}, tensors


def reading(backbone: Backbone, view: View) -> dict[str, Any]:
    """How the model is opened and its features are read, for `head.json`."""
    if not backbone.opens:
        warnings.warn(
            f"{backbone.spec}: its weights are random, or its loader does not say how another program opens it; "
            "head.json does not say it either",
            stacklevel=2,
        )
    opens = {"library": None, "base": backbone.spec, "options": {}, "call": {}} | backbone.opens
    opens["base"] = None if packaged(backbone) else anywhere(opens["base"])
    about: dict[str, Any] = {**opens, "reads": backbone.takes}
    texts, taps = backbone.takes == "texts", backbone.taps
    first: list[int | None] = [-1, None] if texts else [0, 1]
    places = {"class": first, "mean": [0 if texts else backbone.prefix, None]}
    if taps is not None:
        inputs = backbone.empty()
        if inputs is not None:
            with torch.no_grad():
                backbone.features(inputs)  # shows at which modules the features are read
        about |= {"taps": taps.count}
        about |= {"tokens": [places[kind] for kind in taps.kinds], "modules": taps.modules(backbone.net)}
    elif opens["library"] == "transformers":  # what `vit` and `causal_lm` give
        about |= {"taps": 1, "tokens": [places["mean" if texts else "class"]], "modules": {}}
    else:
        about |= {"taps": 0, "tokens": [], "modules": {}}
    if taps is not None and backbone.texts is not None:
        about["own"] = backbone.own  # the first columns are the net's own feature; those of the taps follow
    if isinstance(view, PictureView):
        about["image"] = image_of(view)
    if isinstance(view, TextView):
        ask = {"tokenize": False, "add_generation_prompt": True, "chat_template": view.template if view.dated else None}
        if view.dated and NOW in str(ask["chat_template"]):
            warnings.warn(
                "the chat template asks for the day in a way that cannot be written down: other programs give it their "
                "own day, and the model was trained with the day of `init`",
                stacklevel=2,
            )
        opening = view.opening
        about |= {"chat": ask if view.chat else None, "opening": opening, "room": view.max_length - opening}
    return about


def anywhere(base: str) -> str:
    """A model's name, or its path as other folders need it."""
    return os.path.abspath(base) if os.path.exists(base) else base


def image_of(view: PictureView) -> dict[str, Any]:
    """How a picture becomes the model's input, in the words of Pillow."""
    from PIL.Image import Resampling

    whole = view.crop is None
    return {
        "size": view.size,
        "crop": 1.0 if whole else view.crop,
        "squeeze": whole or view.squeeze,
        "resample": int(Resampling[view.interpolation.upper()]),
        "mean": view.mean,
        "std": view.std,
    }
