"""The pixels of a Pillow picture where they lie, without a copy.

Pillow (from 11.2 on) shows its memory by the Arrow C data interface, whose structures do not change. A copy by
`Image.tobytes` takes as long as a third of a pass over the picture.

Source: https://arrow.apache.org/docs/format/CDataInterface.html
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Numbers = np.ndarray[Any, np.dtype[np.int32]]


class _Arrow(ctypes.Structure):
    """`struct ArrowArray`."""


_Arrow._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_Arrow))),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]

_bytes = ctypes.pythonapi.PyMemoryView_FromMemory
_bytes.restype, _bytes.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
WRITE = 0x200  # PyBUF_WRITE
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def pixels_of(image: Image) -> tuple[Numbers, object]:
    """The pixels `(height, width)` of an RGB picture, one number each: red in the lowest byte, nothing of use in the
    highest. And what owns the memory: the pixels can be read while it is held."""
    shown = _shown(image)
    if shown is not None:
        return shown
    content = bytearray(image.tobytes("raw", "RGBX"))  # torch wants memory that can be written to
    return np.frombuffer(content, np.int32).reshape(image.height, image.width), content


def _shown(image: Image) -> tuple[Numbers, object] | None:
    """The same without a copy; None if Pillow cannot show it, or shows something else than is expected."""
    try:
        _, capsule = image.__arrow_c_array__()
        whole = _Arrow.from_address(_pointer(capsule, b"arrow_array"))
    except (AttributeError, ValueError):  # an older Pillow; or a picture that lies in several blocks of memory
        return None
    if (whole.n_children, whole.offset) != (1, 0):
        return None
    channels = whole.children[0].contents
    if (channels.length, channels.offset, channels.n_buffers) != (4 * image.width * image.height, 0, 2):
        return None
    memory = _bytes(channels.buffers[1], channels.length, WRITE)  # as `bytearray`
    return np.frombuffer(memory, np.int32).reshape(image.height, image.width), (image, capsule)
