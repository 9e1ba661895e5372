"""Backbones that a state opens again without the library that built them, because that takes long to import.

When a state is made, `described` compares the plain net with the library's and says how it is made. `reopened` makes
it from this and from the file of weights. Whoever calls it compares the fingerprint of all tensors with the state's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from perpetune.data.pictures.view import PictureView
from perpetune.errors import PerpetuneError
from perpetune.models import plain_timm, plain_vit
from perpetune.models.backbone import Backbone, Forward
from perpetune.models.loaders.hub import hub_file
from perpetune.models.loaders.options import library

WEIGHTS = "model.safetensors"
ABOUT = ("config.json", "preprocessor_config.json", "processor_config.json")
"""Files of a folder that say how a model and its view are made."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A class of a library, and the plain net that stands for it.

    Attributes:
        net: the plain class. Its method `load` takes the tensors of a file.
        sizes: what the plain class takes, from a net of the library.
        like: the library's classes of parts, and the class here that computes the same.
        forward: computes features from the plain net; None if its output is the features.
        resizes: whether it takes pictures of another size than its own.
    """

    library: str
    net: type[Any]
    sizes: Callable[[Any], dict[str, Any]]
    like: Mapping[str, str]
    forward: Forward | None = None
    resizes: bool = False


def _vit_sizes(net: Any) -> dict[str, Any]:
    if net.config._attn_implementation != "sdpa" or net.pooler is not None:
        raise ValueError("not covered")
    return {**plain_vit.sizes_of(vars(net.config)), "qkv_bias": net.config.qkv_bias}


def _dinov2_sizes(net: Any) -> dict[str, Any]:
    if net.config._attn_implementation != "sdpa":
        raise ValueError("not covered")
    inner = {"intermediate_size": net.encoder.layer[0].mlp.fc1.out_features}
    mask = {"mask_token": net.embeddings.mask_token is not None}
    return {**plain_vit.sizes_of({**vars(net.config), **inner}), "qkv_bias": net.config.qkv_bias, **mask}


FORMS: dict[str, Form] = {
    "VisionTransformer": Form(
        "timm",
        plain_timm.PlainTimmViT,
        plain_timm.sizes_of,
        {
            "VisionTransformer": "PlainTimmViT",
            "PatchEmbed": "_Patches",
            "Block": "_Block",
            "Attention": "_Attention",
            "Mlp": "_MLP",
            "LayerScale": "_Scale",
        },
    ),
    "ViTModel": Form(
        "transformers",
        plain_vit.PlainViT,
        _vit_sizes,
        {
            "ViTModel": "PlainViT",
            "ViTEmbeddings": "_Embeddings",
            "ViTPatchEmbeddings": "_Patches",
            "ViTLayer": "_Layer",
            "ViTAttention": "_Attention",
            "ViTMLP": "_MLP",
        },
        plain_vit.class_token,
    ),
    "Dinov2Model": Form(
        "transformers",
        plain_vit.PlainDinov2,
        _dinov2_sizes,
        {
            "Dinov2Model": "PlainDinov2",
            "Dinov2Embeddings": "_AnySize",
            "Dinov2PatchEmbeddings": "_Patches",
            "Dinov2Encoder": "_Encoder",
            "Dinov2Layer": "_ScaledLayer",
            "Dinov2Attention": "_Attention",
            "Dinov2MLP": "_MLP",
            "Dinov2LayerScale": "_Scale",
        },
        plain_vit.class_token,
        resizes=True,
    ),
}
PLACES = ("", "local-dir:")
"""Before the path of a folder, as libraries take it."""
SETTLED = {"fused_attn": True, "inplace": False, "is_causal": False, "_fast_norm": False}
"""Attributes of parts of a library's net that have to have this value, if a part has them."""


