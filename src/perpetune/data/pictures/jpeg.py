"""Let Pillow's JPEG decoder have memory that its library writes fast.

libjpeg-turbo makes the pixels of one line at a time, and Pillow copies the line into the picture. If the memory of the
line is aligned to 32 bytes, the library writes it past the caches, and the copy waits for the main memory: a picture of
500 x 375 takes up to 1.4 times as long. `malloc` gives such memory by chance, and a process often keeps its chance.

Source: the colour conversion of libjpeg-turbo for AVX2 (`vmovntdq` in `jdcolext-avx2.asm`), on processors of x86-64.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

NAME = "perpetune_jpeg"
ALIGNED = 32  # bytes
TRIES = 8
_NEEDED = sys.platform == "linux" and platform.machine() == "x86_64"

if _NEEDED:
    _library = ctypes.PyDLL(None)  # the one that Pillow asks
    _malloc, _free = _library.malloc, _library.free
    _malloc.restype, _malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    _free.restype, _free.argtypes = None, [ctypes.c_void_p]


def prepare(image: ImageFile) -> None:
    """Make the decoding of a JPEG picture fast that has been opened and not yet been loaded. Other pictures stay."""
    from PIL import Image

    if not _NEEDED or image.mode != "RGB" or len(image.tile) != 1 or _pillows() is None:
        return
    tile: Any = image.tile[0]
    name, *others = tile
    if name == "jpeg":
        Image.register_decoder(NAME, _Decoder)  # type: ignore[arg-type]  # a class like Pillow's own
        changed: Any = (NAME, *others) if type(tile) is tuple else type(tile)(NAME, *others)  # a tuple before 11
        image.tile = [changed]


def _pillows() -> Any:
    """Pillow's decoder; None if it has none of this name."""
    from PIL import Image

    return getattr(getattr(Image, "core", None), "jpeg_decoder", None)


class _Decoder:
    """Pillow's decoder, of which one step is changed."""

    pulls_fd = False

    def __init__(self, mode: str, *settings: Any):
        real = _pillows()(mode, *settings)
        self.decode, self.cleanup = real.decode, real.cleanup
        self._allocate = real.setimage

    def setimage(self, image: Any, extents: tuple[int, int, int, int]) -> None:
        held = _taken(4 * (extents[2] - extents[0]))
        try:
            self._allocate(image, extents)
        finally:
            for place in held:
                _free(place)


def _taken(size: int) -> list[int | None]:
    """Take memory until the next `size` bytes that are asked for are not aligned; the caller frees what is taken."""
    held: list[int | None] = []
    for _ in range(TRIES):
        place = _malloc(size)
        if place is None:
            break
        if place % ALIGNED:
            _free(place)  # whoever asks next gets it
            break
        held += [place, _malloc(size + ALIGNED // 2)]  # the second one, because all places are multiples of 16
    return held
