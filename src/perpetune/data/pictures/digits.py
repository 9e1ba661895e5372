"""The packaged demo data: scikit-learn's handwritten digits."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from perpetune.data.pictures.tables import MemoryTable
from perpetune.data.sources import Source
from perpetune.data.split import hold_out

SIDE, INSIDE = 32, 26  # the sides of a turned digit's picture, and of the digit inside it, in pixels
ROOT = 20261129  # the seed of the angles


class DigitsSource(Source):
    """1,797 real handwritten digits, 8 x 8 pixels, grey values 0..16 (`sklearn.datasets.load_digits`).

    A quarter of the pictures of each digit is held out for the test, always the same ones.

    Args:
        turn: the largest angle in degrees by which each picture is turned to either side; a picture always has the same
            angle. A pretrained model recognises upright digits without training; turned digits it must learn.
    """

    def __init__(self, *, turn: Annotated[float, Field(ge=0, le=180)] = 0.0) -> None:
        self.turn = turn

    def train(self) -> MemoryTable:
        return self._pick(0)

    def test(self) -> MemoryTable:
        return self._pick(1)

    def _pick(self, split: int) -> MemoryTable:
        contents, labels, splits = self._all
        rows = splits[split]
        return MemoryTable([contents[r] for r in rows], [labels[r] for r in rows], [str(r) for r in rows], "digits")

    @cached_property
    def _all(self) -> tuple[list[bytes], list[str], tuple[list[int], list[int]]]:
        import numpy as np
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
        shown = [_turned(image, row, self.turn) for row, image in enumerate(pixels)] if self.turn else list(pixels)
        contents = [b"P5 %d %d 255\n" % image.shape + image.tobytes() for image in shown]  # PGM: a header, grey values
        labels = [str(label) for label in digits.target]
        splits = hold_out(range(len(labels)), labels, str, share=0.25, seed=0, purpose="digits")
        return contents, labels, splits


def _turned(pixels: Any, row: int, most: float) -> Any:
    """A digit, uint8 `(8, 8)`, turned by at most `most` degrees, as uint8 `(SIDE, SIDE)`."""
    import numpy as np
    from PIL import Image

    angle = float(np.random.default_rng([ROOT, row]).uniform(-most, most))
    digit = Image.fromarray(pixels).resize((INSIDE, INSIDE), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(digit, ((SIDE - INSIDE) // 2, (SIDE - INSIDE) // 2))
    return np.asarray(canvas.rotate(angle, Image.Resampling.BICUBIC))
