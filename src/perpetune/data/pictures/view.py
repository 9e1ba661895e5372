"""The view of pictures: it makes the pixels that a backbone expects, and has all other code about pictures only."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from perpetune.data.check import in_threads
from perpetune.data.examples import Augment, Depth, Purpose, Question, TableSet, View
from perpetune.data.names import printable, several
from perpetune.data.pictures import resize
from perpetune.data.pictures.read import LARGE, as_rgb, is_picture, picture_files, read_picture, walk
from perpetune.data.pictures.resize import Box, Interpolation
from perpetune.data.pictures.tables import FileTable, PictureTable
from perpetune.data.sources import Table
from perpetune.errors import DataError, UsageError
from perpetune.tasks import Batch, Inputs, Item, stack

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = Literal["exact", "fast"]
"""How pictures are resized; see `PictureView.fast`."""


@dataclass(frozen=True)
class PictureView(View):
    """The input that a backbone was trained with.

    Attributes:
        size: the side of the square input, in pixels.
        mean, std: values for each channel, for pixels in [0, 1]. The model applies them on its device.
        interpolation: the resampling filter.
        crop: share of the resized picture that the centre crop keeps; None squeezes the whole
            picture into the square without a crop.
        squeeze: the crop keeps that share of each side, and squeezes it into the square; else the crop is a square.
        fast: resize with torch, which takes a fifth of Pillow's time, and read large JPEG files at a half, a
            quarter or an eighth. Values differ from Pillow's by one or two of 255, the crop begins and ends at whole
            pixels, and what was read smaller is a little softer. Nearest and Lanczos are always Pillow's.
    """

    takes = "pictures"
    noun = "images"
    verb = "predict"

    size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bicubic"
    crop: float | None = None
    squeeze: bool = False
    fast: bool = False

    def __call__(self, image: Image, augment: Augment = "none", seed: int | None = None) -> Tensor:
        """An RGB picture as uint8 `(3, size, size)`; with a `seed`, augmented at random."""
        rng = np.random.default_rng(seed) if seed is not None and augment != "none" else None
        box = None
        if rng is not None and "crop" in augment:
            box = random_box(*image.size, rng)
        elif self.crop is not None:
            box = centre_box(*image.size, self.crop, self.squeeze)
        flip = rng is not None and "flip" in augment and _flips(rng)
        return (resize.fast if self.fast else resize.exact)(image, self.size, self.interpolation, box, flip)

    @property
    def least(self) -> int | None:
        """The shorter side that a picture has to keep when it is read smaller than it is stored; None if it never is.

        Three times the side of the input: what a filter makes of that looks as it does from the whole picture.
        """
        return 3 * self.size if self.fast else None

    @property
    def extent(self) -> str:
        return f"size={self.size}"

    def load(self, path: str | os.PathLike[str]) -> Tensor:
        """The picture at `path` as uint8 `(3, size, size)`, without augmentation; DataError if it cannot be read."""
        return self(read_picture(os.fspath(path), printable(os.fspath(path)), self.least))

    def decode(self, content: bytes, name: str, most: int | None = None) -> Tensor:
        """The picture in the bytes of a file, as `load` gives one at a path.

        Args:
            name: stands for it in messages.
            most: the most pixels that it may have.
        """
        return self(read_picture(content, name, self.least, most))

    def examples(
        self, table: Table, rows: Sequence[int], classes: Sequence[str], purpose: Purpose, augment: Augment = "none"
    ) -> PictureSet:
        if not isinstance(table, PictureTable):
            raise self._refused(table)
        return (CaptionSet if table.captioned else PictureSet)(table, rows, classes, self, augment)

    def collate(self, items: Sequence[Item]) -> Batch:
        return stack(items)

    def typed(self, inputs: Sequence[str]) -> list[Path]:
        return picture_files([Path(given) for given in inputs])

    def plain(self, path: str) -> bool:
        if os.path.isdir(path):
            return bool(walk(path)[0])
        return os.path.isfile(path) and (is_picture(path) or not os.path.splitext(path)[1])

    def ask(
        self,
        given: Any,
        *,
        first: int = 0,
        options: Sequence[str] = (),
        choose: bool | None = None,
        unreadable: list[str] | None = None,
    ) -> list[Question]:
        """Turn paths, PIL images, or a uint8 tensor `(N, 3, size, size)` into questions."""
        if isinstance(given, Tensor):
            if given.dtype != torch.uint8 or given.shape[1:] != (3, self.size, self.size):
                raise UsageError(
                    f"predict: expected a uint8 tensor (N, 3, {self.size}, {self.size}), "
                    f"got {given.dtype} {tuple(given.shape)}"
                )
            return [Question(f"image {number}", pixels) for number, pixels in enumerate(given, first)]
        questions = []
        for number, image in enumerate(given, first):
            try:
                path = isinstance(image, str | Path)
                questions.append(
                    Question(str(image), self.load(image)) if path else Question(f"image {number}", self(as_rgb(image)))
                )
            except DataError as error:
                if unreadable is None:
                    raise
                unreadable.append(str(error))
        return questions

    def unlabelled(self, path: str) -> TableSet:
        files = [str(file) for file in picture_files([path])]
        return PictureSet(FileTable("", files, [""] * len(files)), range(len(files)), [""], self)

    def constants(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value).view(1, 3, 1, 1) for name, value in (("mean", self.mean), ("std", self.std))}


class PictureSet(TableSet):
    """Pictures of a task.

    `look` decodes every picture. The table keeps the pixels that came out (`Kept`), so that the first pass, and every
    later one, need not decode the picture again. Where a part of it is cut out at random, it keeps the whole picture.

    Args:
        view: turns pictures into pixels.
        augment: the random changes to a picture that is loaded with a seed.
    """

    table: PictureTable

    def __init__(
        self,
        table: PictureTable,
        rows: Sequence[int],
        classes: Sequence[str],
        view: PictureView,
        augment: Augment = "none",
    ):
        super().__init__(table, rows, classes)
        self.view = view
        self.augment = augment
        self.deterministic = augment == "none"

    def load(self, index: int, seed: int | None) -> Tensor:
        """Pixels, uint8 `(3, S, S)`; DataError, with the picture's name, if it cannot be read any more."""
        row, table = self.rows[index], self.table
        if self._keeps_pixels:
            pixels = table.kept.get((self.view, row), table.mark, row)
            if pixels is not None:
                flips = self.augment == "flip" and seed is not None
                return pixels.flip(2) if flips and _flips(np.random.default_rng(seed)) else pixels
        image = table.decoded.get((self.view.least, row), table.mark, row)
        return self.view(self._open(row) if image is None else image, self.augment, seed)

    @property
    def _keeps_pixels(self) -> bool:
        """Whether pixels are the same each time, or turned at random after all else."""
        return self.augment == "none" or (self.augment == "flip" and type(self.view) is PictureView)

    def look(self, row: int, depth: Depth) -> None:
        if depth != "decode" or type(self.table).check is not PictureTable.check:
            super().look(row, depth)
            return
        mark = self.table.mark(row)
        image = self._open(row)
        self.table.measured(row, image)
        if self._keeps_pixels:
            self.table.kept.put((self.view, row), mark, self.view(image))
        else:
            self.table.decoded.put((self.view.least, row), mark, image)

    def _open(self, row: int) -> Image:
        least = self.view.least
        return self.table.open(row) if least is None else self.table.open_small(row, least)

    def identity(self) -> str | None:
        if type(self.view) is not PictureView or type(self.table).open is not PictureTable.open:
            return None  # another package's view or table may do more than its fields or bytes say
        digest = hashlib.sha256(repr(self.view).encode())
        seals = list(in_threads(self.table.seal, self.rows) if self.table.files else map(self.table.seal, self.rows))
        for row, seal in zip(self.rows, seals, strict=True):
            digest.update(repr((self.table.key(row), self.table.labels[row], seal)).encode())
        return digest.hexdigest() if all(seals) else None

    def notes(self) -> list[str]:
        large = [self.table.name(row) for row in self.rows if row in self.table.large]
        if not large:
            return []
        return [
            f"{len(large)} pictures have more than {LARGE // 10**6} million pixels, and each is read anew in every "
            f"epoch; smaller copies save time: {several(large)}"
        ]

    def _of(self, rows: Sequence[int], classes: Sequence[str]) -> PictureSet:
        return type(self)(self.table, rows, classes, self.view, self.augment)


