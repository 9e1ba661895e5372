"""The packaged demo data: scikit-learn's handwritten digits."""

from __future__ import annotations

from functools import cached_property

from perpetune.data.sources import MemoryTable, Source
from perpetune.data.split import hold_out


class DigitsSource(Source):
    """1,797 real handwritten digits, 8 x 8 pixels, grey values 0..16 (`sklearn.datasets.load_digits`).

    One in four of each digit is held out for the test, always the same ones.
    """

    def __init__(self) -> None:
        pass

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
        contents = [b"P5 8 8 255\n" + image.tobytes() for image in pixels]  # PGM: a header and the grey values
        labels = [str(label) for label in digits.target]
        splits = hold_out(range(len(labels)), labels, str, share=0.25, seed=0, purpose="digits")
        return contents, labels, splits
