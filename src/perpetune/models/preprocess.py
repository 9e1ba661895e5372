"""From a picture to the pixels that one backbone expects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Augment = Literal["none", "flip", "crop", "crop_flip"]


@dataclass(frozen=True)
class Preprocess:
    """How a backbone was fed when it was trained.

    Attributes:
        size: side of the square input, in pixels.
        mean, std: per channel, for pixels in [0, 1]; applied by the model, on its device.
        interpolation: the resampling filter.
        crop: share of the resized picture that the centre crop keeps; None squeezes the whole
            picture into the square without a crop.
    """

    takes: ClassVar[Literal["pictures"]] = "pictures"

    size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bicubic"
    crop: float | None = None

    def __call__(self, image: Image, augment: Augment = "none", seed: int | None = None) -> Tensor:
        """An RGB picture as uint8 `(3, size, size)`; with a `seed`, augmented at random."""
        rng = np.random.default_rng(seed) if seed is not None and augment != "none" else None
        if rng is not None and "crop" in augment:
            image = image.resize((self.size, self.size), self._filter, box=random_box(*image.size, rng))
        elif self.crop is None:
            image = image.resize((self.size, self.size), self._filter)
        else:
            image = image.resize((self.size, self.size), self._filter, box=centre_box(*image.size, self.crop))
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
        if rng is not None and "flip" in augment and rng.random() < 0.5:
            pixels = pixels.flip(2)
        return pixels.contiguous()

    @property
    def _filter(self) -> int:
        from PIL.Image import Resampling

        return Resampling[self.interpolation.upper()]


def centre_box(width: int, height: int, crop: float) -> tuple[float, float, float, float]:
    """The centred square whose side is `crop` of the shorter side."""
    side = crop * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random part of the picture: area 0.5 to 1, aspect 3/4 to 4/3, inside the borders."""
    area = width * height * rng.uniform(0.5, 1.0)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = min(width, np.sqrt(area * aspect)), min(height, np.sqrt(area / aspect))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, left + w, top + h
