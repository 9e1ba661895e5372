"""Small pictures, and a small transformer that reads them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from perpetune.check.kind import TinyKind
from perpetune.data.pictures.view import PictureView
from perpetune.models.backbone import Backbone
from perpetune.runtime import Runtime
from perpetune.seeding import generator, own_global_state
from perpetune.tasks import Examples, Inputs, Task

SIZE = 16  # side of the pictures, in pixels


class Pictures(Examples):
    """Noisy pictures whose class is a fixed pattern."""

    def __init__(self, classes: Sequence[str], each: int, seed: int):
        patterns = [torch.randint(0, 256, (3, SIZE, SIZE), generator=generator("pattern", c)) for c in classes]
        self.targets = [y for y in range(len(classes)) for _ in range(each)]
        noise = torch.randint(-40, 41, (len(self.targets), 3, SIZE, SIZE), generator=generator("noise", seed))
        pairs = zip(self.targets, noise, strict=True)
        self.pixels = [(patterns[y] + n).clamp(0, 255).to(torch.uint8) for y, n in pairs]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, seed: int | None) -> Tensor:
        pixels: Tensor = self.pixels[index]
        return pixels if seed is None or seed % 2 else pixels.flip(2)


def tiny_backbone() -> Backbone:
    """A transformer of two blocks and width 32, its weights random but always the same."""
    return copy.deepcopy(_made())


@cache
def _made() -> Backbone:
    from transformers import ViTConfig, ViTModel

    from perpetune.models.loaders.vit import class_token

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIZE, patch_size=4
    )
    with own_global_state("tiny backbone"):
        net = ViTModel(config, add_pooling_layer=False)
    return Backbone(net, spec="tiny", dim=32, preprocess=PictureView(SIZE), forward=class_token)


class TinyPictures(TinyKind):
    """Pictures of patterns, for heads that choose among classes."""

    name = "pictures"

    def backbone(self) -> Backbone:
        return tiny_backbone()

    def examples(self, classes: Sequence[str], each: int, seed: int) -> Examples:
        return Pictures(classes, each, seed)

    def asked(self, classes: Sequence[str]) -> Inputs:
        return Inputs(pixels=torch.stack(Pictures(classes, 3, seed=99).pixels))


def tiny_stream(
    runtime: Runtime, classes: Sequence[Sequence[str]] = (("a", "b"), ("c", "d"), ("e", "f"))
) -> list[Task]:
    """Tasks of twelve pictures a class."""
    return TinyPictures().stream(runtime, classes)
