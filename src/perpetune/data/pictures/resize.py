"""Resize pictures: with Pillow, to the same bits in less time, or with torch's kernels, to almost the same values.

`exact` is Pillow's result. Who makes it does not show: a process that resizes many pictures takes `passes.py` in the
place of Pillow, if numba is installed and both give the same bits.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from perpetune.data.pictures.memory import pixels_of

if TYPE_CHECKING:
    from PIL.Image import Image

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of a picture, in its pixels."""

MOST = 4_000_000
"""Pixels of the largest picture that `by_passes` takes less time for: it needs memory for two copies."""
PATIENCE = 256
"""More pictures than these are many: numba takes as long to start as it saves with so many."""
BLOCKS = 2
"""Blocks of memory, of up to 16 MB, that Pillow keeps for the next picture once there are many. By default it keeps
none, and the system gives new pages for each: a seventh of the time in which a JPEG file of 500 x 375 is read."""


def exact(image: Image, size: int, interpolation: Interpolation, box: Box | None, flip: bool = False) -> Tensor:
    """The part `box` of an RGB picture, or all of it, as uint8 `(3, size, size)`, to the bits of the Pillow in use.

    Args:
        flip: exchange left and right afterwards.
    """
    many, same, pixels = _process.counts(), box is None and image.size == (size, size), image.width * image.height
    if many and not same and pixels <= MOST and interpolation in ("bilinear", "bicubic") and _process.has_passes():
        return by_passes(image, size, interpolation == "bicubic", box, flip)
    made = by_pillow(image, size, interpolation, box)
    return made.flip(2) if flip else made


def fast(image: Image, size: int, interpolation: Interpolation, box: Box | None, flip: bool = False) -> Tensor:
    """As `exact`, by torch's kernels for the bilinear and the bicubic filter. Values differ by one or two."""
    if interpolation not in ("bilinear", "bicubic"):
        return exact(image, size, interpolation, box, flip)
    _process.counts()
    if box is not None:
        left, top = (min(round(start), end - 1) for start, end in zip(box[:2], image.size, strict=True))
        image = image.crop((left, top, max(left + 1, round(box[2])), max(top + 1, round(box[3]))))
    whole, owner = pixels_of(image)  # torch's kernels are fast where the channels of a pixel lie side by side
    pixels = torch.from_numpy(whole.view(np.uint8).reshape(*whole.shape, 4)).permute(2, 0, 1)[None]
    made = F.interpolate(pixels, size=(size, size), mode=interpolation, antialias=True)[0]
    made = made.clone() if made.data_ptr() == pixels.data_ptr() else made
    del owner
    together = made.permute(1, 2, 0)
    if flip and together.is_contiguous():  # one number a pixel is turned in a quarter of the time of four
        made = together.view(torch.int32).flip(1).view(torch.uint8).permute(2, 0, 1)
    elif flip:
        made = made.flip(2)
    return made[:3]


def by_pillow(image: Image, size: int, interpolation: Interpolation, box: Box | None) -> Tensor:
    """As `exact`, by Pillow itself."""
    from PIL.Image import Resampling

    image = image.resize((size, size), Resampling[interpolation.upper()], box=box)
    planes = bytearray()
    for channel in "RGB":  # Pillow copies a channel faster than numpy or torch can turn the axes
        planes += image.tobytes("raw", channel)
    return torch.frombuffer(planes, dtype=torch.uint8).view(3, size, size)


def by_passes(image: Image, size: int, cubic: bool, box: Box | None, flip: bool = False) -> Tensor:
    """As `exact`, by `passes.py`, for the bicubic and the bilinear filter. ImportError without numba."""
    from perpetune.data.pictures import passes

    left, top, right, bottom = box or (0, 0, *image.size)
    pixels, owner = pixels_of(image)
    first = rows_first(*image.size, size)
    made = passes.resized(pixels, float(left), float(top), float(right), float(bottom), size, cubic, flip, first)
    del owner
    return torch.from_numpy(made)


def rows_first(width: int, height: int, size: int) -> bool:
    """Whether Pillow makes a picture lower before it makes it narrower. Each pass rounds, so the order shows.

    Pillow does so since version 13, where the height loses more than twice as many pixels as the width, of the whole
    picture also if a part of it is resized.
    """
    from PIL import __version__

    lost = height - size
    return int(__version__.partition(".")[0]) >= 13 and lost > 0 and lost > 2 * (width - size)


class _Process:
    """What this process has resized, and what it does because there are many pictures."""

    def __init__(self) -> None:
        self._seen, self._many = 0, False
        self._agreed: bool | None = None

    def counts(self) -> bool:
        """Count one more picture; returns whether there are many."""
        if not self._many:
            self._seen += 1
            if self._seen > PATIENCE:  # not `==`: threads may count past it
                self._many = True
                self._keep_memory()
        return self._many

    def has_passes(self) -> bool:
        """Whether `passes.py` can stand for Pillow."""
        if self._agreed is None:
            self._agreed = importlib.util.find_spec("numba") is not None and self._agree()
        return self._agreed

    def _keep_memory(self) -> None:
        """Let Pillow keep memory, unless somebody has said how much it keeps."""
        from PIL import Image

        core: Any = getattr(Image, "core", None)
        asked = "PILLOW_BLOCKS_MAX" in os.environ or not hasattr(core, "set_blocks_max")
        if not asked and core.get_blocks_max() == 0:
            core.set_blocks_max(BLOCKS)

    def _agree(self) -> bool:
        """Whether they give Pillow's bits, for pictures of some shapes: a new version of Pillow may add otherwise."""
        from PIL import Image, __version__

        rng = np.random.default_rng(0)
        try:
            import numba

            if getattr(numba.config, "DISABLE_JIT", False):
                raise ArithmeticError("NUMBA_DISABLE_JIT is set")
            for width, height in ((50, 37), (37, 50), (38, 60), (38, 61), (12, 33), (9, 12)):
                image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
                for box in (None, (0.4, 2.6, width - 1.3, height - 0.7)):
                    for cubic in (False, True):
                        expected = by_pillow(image, 16, "bicubic" if cubic else "bilinear", box)
                        if not torch.equal(by_passes(image, 16, cubic, box), expected):
                            raise ArithmeticError(f"it does not resize to the bits of Pillow {__version__}")
        except Exception as error:  # noqa: BLE001  numba has many errors, and nothing is lost without it
            warnings.warn(f"numba is not used: {error}. Pillow resizes instead, in more time.", stacklevel=2)
            return False
        return True


_process = _Process()
