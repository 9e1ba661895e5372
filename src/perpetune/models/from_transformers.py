"""Backbones that transformers builds: an id on the hub or a local folder in its layout."""

from __future__ import annotations

import contextlib
import json
import struct
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.data.pictures.view import Interpolation, PictureView
from perpetune.errors import PerpetuneError, UsageError, closest
from perpetune.models.backbone import Backbone, triple
from perpetune.models.hub import hub_file, one_line

# `model_type` of the families whose feature is the class token after the final norm, and whether they
# interpolate their position embeddings only when they are told to.
FAMILIES = {
    "vit": True,
    "deit": True,
    "vit_msn": True,
    "dinov2": False,
    "dinov2_with_registers": False,
    "dinov3_vit": False,
}

# Shown as examples when an id is not found: one line of ids that exist, not a limit.
KNOWN = (
    "google/vit-base-patch16-224",
    "google/vit-base-patch16-224-in21k",
    "google/vit-large-patch16-224-in21k",
    "facebook/deit-tiny-patch16-224",
    "facebook/deit-small-patch16-224",
    "facebook/deit-base-patch16-224",
    "facebook/dino-vits16",
    "facebook/dino-vitb16",
    "facebook/dinov2-small",
    "facebook/dinov2-base",
    "facebook/dinov2-large",
    "facebook/dinov2-with-registers-small",
    "facebook/dinov2-with-registers-base",
    "facebook/vit-msn-small",
    "facebook/vit-msn-base",
    "facebook/dinov3-vits16-pretrain-lvd1689m",
    "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "Qwen/Qwen3-0.6B",
    "meta-llama/Llama-3.2-1B",
    "google/gemma-3-1b-it",
    "EleutherAI/pythia-160m",
    "openai-community/gpt2",
    "facebook/opt-125m",
)

# Tensors of heads that a checkpoint may hold and a feature extractor has no use for.
HEADS = ("pooler.", "classifier.", "cls_classifier.", "distillation_classifier.", "decoder.")

PREPROCESSOR = "preprocessor_config.json"
FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def load(spec: str, source: str, config: Any = None, *, pretrained: bool, image_size: int | None) -> Backbone:
    """The vision transformer at `source`, a folder or an id on the hub; safetensors only.

    Args:
        config: what `config_of` has read there, where that was done already.

    Raises:
        UsageError: there is no such model, or it is of a family whose features are not defined here.
        PerpetuneError: the tensors in the checkpoint are not those of the model; names them.
    """
    config = config or config_of(spec, source)
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"{spec}: a {config.model_type!r} model cannot be used; one of {', '.join(FAMILIES)} can, and causal "
            "language models"
        )
    preprocess = _preprocess(spec, source, config, image_size)
    net = _pretrained(spec, source, config) if pretrained else _random(config)
    told = FAMILIES[config.model_type] and preprocess.size != _side(spec, config.image_size)
    forward = partial(class_token, interpolate_pos_encoding=True) if told else class_token
    prefix = 1 + getattr(config, "num_register_tokens", 0) + (config.model_type == "deit")  # a token to distill by
    return Backbone(net, spec=spec, dim=config.hidden_size, preprocess=preprocess, forward=forward, prefix=prefix)


def class_token(net: nn.Module, pixels: Tensor, **options: Any) -> Tensor:
    """Class token after the final norm, `(B, D)`."""
    tokens: Tensor = net(pixel_values=pixels, **options).last_hidden_state  # (B, N, D)
    return tokens[:, 0]


