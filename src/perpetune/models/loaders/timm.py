"""The loader of backbones that timm builds: by name with weights from the hub, or from a folder in timm's layout."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from safetensors import SafetensorError, safe_open

from perpetune.data.pictures.resize import Interpolation
from perpetune.data.pictures.view import PictureView
from perpetune.errors import PerpetuneError, UsageError, closest
from perpetune.models.backbone import Backbone, triple
from perpetune.models.loaders.checkpoint import check_written, unbuilt
from perpetune.models.loaders.hub import hub_file, one_line
from perpetune.models.loaders.options import Side, in_4bit, library, side_of, try_size

WEIGHTS = "model.safetensors"
FILTERS: dict[str, Interpolation] = {f: f for f in get_args(Interpolation)}


def load_timm(
    rest: str, *, pretrained: bool = True, image_size: Side | None = None, load_in_4bit: bool = False
) -> Backbone:
    """`timm:NAME[.TAG]`: the model of `timm.create_model`, with the weights of that tag.

    Args:
        pretrained: False gives random weights.
        image_size: side of the input in pixels, if it is not the model's own; position embeddings are interpolated.
        load_in_4bit: hold the linear layers of the blocks in 4 bits (NF4), by bitsandbytes.

    Raises:
        UsageError: the name or tag is unknown (the message gives the closest three), or the net cannot take pictures
            of that size.
        PerpetuneError: timm has no weights for the model, has them only as pickle, or they cannot be fetched.
    """
    spec = f"timm:{rest}"
    backbone = _by_name(spec, rest, pretrained, image_size)
    try_size(backbone, image_size)
    return in_4bit(backbone) if load_in_4bit else backbone


def load_local(
    spec: str,
    folder: Path,
    config: Mapping[str, Any],
    *,
    architecture: str | None = None,
    pretrained: bool = True,
    image_size: Side | None = None,
    load_in_4bit: bool = False,
) -> Backbone:
    """A folder with `model.safetensors` and either a `config.json` that holds `config` or a named `architecture`.

    Raises:
        UsageError: there is no weights file, the architecture is unknown, or the net cannot take pictures of that size.
        PerpetuneError: the tensors in the file are not those of the architecture; the message names them.
    """
    backbone = _in_folder(spec, folder, config, architecture, pretrained, image_size)
    try_size(backbone, image_size)
    return in_4bit(backbone) if load_in_4bit else backbone


def _by_name(spec: str, name: str, pretrained: bool, image_size: int | None) -> Backbone:
    timm = library(spec, "timm", "timm", "timm.data")
    _check_name(timm, spec, name)
    if not pretrained:
        return _wrap(timm, spec, _create(timm, spec, name, image_size, num_classes=0), image_size)
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise PerpetuneError(f"{spec}: timm has no weights for this model; add a tag, or say pretrained: false")
    if not config.hf_hub_id:
        raise PerpetuneError(f"{spec}: its weights come only as a pickle file, which is not loaded; choose another tag")
    file = hub_file(spec, config.hf_hub_id, WEIGHTS)
    if file is None:
        raise PerpetuneError(f"{spec}: {config.hf_hub_id} has no {WEIGHTS}; weights as pickle are not loaded")
    overlay = {"file": str(file), "custom_load": False}
    net = _create(timm, spec, name, image_size, pretrained=True, pretrained_cfg_overlay=overlay)
    return _opened(_wrap(timm, spec, net, image_size), name, image_size)


def _in_folder(
    spec: str,
    folder: Path,
    config: Mapping[str, Any],
    architecture: str | None,
    pretrained: bool,
    image_size: int | None,
) -> Backbone:
    timm = library(spec, "timm", "timm", "timm.data")
    file = folder / WEIGHTS
    if pretrained and not file.is_file():
        raise UsageError(f"{spec}: there is no {WEIGHTS} in the folder")
    if architecture is None:
        check_written(spec, config)
        _check_name(timm, spec, str(config["architecture"]).partition(".")[0])
        given: dict[str, Any] = {"num_classes": 0} if not pretrained else {}
        net = _create(timm, spec, f"local-dir:{folder}", image_size, pretrained=pretrained, **given)
        return _opened(_wrap(timm, spec, net, image_size), f"local-dir:{folder.absolute()}", image_size)
    _check_name(timm, spec, architecture)
    if not pretrained:
        return _wrap(timm, spec, _create(timm, spec, architecture, image_size, num_classes=0), image_size)
    known = timm.get_pretrained_cfg(architecture)
    classes = _classes_in(spec, file, known.classifier if known else None)
    overlay = {"file": str(file.absolute()), "custom_load": False, "num_classes": classes}
    net = _create(timm, spec, architecture, image_size, pretrained=True, pretrained_cfg_overlay=overlay)
    return _opened(_wrap(timm, spec, net, image_size), architecture, image_size, pretrained_cfg_overlay=overlay)


def _check_name(timm: ModuleType, spec: str, name: str) -> None:
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise UsageError(f"{spec}: timm has no model {base!r}; {closest(base, timm.list_models())}")
    tags = [known for known in timm.list_pretrained(f"{base}.*") if known.partition(".")[0] == base]
    if tag and name not in tags:
        raise UsageError(f"{spec}: timm's {base} has no weights tagged {tag!r}; {closest(name, tags)}")


def _create(timm: ModuleType, spec: str, name: str, image_size: int | None, **kwargs: Any) -> Any:
    """The net. If weights are wanted, they are loaded strictly, together with their classifier."""
    if image_size is not None:
        kwargs["img_size"] = image_size
    try:
        return timm.create_model(name, **kwargs)
    except SafetensorError as error:
        raise PerpetuneError(f"{spec}: its safetensors file cannot be read: {one_line(error)}") from error
    except TypeError as error:
        what = "with this config" if image_size is None else "for another image size"
        raise UsageError(f"{spec}: the model cannot be built {what} ({one_line(error)})") from error
    except (RuntimeError, ValueError, KeyError, AssertionError, OSError) as error:
        raise PerpetuneError(f"{spec}: {one_line(error)}") from error
    except Exception as error:  # a config of strangers makes timm fail in any way
        raise unbuilt(spec, error) from error


def _opened(backbone: Backbone, name: str, image_size: int | None, **how: Any) -> Backbone:
    """The backbone, which now says that `create_model(name, **how)` makes its net."""
    size = {} if image_size is None else {"img_size": image_size}
    backbone.opens = {"library": "timm", "base": name, "options": {"pretrained": True, **size, **how, "num_classes": 0}}
    return backbone


def _wrap(timm: ModuleType, spec: str, net: Any, image_size: int | None) -> Backbone:
    net.reset_classifier(0)
    config = timm.data.resolve_model_data_config(net)
    channels = config["input_size"][0]
    if channels != 3:
        raise UsageError(f"{spec}: it takes pictures of {channels} channel(s), and perpetune gives it 3 (RGB)")
    squash = config["crop_mode"] == "squash"
    if config["crop_mode"] == "border":
        warnings.warn(
            f"{spec}: timm pads its pictures to a square; here the centred square is cut out of them", stacklevel=2
        )
    preprocess = PictureView(
        size=image_size or side_of(spec, config["input_size"][-1]),
        mean=triple(spec, config["mean"]),
        std=triple(spec, config["std"]),
        interpolation=FILTERS.get(config["interpolation"], "bilinear"),  # timm's `random` has no fixed filter
        crop=None if squash and config["crop_pct"] >= 1 else config["crop_pct"],
        squeeze=squash and config["crop_pct"] < 1,
    )
    return Backbone(
        net.float(),
        spec=spec,
        dim=net.head_hidden_size,
        preprocess=preprocess,
        prefix=int(getattr(net, "num_prefix_tokens", 0)),  # registers among them
        class_token=getattr(net, "cls_token", None) is not None,
    )


def _classes_in(spec: str, file: Path, classifier: str | tuple[str, ...] | None) -> int:
    """The number of classes of the classifier in a weights file; 0 if the file has no classifier."""
    name = f"{classifier if isinstance(classifier, str) else (classifier or ('head',))[0]}.weight"
    try:
        with safe_open(file, framework="pt") as tensors:
            return int(tensors.get_slice(name).get_shape()[0]) if name in tensors.keys() else 0  # noqa: SIM118
    except SafetensorError as error:
        raise PerpetuneError(f"{spec}: its safetensors file cannot be read: {one_line(error)}") from error
