"""Find picture files, and read pictures as a person sees them."""

from __future__ import annotations

import os
import stat
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perpetune.data.names import natural_key, printable
from perpetune.data.pictures import jpeg
from perpetune.data.sources import LFS, POINTER, file_start, is_pointer
from perpetune.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".avif", ".jp2",
)  # fmt: skip

# The errors of Pillow's readers for damaged or invalid bytes. They have no common class.
_BROKEN = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)


LARGE = 25_000_000  # pixels; a picture of more takes 100 MB and more while it is read

_one_at_a_time = threading.Lock()  # of the large ones, for threads read pictures side by side


def _unlock() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)  # the thread that holds it is not in the child


def is_picture(name: str) -> bool:
    """Whether `name` has the suffix of a picture file."""
    return name.lower().endswith(SUFFIXES)


class TooLarge(DataError):
    """A picture has more pixels than may be read."""


def read_picture(source: str | bytes, name: str, least: int | None = None, most: int | None = None) -> Image:
    """Read the picture in a file (a path) or in the bytes of a file: in RGB, upright, with white behind transparency.

    An animation gives its first frame. Values of more than 8 bits are scaled, not clipped. 16-bit values are multiplied
    by 1/257. For 32-bit integers and floats the range of all values decides: floats in 0..1 are multiplied by 255,
    values in 0..255 do not change, values in 0..65535 are multiplied by 1/257, any other range is stretched to 0..255.

    Args:
        least: a JPEG file is read at a half, a quarter or an eighth of its size, if both sides stay this long; None
            reads every picture as it is.
        most: the most pixels that the picture may have; None leaves Pillow's own limit alone.

    Raises:
        DataError: the picture cannot be read; the message has `name` and the reason. It is a `TooLarge` if the reason
            is the number of pixels; then none of them was read.
    """
    return _read(source, name, pixels=True, least=least, most=most)


def read_header(source: str | bytes, name: str) -> None:
    """Check a picture's header; DataError if the file does not exist, is not a picture or is too large."""
    _read(source, name, pixels=False)


def picture_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files among `paths`, and all pictures in the folders among them and inside these, in natural order.

    Raises:
        UsageError: a path does not exist.
        DataError: there is no picture.
    """
    files: list[Path] = []
    for path in [os.fspath(path) for path in paths]:
        if os.path.isdir(path):
            files += [Path(path, name) for name in walk(path)[0]]
        elif os.path.exists(path):
            files.append(Path(path))
        else:
            raise UsageError(f"{printable(path)}: no such file or folder")
    if not files:
        where = ", ".join(printable(os.fspath(p)) for p in paths) or "no path was given"
        raise DataError(f"no picture found: {where}; known suffixes: {' '.join(SUFFIXES)}")
    return list(dict.fromkeys(files))


def list_folder(path: str) -> tuple[list[str], list[str], list[str]]:
    """The names of folders and of pictures in one folder, in natural order; and the names of its other files.

    Hidden names are left out. A link without a target counts as a picture if its name is that of a picture, so that the
    user gets an error about it.
    """
    folders, pictures, others = [], [], []
    try:
        for entry in _visible(path):
            if _is_folder(entry):
                folders.append(entry.name)
            elif is_picture(entry.name) and (entry.is_symlink() or entry.is_file()):
                pictures.append(entry.name)
            else:
                others.append(entry.name)
    except OSError as error:
        raise DataError(f"{printable(path)}: {_reason(error)}") from error
    return sorted(folders, key=natural_key), sorted(pictures, key=natural_key), others


def _visible(path: str) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder whose names do not begin with a dot; OSError if it cannot be read."""
    with os.scandir(path) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def holds_picture(path: str, depth: int = 3) -> bool:
    """Whether a picture lies in a folder, or so many folders deep in it; looks no further than the first."""
    folders = []
    try:
        for entry in _visible(path):
            if _is_folder(entry):
                folders.append(entry.path)
            elif is_picture(entry.name):
                return True
    except OSError:
        return False
    return depth > 0 and any(holds_picture(folder, depth - 1) for folder in folders)


def walk(path: str) -> tuple[list[str], list[str]]:
    """All pictures in a folder and in the folders inside it, as relative names with `/`; and the names of other files.

    Links are followed, except a link to a folder that contains it.
    """
    return _walk(path, "", frozenset())


def _walk(path: str, prefix: str, inside: frozenset[tuple[int, int]]) -> tuple[list[str], list[str]]:
    folders, names, others = list_folder(path)
    status = os.stat(path)
    here = (status.st_dev, status.st_ino)
    if here in inside:
        return [], []
    pictures = [prefix + name for name in names]
    for folder in folders:
        more, other = _walk(os.path.join(path, folder), f"{prefix}{folder}/", inside | {here})
        pictures += more
        others += other
    return pictures, others


def _read(source: str | bytes, name: str, pixels: bool, least: int | None = None, most: int | None = None) -> Image:
    from PIL import Image

    if not source:
        raise DataError(f"{name}: the picture is empty")
    try:
        if isinstance(source, str) and not _is_plain(os.stat(source).st_mode):
            raise DataError(f"{name}: not a file, but a pipe, a socket or a device")
        with Image.open(source if isinstance(source, str) else BytesIO(source)) as image:
            limit, size = Image.MAX_IMAGE_PIXELS, image.width * image.height
            if limit is not None and size > limit:  # Pillow itself refuses only twice as many
                raise Image.DecompressionBombError
            if most is not None and size > most:
                raise TooLarge(f"{name}: has {image.width} x {image.height} pixels, and {most} are the most")
            if not pixels:
                return image
            if least is not None:
                image.draft(None, (least, least))  # does something for JPEG only
            jpeg.prepare(image)
            with _one_at_a_time if size > LARGE else nullcontext():
                image.load()
                return as_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(f"{name}: larger than Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels") from error
    except _BROKEN as error:
        start = file_start(source) if isinstance(source, str) else source[: len(LFS)]
        raise DataError(f"{name}: {POINTER if is_pointer(start) else _reason(error)}") from error


def _is_plain(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)  # that a folder is none is said by Pillow


def _reason(error: BaseException) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow can read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    lines = str(error).splitlines() or [type(error).__name__]
    return printable(lines[0])


def as_rgb(image: Image) -> Image:
    """`image` in RGB as a person sees it; see `read_picture`."""
    from PIL import Image as Images

    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = Images.fromarray(_to_bytes(np.asarray(image)))
    if image.has_transparency_data:
        if image.mode == "La":  # premultiplied; Pillow cannot convert it to RGBA directly
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Images.alpha_composite(Images.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image) -> Image:
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(0x0112, 1)
    except _BROKEN:  # the pixels are good; viewers show such a picture unturned
        return image
    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _to_bytes(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Convert grey values `(H, W)` of more than 8 bits to uint8."""
    values = np.nan_to_num(pixels.astype(np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if pixels.dtype.str[1:] == "u2" or (low >= 0 and 255 < high <= 65535):
        values = values / 257
    elif pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        values = values * 255
    elif low < 0 or high > 65535:
        values = (values - low) * (255 / (high - low)) if high > low else values * 0
    rounded: np.ndarray[Any, Any] = np.round(values).astype(np.uint8)
    return rounded