def config_of(spec: str, source: str, **where: str) -> Any:
    """The config of the model at `source`, a folder or an id on the hub.

    Args:
        where: `gguf_file`, where it is such a file in the folder or repository.

    Raises:
        UsageError: there is none, or transformers cannot read it.
    """
    from transformers import AutoConfig

    if not Path(source).is_dir() and source.count("/") != 1:
        raise UsageError(f"{spec}: no such folder, and an id on the hub is OWNER/NAME; {closest(source, KNOWN)}")
    try:
        return AutoConfig.from_pretrained(source, **where)
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:  # the last two: torn GGUF files
        if Path(source).is_dir():
            said = "the file is torn: " if isinstance(error, IndexError | struct.error) else ""
            raise UsageError(f"{spec}: {said}{one_line(error)}") from error
        reason = one_line(error).partition(". ")[0]
        raise UsageError(
            f"{spec}: no such folder, and not to be had from the hub or its cache ({reason}); {closest(source, KNOWN)}"
        ) from error


def _extra(config: Any) -> dict[str, Any]:
    return {"add_pooling_layer": False} if config.model_type in ("vit", "deit") else {}


def _random(config: Any) -> nn.Module:
    from transformers import AutoModel

    net: nn.Module = AutoModel.from_config(config, dtype=torch.float32, **_extra(config))
    return net


def _pretrained(spec: str, source: str, config: Any) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModel

    try:
        with quiet():
            net, report = AutoModel.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that the report names them
                output_loading_info=True,
                **_extra(config),
            )
    except SafetensorError as error:
        raise PerpetuneError(f"{spec}: its safetensors file cannot be read: {one_line(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise PerpetuneError(f"{spec}: {one_line(error)}") from error
    check_report(spec, report, HEADS)
    loaded: nn.Module = net
    return loaded


def check_report(spec: str, report: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> None:
    """Raise what transformers has noted while it loaded tensors.

    Args:
        report: its `output_loading_info`.
        ignored: what the names of tensors begin with that may be there beside those of the model.

    Raises:
        PerpetuneError: the checkpoint has too few tensors, too many or others; names up to eight of each.
    """
    faults = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(name for name in report["unexpected_keys"] if not name.startswith(ignored)),
        "of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
    }
    if any(faults.values()):
        said = "; ".join(f"{what}: {', '.join(names[:8])}" for what, names in faults.items() if names)
        raise PerpetuneError(f"{spec}: the checkpoint does not hold this model's tensors; {said}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no loading report from transformers: what is wrong is raised instead."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _preprocess(spec: str, source: str, config: Any, image_size: int | None) -> PictureView:
    """From `preprocessor_config.json`; with a warning, ImageNet's mean and std where there is none."""
    file = Path(source) / PREPROCESSOR
    path = (file if file.is_file() else None) if Path(source).is_dir() else hub_file(spec, source, PREPROCESSOR)
    if path is None:
        warnings.warn(f"{spec} has no {PREPROCESSOR}: ImageNet's mean and std are assumed", stacklevel=2)
        return PictureView(size=image_size or _side(spec, config.image_size))
    try:
        given = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{spec}: {PREPROCESSOR} is no JSON: {error}") from error
    side, crop = _side(spec, given.get("size", config.image_size)), None
    if given.get("do_center_crop"):
        side, whole = _side(spec, given.get("crop_size", side)), side
        crop = min(1.0, side / whole)
    resample = given.get("resample", 2)
    if resample not in FILTERS:
        raise UsageError(f"{spec}: resample {resample!r} in {PREPROCESSOR}; one of {FILTERS} is expected")
    normalise = given.get("do_normalize", True)
    return PictureView(
        size=image_size or side,
        mean=triple(spec, given.get("image_mean", (0.5, 0.5, 0.5)) if normalise else (0.0, 0.0, 0.0)),
        std=triple(spec, given.get("image_std", (0.5, 0.5, 0.5)) if normalise else (1.0, 1.0, 1.0)),
        interpolation=FILTERS[resample],
        crop=crop,
    )


def _side(spec: str, size: Any) -> int:
    """The side in pixels that transformers writes as a number, as height and width, or as the shortest edge."""
    values = list(size.values()) if isinstance(size, dict) else size if isinstance(size, list | tuple) else [size]
    if len(set(values)) == 1 and isinstance(values[0], int):
        return values[0]
    raise UsageError(f"{spec}: image size {size!r} in its config; one side in pixels is expected")
