"""The packaged demo data: scikit-learn's handwritten digits."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from perpetune.data.sources import MemoryTable, Source
from perpetune.data.split import hold_out

SIDE = 32  # of a varied digit's picture, in pixels
ROOT = 20261129  # seed of how digits are varied


class DigitsSource(Source):
    """1,797 real handwritten digits, 8 x 8 pixels, grey values 0..16 (`sklearn.datasets.load_digits`).

    One in four of each digit is held out for the test, always the same ones.

    Args:
        varied: each digit is turned by up to 45 degrees, made 10 to 22 pixels large, put somewhere into a picture of
            32 x 32 pixels, and may be dark on light; the same way each time. As they are, a pretrained model knows
            digits apart without any training; varied, it has something to learn.
    """

    def __init__(self, *, varied: bool = False) -> None:
        self.varied = varied

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
        shown = [_varied(image, row) for row, image in enumerate(pixels)] if self.varied else list(pixels)
        contents = [b"P5 %d %d 255\n" % image.shape + image.tobytes() for image in shown]  # PGM: a header, grey values
        labels = [str(label) for label in digits.target]
        splits = hold_out(range(len(labels)), labels, str, share=0.25, seed=0, purpose="digits")
        return contents, labels, splits


def _varied(pixels: Any, row: int) -> Any:
    """A digit, uint8 `(8, 8)`, turned, resized, moved and perhaps inverted: uint8 `(SIDE, SIDE)`."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng([ROOT, row])
    size = int(rng.integers(10, 23))
    digit = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    digit = digit.rotate(float(rng.uniform(-45, 45)), Image.Resampling.BICUBIC, expand=True)
    left, top = (int(rng.integers(0, max(1, SIDE - side + 1))) for side in digit.size)
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(digit, (left, top))
    found = np.asarray(canvas)
    return 255 - found if rng.random() < 0.5 else found.copy()
