"""The passes of Pillow's resampling in machine code that numba makes: the same bits in a quarter of the time.

Pillow computes each value of a resized picture from whole numbers: the weights of a filter times 2^22, rounded, and
sums in 32 bits. So another program gets the same bits, in whichever order it adds, and may work on many values at once.
One pass makes the picture as narrow as the result and rounds to bytes, the other makes it as low.

Source: the C code of Pillow's `Image.resize` for 8 bits a channel; the tests compare all bits. Only `resize.py` imports
this module, for it needs numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

BITS = 22  # of a weight, behind the point
Array = np.ndarray[Any, Any]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        made: Callable[..., Any] = njit(function, cache=True, nogil=True)
    except RuntimeError:  # there is no folder that may keep the machine code
        made = njit(function, nogil=True)
    return made


@_compiled
def weights(count: int, low: float, scale: float, size: int, cubic: bool) -> tuple[Array, Array]:
    """What each of `size` new values takes of `count` old ones.

    Args:
        low: where the first new value begins, in old values.
        scale: old values for one new value.
        cubic: the bicubic filter; else the bilinear one.

    Returns:
        The first old value that each new one takes, int64 `(size,)`, and its weights times 2^22, int32 `(size, taps)`.
    """
    wide = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * wide
    taps = min(int(np.ceil(support)) * 2 + 1, count)
    first, whole = np.empty(size, np.int64), np.zeros((size, taps), np.int32)
    exact = np.empty(taps)
    for new in range(size):
        centre = low + (new + 0.5) * scale
        begin = max(int(centre - support + 0.5), 0)
        end = min(int(centre + support + 0.5), count)
        total = 0.0
        for old in range(begin, end):
            x = abs((old - centre + 0.5) * (1.0 / wide))
            weight = 0.0
            if not cubic:
                if x < 1.0:
                    weight = 1.0 - x
            elif x < 1.0:
                weight = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                weight = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            exact[old - begin] = weight
            total += weight
        first[new] = min(begin, count - taps)  # the weights before `begin` stay zero
        for tap in range(end - begin):
            weight = exact[tap] / total if total != 0.0 else exact[tap]
            half = -0.5 if weight < 0.0 else 0.5
            whole[new, begin - first[new] + tap] = int(half + weight * (1 << BITS))
    return first, whole


@_compiled
def one_pass(lines: Array, offset: int, first: Array, whole: Array) -> Array:
    """Each new line is a weighted sum of some old ones, rounded.

    Args:
        lines: uint8 `(lines, values)`; the first is line `offset` of the picture.
        first, whole: see `weights`.

    Returns:
        The new lines, uint8 `(len(first), values)`.
    """
    values, taps = lines.shape[1], whole.shape[1]
    made, sums = np.empty((len(first), values), np.uint8), np.empty(values, np.int32)
    for new in range(len(first)):
        line, tap = first[new] - offset, 0
        sums[:] = 1 << (BITS - 1)
        while tap + 4 <= taps:  # four lines at once, for the sums are read and written once then
            a, b, c, d = whole[new, tap], whole[new, tap + 1], whole[new, tap + 2], whole[new, tap + 3]
            p, q, r, s = lines[line + tap], lines[line + tap + 1], lines[line + tap + 2], lines[line + tap + 3]
            for i in range(values):
                sums[i] += a * np.int32(p[i]) + b * np.int32(q[i]) + c * np.int32(r[i]) + d * np.int32(s[i])
            tap += 4
        while tap < taps:
            a, p = whole[new, tap], lines[line + tap]
            for i in range(values):
                sums[i] += a * np.int32(p[i])
            tap += 1
        for i in range(values):
            made[new, i] = min(max(sums[i] >> BITS, 0), 255)
    return made


@_compiled
def planes(pixels: Array, flip: bool) -> Array:
    """The first three channels of pixels, uint8 `(height, 4 * width)`, as uint8 `(3, height, width)`; with `flip` left
    and right are exchanged."""
    height, width = pixels.shape[0], pixels.shape[1] // 4
    made = np.empty((3, height, width), np.uint8)
    for channel in range(3):
        for y in range(height):
            if flip:
                for x in range(width):
                    made[channel, y, width - 1 - x] = pixels[y, 4 * x + channel]
            else:
                for x in range(width):
                    made[channel, y, x] = pixels[y, 4 * x + channel]
    return made