def described(backbone: Backbone, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """How `reopened` makes the backbone, as JSON; None if it cannot, or not to the same bits.

    Args:
        backbone: as its loader gives it, without pets.
        options: those that the loader got.
    """
    prefix, _, place = backbone.spec.partition(":")
    view, name = backbone.preprocess, type(backbone.net).__name__
    form = FORMS.get(name)
    if form is None or backbone.opens.get("library") != form.library or type(view) is not PictureView:
        return None
    if prefix not in ("timm", "hf", "folder"):
        return None
    folder = prefix != form.library and _folder(place)
    hub = None if folder else getattr(backbone.net, "pretrained_cfg", {}).get("hf_hub_id") or place
    sizes = None if options.get("load_in_4bit") else covered(backbone, form)
    if sizes is None:
        return None
    return {
        "net": name,
        "spec": backbone.spec,
        "options": _given(options),
        "hub": hub,
        "files": _digest(folder) if folder else None,
        "opens": backbone.opens,
        "sizes": sizes,
        "view": _viewed(view),
    }


def reopened(spec: str, options: Mapping[str, Any], about: Mapping[str, Any]) -> Backbone | None:
    """The backbone that `described` says; None if its name, options or files are no longer those of then.

    Args:
        about: what `described` gave.
    """
    form = FORMS.get(about.get("net", ""))
    if form is None or about.get("options") != _given(options):
        return None
    try:
        hub, folder = about["hub"], _folder(spec.partition(":")[2])
        was, is_now = (one.partition(":") for one in (about["spec"], spec))
        if was != is_now and (hub is not None or was[0] != is_now[0]):  # a folder may lie elsewhere now
            return None
        if hub is None and (folder is None or about["files"] != _digest(folder)):
            return None
        file = hub_file(spec, hub, WEIGHTS) if hub is not None else folder and folder / WEIGHTS
        if file is None:
            return None
        with torch.device("meta"):  # drawing random weights takes longer than reading the file
            net = form.net(**about["sizes"])
        net.load(load_file(file))
        given = about["view"]
        view = PictureView(**{**given, "mean": tuple(given["mean"]), "std": tuple(given["std"])})
    except (OSError, SafetensorError, PerpetuneError, LookupError, TypeError, ValueError, RuntimeError):
        return None  # the library names the fault
    backbone = Backbone(
        net,
        spec=spec,
        dim=net.width,
        preprocess=view,
        forward=form.forward,
        prefix=net.num_prefix_tokens,
        class_token=net.class_token,
    )
    backbone.opens = dict(about["opens"])
    for start in PLACES:
        if backbone.opens.get("base") == start + was[2]:
            backbone.opens["base"] = start + is_now[2]
    return backbone


def changed(backbone: Backbone, about: Mapping[str, Any]) -> str:
    """What of a backbone that its library has opened is another than `described` said: a setting that no tensor shows,
    such as the mean of pixels. Empty if nothing is, or if nobody can tell."""
    form, view = FORMS.get(type(backbone.net).__name__), backbone.preprocess
    if form is None or about.get("net") != type(backbone.net).__name__ or not isinstance(view, PictureView):
        return ""
    try:
        now = json.loads(json.dumps({"sizes": form.sizes(backbone.net), "view": _viewed(view)}))
    except (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError):
        return ""
    for part, values in now.items():
        then = about.get(part, {})
        for name, value in values.items():
            if name in then and then[name] != value:
                return f"{name.replace('_', ' ')} is {value}, and was {then[name]}"
    return ""


def _viewed(view: PictureView) -> dict[str, Any]:
    return {**dataclasses.asdict(view), "mean": list(view.mean), "std": list(view.std), "fast": False}


def of_library(backbone: Backbone) -> Any:
    """The net of the backbone, or timm's own net with its tensors if it was made without timm."""
    if not isinstance(backbone.net, plain_timm.PlainTimmViT):
        return backbone.net
    timm = library(backbone.spec, "timm", "timm")
    net = timm.create_model(backbone.opens["base"], **{**backbone.opens["options"], "pretrained": False})
    net.load_state_dict(backbone.net.state_dict())
    return net.requires_grad_(False).eval()


def covered(backbone: Backbone, form: Form) -> dict[str, Any] | None:
    """What the plain net takes to stand for the net of a backbone; None if that has a part that is not covered, or if
    the two do not compute the same bits of one picture."""
    view = backbone.preprocess
    assert isinstance(view, PictureView)
    try:
        sizes = form.sizes(backbone.net)
        with torch.device("meta"):
            plain = form.net(**sizes)
    except (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError):
        return None
    state = backbone.net.state_dict()
    if {k: v.shape for k, v in plain.state_dict().items()} != {k: v.shape for k, v in state.items()}:
        return None
    if sizes["image_size"] != view.size and not form.resizes:
        return None
    theirs, ours = dict(backbone.net.named_modules()), dict(plain.named_modules())
    same = all(_same(theirs.pop(name, None), module, form) for name, module in ours.items())
    if not same or not all(_passes(module) for module in theirs.values()):
        return None
    plain.load_state_dict(state, assign=True)
    plain.requires_grad_(False).eval()
    picture = torch.rand(1, 3, view.size, view.size, generator=torch.Generator().manual_seed(0)) * 4 - 2
    with torch.no_grad():
        found = plain(picture) if form.forward is None else form.forward(plain, picture)
        return sizes if torch.equal(backbone(picture), found) else None


def _same(theirs: nn.Module | None, ours: nn.Module, form: Form) -> bool:
    """Whether a part of the library's net computes what the part of the same name here computes, as far as classes and
    attributes tell it."""
    if theirs is None or _hooked(theirs):
        return False
    if not all(getattr(theirs, name, value) is value for name, value in SETTLED.items()):
        return False
    kind = type(theirs)
    if isinstance(ours, nn.LayerNorm):
        sizes = (ours.eps, ours.normalized_shape)
        return (
            isinstance(theirs, nn.LayerNorm)
            and kind.__name__ == "LayerNorm"
            and (theirs.eps, theirs.normalized_shape) == sizes
        )
    if type(ours) in (nn.Linear, nn.Identity, nn.Conv2d, nn.Sequential, nn.ModuleList):
        return kind is type(ours) and theirs.extra_repr() == ours.extra_repr()
    return kind.__module__.partition(".")[0] == form.library and form.like.get(kind.__name__) == type(ours).__name__


def _passes(module: nn.Module) -> bool:
    """Whether a part that only the library's net has does nothing that the plain net does not do: it passes its input
    on, or is the GELU that the plain MLP computes itself."""
    if _hooked(module):
        return False
    if type(module) is nn.Dropout:
        return module.p == 0
    if isinstance(module, nn.GELU):
        return module.approximate == "none"
    return type(module) is nn.Identity or (
        type(module).__name__ == "GELUActivation" and getattr(module, "act", None) is F.gelu
    )


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, False)}


def _folder(place: str) -> Path | None:
    """The folder that a name leads to; None if it is an id on the hub."""
    path = Path(place).expanduser()
    return path if path.is_dir() else None


def _digest(folder: Path) -> str:
    """SHA-256 of the files of a folder that say how its model is made."""
    digest = hashlib.sha256()
    for name in ABOUT:
        content = (folder / name).read_bytes() if (folder / name).is_file() else b"absent"
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
