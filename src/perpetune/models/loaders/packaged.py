"""The loader of backbones whose weights are part of this package."""

from __future__ import annotations

from importlib.resources import as_file, files

from perpetune.errors import UsageError, closest
from perpetune.models.backbone import Backbone
from perpetune.models.loaders import vit
from perpetune.models.loaders.options import Side

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
        return vit.load(spec, str(folder), pretrained=pretrained, image_size=image_size, load_in_4bit=load_in_4bit)
