"""Let Pillow's JPEG decoder have memory that its library writes fast.

libjpeg-turbo makes the pixels of one line at a time, and Pillow copies the line into the picture. If the memory of the
line is aligned to 32 bytes, the library writes it past the caches, and the copy waits for the main memory: a picture of
500 x 375 takes 1.15 to 1.25 times as long. `malloc` gives such memory by chance, and a process often keeps its chance.

Source: the colour conversion of libjpeg-turbo for AVX2 (`vmovntdq` in `jdcolext-avx2.asm`), on processors of x86-64.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
import warnings
from io import BytesIO
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
    if _NEEDED and image.mode == "RGB" and len(image.tile) == 1 and image.tile[0][0] == "jpeg" and _agrees():
        _change(image)


def _change(image: ImageFile) -> None:
    """Let the decoder of this name read the picture."""
    tile: Any = image.tile[0]
    changed: Any = (NAME, *tile[1:]) if type(tile) is tuple else type(tile)(NAME, *tile[1:])  # a tuple before 11
    image.tile = [changed]


@functools.cache
def _agrees() -> bool:
    """Register the decoder, once in a process. Returns whether a small picture has Pillow's pixels by it: a new version
    of Pillow may ask a decoder for something else."""
    from PIL import Image, __version__

    try:
        Image.register_decoder(NAME, _Decoder)  # type: ignore[arg-type]  # a class like Pillow's own
        Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(file := BytesIO(), "JPEG")
        with Image.open(file) as pillows:
            pillows.load()
        with Image.open(file) as ours:
            _change(ours)
            ours.load()
        if ours.tobytes() != pillows.tobytes():
            raise ArithmeticError("it has other pixels")
    except Exception as error:  # noqa: BLE001  nothing is lost without it
        warnings.warn(
            f"perpetune cannot give faster memory to the JPEG decoder of Pillow {__version__}: {error}. Pillow reads "
            "JPEG files as it is, in more time.",
            stacklevel=2,
        )
        return False
    return True


class _Decoder:
    """Pillow's decoder, of which one step is changed."""

    pulls_fd = False

    def __init__(self, mode: str, *settings: Any):
        from PIL import Image

        real = Image.core.jpeg_decoder(mode, *settings)  # type: ignore[attr-defined]
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