class CaptionSet(PictureSet):
    """Pictures with captions. An example is loaded with one of its captions, which the seed draws; without a seed it is
    the first. In `Inputs` the position of this caption has the name `caption`."""

    def __init__(
        self,
        table: PictureTable,
        rows: Sequence[int],
        classes: Sequence[str],
        view: PictureView,
        augment: Augment = "none",
    ):
        super().__init__(table, rows, classes, view, augment)
        self.deterministic = self.deterministic and all(len(table.captions(row)) == 1 for row in rows)

    def captions(self, index: int) -> Sequence[str]:
        return self.table.captions(self.rows[index])

    def load(self, index: int, seed: int | None) -> tuple[Tensor, int]:  # type: ignore[override]
        count = len(self.captions(index))
        drawn = 0 if seed is None else int(np.random.default_rng((seed, count)).integers(count))
        return super().load(index, seed), drawn

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = stack([(pixels, target, number) for (pixels, _), target, number in items])
        drawn = torch.tensor([caption for (_, caption), _, _ in items], dtype=torch.int64)
        return Batch(Inputs(pixels=batch.inputs.pixels, caption=drawn), batch.targets, batch.numbers)


def _flips(rng: np.random.Generator) -> bool:
    """Whether left and right are exchanged: every second time."""
    return rng.random() < 0.5


def centre_box(width: int, height: int, crop: float, squeeze: bool = False) -> Box:
    """The centred square whose side is `crop` of the shorter side; with `squeeze`, `crop` of each side."""
    if squeeze:
        left, top = (1 - crop) / 2 * width, (1 - crop) / 2 * height
        return left, top, width - left, height - top
    side = crop * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


_LOG_ASPECT = np.log(3 / 4), np.log(4 / 3)


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A random part of the picture: area 0.5 to 1, aspect 3/4 to 4/3, inside the borders."""
    area = width * height * rng.uniform(0.5, 1.0)
    aspect = np.exp(rng.uniform(*_LOG_ASPECT))
    w, h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, left + w, top + h
