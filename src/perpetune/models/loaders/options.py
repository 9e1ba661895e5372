"""Options that several loaders share, and the code that carries them out."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from perpetune.errors import MissingExtra, PerpetuneError, UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.families import LINEAR_ROLES
from perpetune.models.loaders.hub import one_line

MOST_SIDE = 2**13
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]
"""The side of a square input, in pixels; None is the model's own."""

NOTHING: dict[str, Any] = {
    "pretrained": True,
    "load_in_4bit": False,
    "dtype": "float32",
    "chat": False,
    "gradient_checkpointing": False,
}
"""Values of options that, like None, ask for nothing. A loader without the option accepts them, because recipes stored
by older versions list every option for every loader."""


def taken(spec: str, what: str, load: Callable[..., Backbone], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options among `given` that `load` takes and that are not None.

    Args:
        what: the kind of model that `load` builds, as messages name it.

    Raises:
        UsageError: `load` does not take a given option; the message lists the options that it takes.
    """
    takes = [p.name for p in inspect.signature(load).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name, value in given.items():
        if name not in takes and value is not None and value != NOTHING.get(name):
            raise UsageError(f"{spec}: this is {what}, which takes {', '.join(takes)}, but not {name}")
    return {name: value for name, value in given.items() if name in takes and value is not None}


def library(spec: str, extra: str, name: str, *modules: str) -> ModuleType:
    """The package `name`, imported together with some of its modules.

    Raises:
        MissingExtra: it is not installed; the message names the extra of perpetune that brings it.
        PerpetuneError: it cannot be imported, because torchvision was built for another torch.
    """
    try:
        package = importlib.import_module(name)
        for module in modules:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(spec, extra) from error
    except RuntimeError as error:  # `operator torchvision::nms does not exist`
        reason = str(error).splitlines()[0]
        raise PerpetuneError(
            f"{spec}: {name} cannot be imported ({reason}): torchvision was built for another torch; "
            "pip install --force-reinstall torch torchvision from one index"
        ) from error
    return package


def try_size(backbone: Backbone, image_size: int | None) -> None:
    """Run one forward pass if a size is given, so that a wrong size fails here and not at the start of training.

    Raises:
        UsageError: the net cannot take pictures of that size.
    """
    if image_size is None:
        return
    try:
        with torch.no_grad():
            backbone(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise UsageError(
            f"{backbone.spec}: image_size {image_size} does not fit this net: {one_line(error)}"
        ) from error


def side_of(spec: str, size: Any) -> int:
    """The side in pixels that a config gives: as a number, as height and width, or as the shortest edge.

    Raises:
        UsageError: it is none, or two.
    """
    values = list(size.values()) if isinstance(size, dict) else size if isinstance(size, list | tuple) else [size]
    whole = values and all(isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= MOST_SIDE for v in values)
    if not whole or len(set(values)) != 1:
        raise UsageError(
            f"{spec}: image size {str(size)[:60]} in its config; one side in pixels is expected, from 1 to {MOST_SIDE}"
        )
    return int(values[0])


def in_4bit(backbone: Backbone) -> Backbone:
    """Replace the linear layers of the backbone's blocks by bitsandbytes' 4-bit ones (NF4, arXiv:2305.14314).

    Returns:
        The same backbone.

    Raises:
        PerpetuneError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise PerpetuneError(f"{backbone.spec}: load_in_4bit needs bitsandbytes: pip install bitsandbytes") from error
    backbone.quantised_from = f"nf4 of {backbone.fingerprint()}"
    for place in backbone.pet_places([role for role in backbone.roles() if role in LINEAR_ROLES]):
        values = dict(place.module.state_dict())
        if not isinstance(place.module, nn.Linear):  # GPT-2's Conv1D, whose weight is transposed
            values["weight"] = values["weight"].t().contiguous()
        new = bitsandbytes.nn.Linear4bit(place.d_in, place.d_out, bias="bias" in values, quant_type="nf4")
        new.load_state_dict(values)
        # On some CPUs a layer in evaluation mode would use a function without a gradient; all layers here are in it.
        new.support_avx512bf16_for_cpu = False
        backbone.net.set_submodule(place.path, new.requires_grad_(False).eval())
    return backbone
